// How the work is cut. Tokens are taken in passes; in a pass every chosen (token, expert) pair belongs to a segment:
// some pairs of one expert, whose activations lie together. Then three steps, each shared out task by task:
//
//   quantize  one segment: x to int8, group by group
//   gate/up   one expert, 32 inner features: two row blocks for all of the expert's segments, silu(gate) * up, quantized
//             at once: a task makes exactly one group of the next matrix's inputs, and nobody waits for the whole row
//   down      some row blocks of the output, for all experts: no two tasks write the same numbers, and each output is
//             summed in the order of the experts, however many threads there are
//
// With one token a task streams its weights once, front to back; with many, a tile is unpacked once per segment.

#include "moe.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "layout.h"

namespace lfm2 {
namespace {

constexpr int64_t kSegmentPairs = 64;   // activations, weights and sums of a task fit the first two cache levels
constexpr int64_t kPassTokens = 1024;   // bounds the scratch memory; every pass reads the weights once
constexpr int64_t kTasksPerWorker = 8;  // for the balance, where the number of tasks can be chosen
constexpr size_t kAlignment = 64;

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

struct Pair {
  int32_t token;  // within the pass
  float weight;
};

struct Segment {
  int32_t expert;
  int32_t first;  // its pairs are first .. first + count - 1
  int32_t count;
};

// Hands out aligned pieces of the scratch memory; without memory it only counts bytes.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    char* at = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(at);
  }

  Activations take_activations(int64_t pairs, int64_t groups) {
    auto* codes = take<int8_t>(pairs * groups * kGroup);
    auto* scales = take<float>(pairs * groups);
    return {codes, scales, take<int32_t>(pairs * groups), 0};
  }

  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

template <typename Step>
void share_out(const ThreadPool& pool, int64_t tasks, const Step& step) {
  struct Shared {
    const Step& step;
    int64_t tasks;
    std::atomic<int64_t> next;
  } shared{step, tasks, 0};
  const auto work = [](void* context, int) {
    auto& all = *static_cast<Shared*>(context);
    for (int64_t task; (task = all.next.fetch_add(1, std::memory_order_relaxed)) < all.tasks;) {
      all.step(task);
    }
  };
  const int workers = static_cast<int>(std::min<int64_t>(pool.workers, tasks));
  if (workers > 1) {
    pool.run(workers, work, &shared);
  }
  work(&shared, 0);  // everything on one thread; otherwise what a pool that could not run has left
}

class Pass {
 public:
  Pass(const MoeProblem& problem, const Kernels& kernels, const ThreadPool& pool, Arena& arena);

  // Computes the output of `tokens` tokens from `first` on.
  void run(int64_t first, int64_t tokens);

 private:
  void route();
  void cut_segments();
  void quantize(const Segment& segment) const;
  void gate_up(int64_t active, int64_t inner_group) const;
  void down(int64_t first_block, int64_t end_block) const;
  void down_of(const Segment& segment, int64_t block) const;
  Activations part(const Activations& all, const Segment& segment, int64_t groups) const;

