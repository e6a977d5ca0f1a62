// How the work of one sparse feed-forward is cut, for any layout of the experts' weights. Tokens are taken in passes; in a
// pass every chosen (token, expert) pair belongs to a segment: some pairs of one expert, whose activations lie together.
// Then three steps, each shared out task by task:
//
//   quantize  one segment: x to int8, group by group
//   gate/up   one expert, 32 inner features: gate and up for all of the expert's segments, silu(gate) * up, quantized
//             at once: a task makes exactly one group of the next matrix's inputs, and nobody waits for the whole row
//   down      some row blocks of the output, for all experts: no two tasks write the same numbers, and each output is
//             summed in the order of the experts, however many threads there are
//
// With one token a task streams its weights once, front to back; with many, weights are unpacked once per segment.
//
// `Experts` is a layout:
//
//   int64_t width(), inner()                                             multiples of 32
//   Activations take(Arena&, int64_t pairs, int64_t columns)             room for quantized rows
//   Activations part(const Activations&, int64_t first, int64_t count, int64_t columns)
//   void quantize(const float* x, const Activations& to, int64_t pair)   one row of `width`
//   void gate_up(int32_t expert, int64_t group, const Activations& x, const Activations& to)
//   void down(int32_t expert, int64_t block, const Activations& x, float* y)     y[count][32]
//   void accumulate(float weight, const float* y, float* out)            out[32] += weight * y[32]

#pragma once

#include <algorithm>
#include <limits>
#include <utility>

#include "routing.h"
#include "work.h"

namespace lfm2 {

constexpr int64_t kBlock = 32;          // features of a task's step, in and out
constexpr int64_t kSegmentPairs = 128;  // activations, weights and sums of a task fit the first two cache levels
constexpr int64_t kPassTokens = 1024;   // bounds the scratch memory; every pass reads the weights once
constexpr int64_t kTasksPerWorker = 8;  // for the balance, where the number of tasks can be chosen

struct Pair {
  int32_t token;  // within the pass
  float weight;
};

struct Segment {
  int32_t expert;
  int32_t first;  // its pairs are first .. first + count - 1
  int32_t count;
};

template <typename Experts>
class MoePass {
 public:
  using Activations = typename Experts::Activations;

  MoePass(const float* x, const Routing& routing, int64_t tokens, const Experts& experts, const ThreadPool& pool,
          Arena& arena)
      : input_(x),
        routing_(routing),
        experts_(experts),
        pool_(pool),
        width_groups_(experts.width() / kBlock),
        inner_groups_(experts.inner() / kBlock) {
    const int64_t pairs = std::min(tokens, kPassTokens) * routing.top_k;
    static_assert(kPassTokens * kMostExperts <= std::numeric_limits<int32_t>::max());  // pairs are counted in 32 bits
    ranks_ = arena.take<uint64_t>(routing.experts);
    choices_ = arena.take<Choice>(pairs);
    ends_ = arena.take<int32_t>(routing.experts);
    active_ = arena.take<int32_t>(routing.experts + 1);
    pairs_ = arena.take<Pair>(pairs);
    segments_ = arena.take<Segment>(std::min(routing.experts, pairs) + pairs / kSegmentPairs);
    x_ = experts.take(arena, pairs, experts.width());
    inner_ = experts.take(arena, pairs, experts.inner());
  }

  // out [all, width] for the tokens of x [all, width].
  void run_all(int64_t all, float* out) {
    out_ = out;
    for (int64_t first = 0; first < all; first += kPassTokens) {
      run(first, std::min(kPassTokens, all - first));
    }
  }

 private:
  void run(int64_t first, int64_t tokens) {
    first_token_ = first;
    tokens_ = tokens;
    route();
    cut_segments();
    share_out(tokens_ > 1 ? pool_ : kNoPool, segments_count_, [this](int64_t i) { quantize(segments_[i]); });
    share_out(pool_, active_count_ * inner_groups_,
              [this](int64_t i) { gate_up(i / inner_groups_, i % inner_groups_); });
    const int64_t blocks = std::clamp<int64_t>(width_groups_ / (pool_.workers * kTasksPerWorker), 1, kTasksPerWorker);
    share_out(pool_, ceil_div(width_groups_, blocks),
              [this, blocks](int64_t i) { down(i * blocks, std::min((i + 1) * blocks, width_groups_)); });
  }

  // Fills pairs_ by a counting sort of the choices; ends_ says where each expert's pairs end.
  void route() {
    const int64_t top_k = routing_.top_k;
    std::fill_n(ends_, routing_.experts, 0);
    for (int64_t token = 0; token < tokens_; ++token) {
      Choice* chosen = choices_ + token * top_k;
      choose_experts(routing_, first_token_ + token, ranks_, chosen);
      for (int64_t i = 0; i < top_k; ++i) {
        ++ends_[chosen[i].expert];
      }
    }
    int32_t begin = 0;
    for (int64_t expert = 0; expert < routing_.experts; ++expert) {
      begin += std::exchange(ends_[expert], begin);
    }
    for (int64_t i = 0; i < tokens_ * top_k; ++i) {
      pairs_[ends_[choices_[i].expert]++] = {static_cast<int32_t>(i / top_k), choices_[i].weight};
    }
  }

  // An expert's pairs go into as few segments as they fit, all of about the same size.
  void cut_segments() {
    segments_count_ = 0;
    active_count_ = 0;
    int32_t first = 0;
    for (int32_t expert = 0; expert < routing_.experts; ++expert) {
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

  Activations x_of(const Segment& segment) const {
    return experts_.part(x_, segment.first, segment.count, experts_.width());
  }

  Activations inner_of(const Segment& segment) const {
    return experts_.part(inner_, segment.first, segment.count, experts_.inner());
  }

  void quantize(const Segment& segment) const {
    const Activations to = x_of(segment);
    for (int32_t i = 0; i < segment.count; ++i) {
      experts_.quantize(input_ + (first_token_ + pairs_[segment.first + i].token) * experts_.width(), to, i);
    }
  }

  void gate_up(int64_t active, int64_t inner_group) const {
    for (int32_t i = active_[active]; i < active_[active + 1]; ++i) {
      experts_.gate_up(segments_[i].expert, inner_group, x_of(segments_[i]), inner_of(segments_[i]));
    }
  }

  void down(int64_t first_block, int64_t end_block) const {
    for (int64_t token = 0; token < tokens_; ++token) {
      float* out = out_ + (first_token_ + token) * experts_.width();
      std::fill(out + first_block * kBlock, out + end_block * kBlock, 0.0f);
    }
    for (int64_t active = 0; active < active_count_; ++active) {
      for (int64_t block = first_block; block < end_block; ++block) {
        for (int32_t i = active_[active]; i < active_[active + 1]; ++i) {
          down_of(segments_[i], block);
        }
      }
    }
  }

  void down_of(const Segment& segment, int64_t block) const {
    alignas(kAlignment) float y[kSegmentPairs * kBlock];
    experts_.down(segment.expert, block, inner_of(segment), y);
    for (int32_t i = 0; i < segment.count; ++i) {
      const Pair& pair = pairs_[segment.first + i];
      float* out = out_ + (first_token_ + pair.token) * experts_.width() + block * kBlock;
      experts_.accumulate(pair.weight, y + i * kBlock, out);
    }
  }

  const float* input_;
  const Routing& routing_;
  const Experts& experts_;
  const ThreadPool& pool_;
  const int64_t width_groups_;
  const int64_t inner_groups_;
  float* out_ = nullptr;
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

}  // namespace lfm2
