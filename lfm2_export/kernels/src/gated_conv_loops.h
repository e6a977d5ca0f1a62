// The kernels of gated_conv.h: plain loops that the compiler vectorizes for the translation unit's instruction set.

#pragma once

#include "gated_conv.h"

namespace lfm2 {
namespace {

inline void gate_row(const GatedConvProblem& p, int64_t row, int64_t token, float* __restrict to) {
  const int64_t at = row * p.tokens + token;
  const float* __restrict b = p.projected + at * 3 * p.width;
  const float* __restrict x = b + 2 * p.width;
  const float attended = p.attended[at];
  for (int64_t i = 0; i < p.width; ++i) {
    to[i] = b[i] * x[i] * attended;
  }
}

inline void convolve_row(const GatedConvProblem& p, int64_t row, int64_t token, const float* __restrict window) {
  const int64_t at = row * p.tokens + token;
  const float* __restrict c = p.projected + (at * 3 + 1) * p.width;
  float* __restrict out = p.out + at * p.width;
  for (int64_t i = 0; i < p.width; ++i) {
    out[i] = p.bias == nullptr ? 0.0f : p.bias[i];
  }
  for (int64_t tap = 0; tap < p.taps; ++tap) {
    const float* __restrict weight = p.weight + tap * p.width;
    const float* __restrict input = window + tap * p.width;
    for (int64_t i = 0; i < p.width; ++i) {
      out[i] = __builtin_fmaf(weight[i], input[i], out[i]);
    }
  }
  for (int64_t i = 0; i < p.width; ++i) {
    out[i] *= c[i];
  }
}

}  // namespace
}  // namespace lfm2