  const MoeProblem& problem_;
  const Kernels& kernels_;
  const ThreadPool& pool_;
  const int64_t width_groups_;
  const int64_t inner_groups_;
  int64_t first_token_ = 0;
  int64_t tokens_ = 0;
  int64_t segments_count_ = 0;
  int64_t active_count_ = 0;  // experts that have a token
  uint64_t* ranks_;           // [experts]
  Choice* choices_;           // [tokens, top_k]
  int32_t* ends_;             // [experts], where each expert's pairs end
  int32_t* active_;           // [experts + 1], first segment of each active expert, and the end
  Pair* pairs_;               // [tokens * top_k], by expert, then by token
  Segment* segments_;
  Activations x_;
  Activations inner_;
};

Pass::Pass(const MoeProblem& problem, const Kernels& kernels, const ThreadPool& pool, Arena& arena)
    : problem_(problem),
      kernels_(kernels),
      pool_(pool),
      width_groups_(problem.width / kGroup),
      inner_groups_(problem.inner / kGroup) {
  const int64_t experts = problem.routing.experts;
  const int64_t pairs = std::min(problem.tokens, kPassTokens) * problem.routing.top_k;
  ranks_ = arena.take<uint64_t>(experts);
  choices_ = arena.take<Choice>(pairs);
  ends_ = arena.take<int32_t>(experts);
  active_ = arena.take<int32_t>(experts + 1);
  pairs_ = arena.take<Pair>(pairs);
  segments_ = arena.take<Segment>(std::min(experts, pairs) + pairs / kSegmentPairs);
  x_ = arena.take_activations(pairs, width_groups_);
  inner_ = arena.take_activations(pairs, inner_groups_);
}

void Pass::run(int64_t first, int64_t tokens) {
  first_token_ = first;
  tokens_ = tokens;
  route();
  cut_segments();
  share_out(pool_, segments_count_, [this](int64_t i) { quantize(segments_[i]); });
  share_out(pool_, active_count_ * inner_groups_, [this](int64_t i) { gate_up(i / inner_groups_, i % inner_groups_); });
  const int64_t blocks = std::clamp<int64_t>(width_groups_ / (pool_.workers * kTasksPerWorker), 1, kTasksPerWorker);
  share_out(pool_, ceil_div(width_groups_, blocks),
            [this, blocks](int64_t i) { down(i * blocks, std::min((i + 1) * blocks, width_groups_)); });
}

// Fills pairs_ by a counting sort of the choices; ends_ says where each expert's pairs end.
void Pass::route() {
  const int64_t top_k = problem_.routing.top_k;
  const int64_t experts = problem_.routing.experts;
  std::fill_n(ends_, experts, 0);
  for (int64_t token = 0; token < tokens_; ++token) {
    Choice* chosen = choices_ + token * top_k;
    choose_experts(problem_.routing, first_token_ + token, ranks_, chosen);
    for (int64_t i = 0; i < top_k; ++i) {
      ++ends_[chosen[i].expert];
    }
  }
  int32_t begin = 0;
  for (int64_t expert = 0; expert < experts; ++expert) {
    begin += std::exchange(ends_[expert], begin);
  }
  for (int64_t i = 0; i < tokens_ * top_k; ++i) {
    pairs_[ends_[choices_[i].expert]++] = {static_cast<int32_t>(i / top_k), choices_[i].weight};
  }
}

// An expert's pairs go into as few segments as they fit, all of about the same size.
void Pass::cut_segments() {
  segments_count_ = 0;
  active_count_ = 0;
  int32_t first = 0;
  for (int32_t expert = 0; expert < problem_.routing.experts; ++expert) {
    const int64_t pairs = ends_[expert] - first;
    if (pairs == 0) {
      continue;
    }
    active_[active_count_++] = static_cast<int32_t>(segments_count_);
    const int64_t parts = ceil_div(pairs, kSegmentPairs);
    for (int64_t part = 0; part < parts; ++part) {
      const auto count = static_cast<int32_t>(pairs * (part + 1) / parts - pairs * part / parts);
      segments_[segments_count_++] = {expert, first, count};
      first += count;
    }
  }
  active_[active_count_] = static_cast<int32_t>(segments_count_);
}

Activations Pass::part(const Activations& all, const Segment& segment, int64_t groups) const {
  const int64_t at = segment.first * groups;
  return {all.codes + at * kGroup, all.scales + at, all.offsets + at, segment.count};
}

void Pass::quantize(const Segment& segment) const {
  const Activations to = part(x_, segment, width_groups_);
  for (int32_t i = 0; i < segment.count; ++i) {
    const float* x = problem_.x + (first_token_ + pairs_[segment.first + i].token) * problem_.width;
    for (int64_t group = 0; group < width_groups_; ++group) {
      kernels_.quantize(x + group * kGroup, to, group, i);
    }
  }
}

void Pass::gate_up(int64_t active, int64_t inner_group) const {
  alignas(kAlignment) float gate[kSegmentPairs * kTileRows];
  alignas(kAlignment) float up[kSegmentPairs * kTileRows];
  const int64_t block_bytes = width_groups_ * kTileBytes;
  for (int32_t i = active_[active]; i < active_[active + 1]; ++i) {
    const Segment& segment = segments_[i];
    const uint8_t* tiles = problem_.gate_up + (segment.expert * inner_groups_ + inner_group) * 2 * block_bytes;
    const Activations x = part(x_, segment, width_groups_);
    kernels_.rows(tiles, width_groups_, x, gate);
    kernels_.rows(tiles + block_bytes, width_groups_, x, up);
    kernels_.swiglu(gate, up, part(inner_, segment, inner_groups_), inner_group);
  }
}

void Pass::down(int64_t first_block, int64_t end_block) const {
  for (int64_t token = 0; token < tokens_; ++token) {
    float* out = problem_.out + (first_token_ + token) * problem_.width;
    std::fill(out + first_block * kTileRows, out + end_block * kTileRows, 0.0f);
  }
  for (int64_t active = 0; active < active_count_; ++active) {
    for (int64_t block = first_block; block < end_block; ++block) {
      for (int32_t i = active_[active]; i < active_[active + 1]; ++i) {
        down_of(segments_[i], block);
      }
    }
  }
}

void Pass::down_of(const Segment& segment, int64_t block) const {
  alignas(kAlignment) float y[kSegmentPairs * kTileRows];
  const uint8_t* tiles = problem_.down + (segment.expert * width_groups_ + block) * inner_groups_ * kTileBytes;
  kernels_.rows(tiles, inner_groups_, part(inner_, segment, inner_groups_), y);
  for (int32_t i = 0; i < segment.count; ++i) {
    const Pair& pair = pairs_[segment.first + i];
    float* out = problem_.out + (first_token_ + pair.token) * problem_.width + block * kTileRows;
    kernels_.accumulate(pair.weight, y + i * kTileRows, out);
  }
}

}  // namespace

size_t moe_scratch_bytes(const MoeProblem& problem) {
  Arena arena(nullptr);
  const ThreadPool none = {1, nullptr};
  Pass(problem, kScalarKernels, none, arena);
  return arena.used();
}

void run_moe(const MoeProblem& problem, const Kernels& kernels, const ThreadPool& pool, void* scratch) {
  Arena arena(scratch);
  Pass pass(problem, kernels, pool, arena);
  for (int64_t first = 0; first < problem.tokens; first += kPassTokens) {
    pass.run(first, std::min(kPassTokens, problem.tokens - first));
  }
}

}  // namespace lfm2
