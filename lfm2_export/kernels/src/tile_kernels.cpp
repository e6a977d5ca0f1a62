// kernels.h for packed tiles, compiled for every instruction set.

#include "elementwise.h"
#include "target.h"
#include "tile_stripes.h"

#if defined(__ARM_FEATURE_MATMUL_INT8)
#include "tile_pairs_neon.h"
#endif

namespace lfm2 {
namespace {

void rows_of_one(const uint8_t* tiles, int64_t groups, const Activations& x, float* y) {
  Floats total[kStripes];
  for (Floats& its : total) {
    its = broadcast(0.0f);
  }
  for (int64_t group = 0; group < groups; ++group, tiles += kTileBytes) {
    prefetch(tiles);
    for (int stripe = 0; stripe < kStripes; stripe += kTogether) {
      add_stripes(tiles, stripe, x, group, total + stripe);
    }
  }
  for (int stripe = 0; stripe < kStripes; ++stripe) {
    store(y + stripe * kLanes, total[stripe]);
  }
}

void rows(const uint8_t* tiles, int64_t groups, const Activations& x, float* y) {
  if (x.tokens == 1) {
    return rows_of_one(tiles, groups, x, y);
  }
  std::memset(y, 0, x.tokens * kTileRows * sizeof(float));
  for (int64_t group = 0; group < groups; ++group, tiles += kTileBytes) {
    prefetch(tiles);
#if defined(__ARM_FEATURE_MATMUL_INT8)
    add_tokens(tiles, x, group, add_pairs_of_tokens(tiles, x, group, y), y);
#else
    add_tokens(tiles, x, group, 0, y);
#endif
  }
}

}  // namespace

namespace LFM2_TARGET {

const Kernels kKernels = {LFM2_TARGET_NAME, quantize_group, rows, swiglu_groups, accumulate_rows};

}  // namespace LFM2_TARGET
}  // namespace lfm2
