// The reference: no intrinsics, one weight at a time. Every other file must give the same bits.

#include "elementwise.h"
#include "target.h"

namespace lfm2 {
namespace {

int32_t dot_of_row(const uint8_t* codes, int row, const int8_t* x) {
  int32_t sum = 0;
  for (int quad = 0; quad < kQuads; ++quad) {
    for (int byte = 0; byte < 4; ++byte) {
      const uint8_t pair = codes[(quad * kTileRows + row) * 4 + byte];
      sum += (pair & 15) * x[4 * quad + byte] + (pair >> 4) * x[16 + 4 * quad + byte];
    }
  }
  return sum;
}

void rows(const uint8_t* tiles, int64_t groups, const Activations& x, float* y) {
  for (int64_t i = 0; i < x.tokens * kTileRows; ++i) {
    y[i] = 0.0f;
  }
  for (int64_t group = 0; group < groups; ++group, tiles += kTileBytes) {
    for (int row = 0; row < kTileRows; ++row) {
      uint16_t half;
      std::memcpy(&half, tiles + 2 * row, sizeof half);
      const float scale = half_to_float(half);
      for (int64_t token = 0; token < x.tokens; ++token) {
        const int64_t at = group * x.tokens + token;
        const int32_t sum = x.offsets[at] + dot_of_row(tiles + kCodesOffset, row, x.codes + at * kGroup);
        float& total = y[token * kTileRows + row];
        total = __builtin_fmaf(static_cast<float>(sum), scale * x.scales[at], total);
      }
    }
  }
}

}  // namespace

namespace scalar {

const Kernels kKernels = {"scalar", quantize_group, rows, swiglu_groups, accumulate_rows};

}  // namespace scalar
}  // namespace lfm2
