// The sparse feed-forward on row_matrix.h; moe_pass.h says how the work is cut.

#include <algorithm>

#include "moe_pass.h"
#include "row_matmul.h"
#include "row_work.h"
#include "target.h"

namespace lfm2 {
namespace {

class RowExperts {
 public:
  using Activations = RowActivations;

  RowExperts(const RowMoeProblem& problem, const RowKernels& kernels) : problem_(problem), kernels_(kernels) {}

  int64_t width() const { return problem_.width(); }
  int64_t inner() const { return problem_.inner(); }

  Activations take(Arena& arena, int64_t pairs, int64_t columns) const {
    return take_activations(arena, pairs, columns == width() ? problem_.gate_up : problem_.down);
  }

  Activations part(const Activations& all, int64_t first, int64_t count, int64_t) const {
    RowActivations found = all.part(first, count);
    found.shifted = kernels_.takes_shifted(count, all.small_groups);
    return found;
  }

  void quantize(const float* x, const Activations& to, int64_t pair) const {
    kernels_.quantize(x, width(), to, pair);
  }

  void gate_up(int32_t expert, int64_t group, const Activations& x, const Activations& to) const {
    alignas(kAlignment) float both[kSegmentPairs * 2 * kBlock];
    multiply(kernels_, problem_.gate_up.part((expert * inner() + group * kBlock) * 2, 2 * kBlock), x, both, 2 * kBlock);
    for (int64_t token = 0; token < x.tokens; ++token) {
      const float* gate = both + token * 2 * kBlock;
      kernels_.swiglu(gate, gate + 1, 2, to, group, token);
    }
  }

  void down(int32_t expert, int64_t block, const Activations& x, float* y) const {
    multiply(kernels_, problem_.down.part(expert * width() + block * kBlock, kBlock), x, y, kBlock);
  }

  void accumulate(float weight, const float* y, float* out) const { kernels_.accumulate(weight, y, out, kBlock); }

 private:
  const RowMoeProblem& problem_;
  const RowKernels& kernels_;
};

// What the experts and the router read, where the host has neither the norm nor the logits.
struct Routed {
  float* normed = nullptr;  // [tokens, width]
  float* logits = nullptr;  // [tokens, experts]
};

Routed take_routed(Arena& arena, const RowMoeProblem& problem, int64_t tokens) {
  Routed found;
  if (problem.in.gamma != nullptr) {
    found.normed = arena.take<float>(times(tokens, problem.width()));
  }
  if (problem.router != nullptr) {
    found.logits = arena.take<float>(times(tokens, problem.routing.experts));
  }
  return found;
}

// The same problem with norm and logits made.
RowMoeProblem route(const RowMoeProblem& problem, const RowKernels& kernels, const FloatKernels& floats,
                    const ThreadPool& pool, const Routed& room) {
  RowMoeProblem found = problem;
  if (room.normed != nullptr) {
    const int64_t width = problem.width();
    share_out(pool, problem.tokens, [&](int64_t token) {
      kernels.normalize(problem.in, width, token, room.normed + token * width);
    });
    found.in = {};
    found.in.x = room.normed;
  }
  if (room.logits != nullptr) {
    run_float_matmul({found.in.x, problem.router, problem.tokens, problem.width(), problem.routing.experts, room.logits},
                     floats, pool);
    found.routing.logits = room.logits;
  }
  return found;
}

// Tokens first .. first + count - 1.
RowMoeProblem part_of(const RowMoeProblem& problem, int64_t first, int64_t count) {
  RowMoeProblem found = problem;
  found.in = problem.in.from(first, problem.width());
  if (problem.router == nullptr) {
    found.routing.logits += first * problem.routing.experts;
  }
  found.out += first * problem.width();
  found.tokens = count;
  return found;
}

}  // namespace

size_t row_moe_scratch_bytes(const RowMoeProblem& problem) {
  Arena arena(nullptr);
  const int64_t tokens = std::min(problem.tokens, kPassTokens);
  take_routed(arena, problem, tokens);
  const RowExperts experts(problem, scalar::kRowKernels);
  MoePass<RowExperts>(problem.in.x, problem.routing, tokens, experts, kNoPool, arena);
  return arena.used();
}

void run_row_moe(const RowMoeProblem& problem, const RowKernels& kernels, const FloatKernels& floats,
                 const ThreadPool& pool, void* scratch) {
  for (int64_t first = 0; first < problem.tokens; first += kPassTokens) {
    Arena arena(scratch);
    const RowMoeProblem part = part_of(problem, first, std::min(kPassTokens, problem.tokens - first));
    const RowMoeProblem routed = route(part, kernels, floats, pool, take_routed(arena, part, part.tokens));
    const RowExperts experts(routed, kernels);
    MoePass<RowExperts>(routed.in.x, routed.routing, routed.tokens, experts, pool, arena)
        .run_all(routed.tokens, routed.out);
  }
}

}  // namespace lfm2
