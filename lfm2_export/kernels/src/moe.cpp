// The sparse feed-forward on packed tiles (layout.h); moe_pass.h says how the work is cut.

#include "moe.h"

#include "layout.h"
#include "moe_pass.h"
#include "target.h"

namespace lfm2 {
namespace {

static_assert(kBlock == kTileRows && kBlock == kGroup);

class TileExperts {
 public:
  using Activations = lfm2::Activations;

  TileExperts(const MoeProblem& problem, const Kernels& kernels) : problem_(problem), kernels_(kernels) {}

  int64_t width() const { return problem_.width; }
  int64_t inner() const { return problem_.inner; }

  Activations take(Arena& arena, int64_t pairs, int64_t columns) const {
    const int64_t groups = columns / kGroup;
    auto* codes = arena.take<int8_t>(times(pairs, columns));
    auto* scales = arena.take<float>(times(pairs, groups));
    return {codes, scales, arena.take<int32_t>(times(pairs, groups)), 0};
  }

  Activations part(const Activations& all, int64_t first, int64_t count, int64_t columns) const {
    const int64_t at = first * (columns / kGroup);
    return {all.codes + at * kGroup, all.scales + at, all.offsets + at, count};
  }

  void quantize(const float* x, const Activations& to, int64_t pair) const {
    for (int64_t group = 0; group < width() / kGroup; ++group) {
      kernels_.quantize(x + group * kGroup, to, group, pair);
    }
  }

  void gate_up(int32_t expert, int64_t group, const Activations& x, const Activations& to) const {
    alignas(kAlignment) float gate[kSegmentPairs * kTileRows];
    alignas(kAlignment) float up[kSegmentPairs * kTileRows];
    const int64_t width_groups = width() / kGroup;
    const int64_t block_bytes = width_groups * kTileBytes;
    const uint8_t* tiles = problem_.gate_up + (expert * (inner() / kGroup) + group) * 2 * block_bytes;
    kernels_.rows(tiles, width_groups, x, gate);
    kernels_.rows(tiles + block_bytes, width_groups, x, up);
    kernels_.swiglu(gate, up, to, group);
  }

  void down(int32_t expert, int64_t block, const Activations& x, float* y) const {
    const int64_t inner_groups = inner() / kGroup;
    kernels_.rows(problem_.down + (expert * (width() / kTileRows) + block) * inner_groups * kTileBytes, inner_groups, x,
                  y);
  }

  void accumulate(float weight, const float* y, float* out) const { kernels_.accumulate(weight, y, out); }

 private:
  const MoeProblem& problem_;
  const Kernels& kernels_;
};

}  // namespace

size_t moe_scratch_bytes(const MoeProblem& problem) {
  Arena arena(nullptr);
  const TileExperts experts(problem, scalar::kKernels);
  MoePass<TileExperts>(problem.x, problem.routing, problem.tokens, experts, kNoPool, arena);
  return arena.used();
}

void run_moe(const MoeProblem& problem, const Kernels& kernels, const ThreadPool& pool, void* scratch) {
  Arena arena(scratch);
  const TileExperts experts(problem, kernels);
  MoePass<TileExperts>(problem.x, problem.routing, problem.tokens, experts, pool, arena)
      .run_all(problem.tokens, problem.out);
}

}  // namespace lfm2
