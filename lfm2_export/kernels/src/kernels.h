// What an instruction set has to provide: four small kernels. Everything else (routing, grouping, threads) is shared.
//
// All of them give the same bits: integer sums are exact, float operations are written out (explicit fma, no
// contraction) in the same order. So the scalar kernels are a reference to compare with for equality, and a result
// depends neither on the machine's instruction set nor on the number of threads or tokens.

#pragma once

#include <cstdint>

namespace lfm2 {

// `tokens` activation rows quantized to int8 in groups of 32, group by group so that a kernel that walks along a row of
// weights reads them front to back. value = codes * scale.
struct Activations {
  int8_t* codes;     // [groups][tokens][32], in -127..127
  float* scales;     // [groups][tokens]; NaN where the group held a NaN or an infinity
  int32_t* offsets;  // [groups][tokens]: -8 * sum of the group's codes, which takes the weights' zero point out
  int64_t tokens;
};

struct Kernels {
  const char* name;

  // One group of one token: 32 floats into the place that `group` and `token` name.
  void (*quantize)(const float* x, const Activations& to, int64_t group, int64_t token);

  // y[tokens][32] = 32 rows of weights (`groups` tiles) times the activations.
  void (*rows)(const uint8_t* tiles, int64_t groups, const Activations& x, float* y);

  // silu(gate) * up for [tokens][32], quantized into group `group` of `to`.
  void (*swiglu)(const float* gate, const float* up, const Activations& to, int64_t group);

  // out[32] += weight * y[32]
  void (*accumulate)(float weight, const float* y, float* out);
};

}  // namespace lfm2
