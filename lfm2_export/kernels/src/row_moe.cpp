// The sparse feed-forward on row_matrix.h; moe_pass.h says how the work is cut.

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
    found.shifted = is_worth_arranging(kernels_, count, found.bits);
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

}  // namespace

size_t row_moe_scratch_bytes(const RowMoeProblem& problem) {
  Arena arena(nullptr);
  const RowExperts experts(problem, scalar::kRowKernels);
  MoePass<RowExperts>(problem.x, problem.routing, problem.tokens, experts, kNoPool, arena);
  return arena.used();
}

void run_row_moe(const RowMoeProblem& problem, const RowKernels& kernels, const ThreadPool& pool, void* scratch) {
  Arena arena(scratch);
  const RowExperts experts(problem, kernels);
  MoePass<RowExperts>(problem.x, problem.routing, problem.tokens, experts, pool, arena)
      .run_all(problem.tokens, problem.out);
}

}  // namespace lfm2
