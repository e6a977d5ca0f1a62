// The kernel of float_matmul.h: plain loops that the compiler vectorizes for the translation unit's instruction set.

#pragma once

#include "float_matmul.h"

namespace lfm2 {
namespace {

template <int kTokens, int kOutputs>
void multiply_tile(const FloatMatMulProblem& p, int64_t token, int64_t first) {
  float total[kTokens][kOutputs] = {};
  const float* __restrict x = p.x + token * p.inputs;
  const float* __restrict w = p.w + first;
  for (int64_t input = 0; input < p.inputs; ++input, w += p.outputs) {
    for (int t = 0; t < kTokens; ++t) {
      const float factor = x[t * p.inputs + input];
      for (int i = 0; i < kOutputs; ++i) {
        total[t][i] = __builtin_fmaf(factor, w[i], total[t][i]);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    float* __restrict out = p.out + (token + t) * p.outputs + first;
    for (int i = 0; i < kOutputs; ++i) {
      out[i] = total[t][i];
    }
  }
}

template <int kTokens>
void multiply_outputs(const FloatMatMulProblem& p, int64_t token, int64_t first, int64_t end) {
  for (; first + 32 <= end; first += 32) {
    multiply_tile<kTokens, 32>(p, token, first);
  }
  for (; first + 8 <= end; first += 8) {
    multiply_tile<kTokens, 8>(p, token, first);
  }
  for (; first < end; ++first) {
    multiply_tile<kTokens, 1>(p, token, first);
  }
}

inline void multiply_floats(const FloatMatMulProblem& p, int64_t token, int64_t tokens, int64_t first, int64_t count) {
  const int64_t end = token + tokens;
  for (; token + 4 <= end; token += 4) {
    multiply_outputs<4>(p, token, first, first + count);
  }
  for (; token < end; ++token) {
    multiply_outputs<1>(p, token, first, first + count);
  }
}

}  // namespace
}  // namespace lfm2
