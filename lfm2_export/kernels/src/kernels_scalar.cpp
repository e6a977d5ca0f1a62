// The reference: no intrinsics, one weight at a time. Every other file must give the same bits.

#include "elementwise.h"

namespace lfm2 {
namespace {

float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  const uint32_t wide = exponent == 31 ? 255u : exponent + 112u;
  return bits_to_float(sign | (wide << 23) | (mantissa << 13));
}

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

const Kernels kScalarKernels = {"scalar", quantize_group, rows, swiglu_groups, accumulate_rows};

}  // namespace lfm2
