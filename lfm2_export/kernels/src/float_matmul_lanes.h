// float_matmul_loops.h in lanes.h's words, bit for bit: each output is summed over the inputs in their order.

#pragma once

#include "float_matmul.h"
#include "lanes.h"

namespace lfm2 {
namespace {

template <int kTokens, int kVectors>
LFM2_ALWAYS void multiply_tile(const FloatMatMulProblem& p, int64_t token, int64_t first) {
  Floats total[kTokens][kVectors];
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < kVectors; ++v) {
      total[t][v] = broadcast(0.0f);
    }
  }
  const float *x = p.x + token * p.inputs, *w = p.w + first;
  for (int64_t input = 0; input < p.inputs; ++input, ++x, w += p.outputs) {
    Floats weights[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      weights[v] = load(w + v * kLanes);
    }
    for (int t = 0; t < kTokens; ++t) {
      const Floats factor = broadcast(x[t * p.inputs]);
      for (int v = 0; v < kVectors; ++v) {
        total[t][v] = fmadd(factor, weights[v], total[t][v]);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < kVectors; ++v) {
      store(p.out + (token + t) * p.outputs + first + v * kLanes, total[t][v]);
    }
  }
}

inline void multiply_one(const FloatMatMulProblem& p, int64_t token, int64_t output) {
  float total = 0.0f;
  for (int64_t input = 0; input < p.inputs; ++input) {
    total = __builtin_fmaf(p.x[token * p.inputs + input], p.w[input * p.outputs + output], total);
  }
  p.out[token * p.outputs + output] = total;
}

template <int kTokens>
void multiply_outputs(const FloatMatMulProblem& p, int64_t token, int64_t first, int64_t end) {
  constexpr int kVectors = kTokens == 1 ? 8 : 4;
  for (; first + kVectors * kLanes <= end; first += kVectors * kLanes) {
    multiply_tile<kTokens, kVectors>(p, token, first);
  }
  for (; first + kLanes <= end; first += kLanes) {
    multiply_tile<kTokens, 1>(p, token, first);
  }
  for (; first < end; ++first) {
    for (int t = 0; t < kTokens; ++t) {
      multiply_one(p, token + t, first);
    }
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
