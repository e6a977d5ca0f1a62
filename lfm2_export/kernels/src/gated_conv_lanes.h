// gated_conv_loops.h in lanes.h's words, bit for bit, with each output in a register until it is whole.

#pragma once

#include "gated_conv.h"
#include "lanes.h"

namespace lfm2 {
namespace {

inline void gate_row(const GatedConvProblem& p, int64_t row, int64_t token, float* to) {
  const int64_t at = row * p.tokens + token;
  const float *b = p.projected + at * 3 * p.width, *x = b + 2 * p.width;
  const Floats attended = broadcast(p.attended[at]);
  int64_t i = 0;
  for (; i + kLanes <= p.width; i += kLanes) {
    store(to + i, mul(mul(load(b + i), load(x + i)), attended));
  }
  for (; i < p.width; ++i) {
    to[i] = b[i] * x[i] * p.attended[at];
  }
}

inline void convolve_row(const GatedConvProblem& p, int64_t row, int64_t token, const float* window) {
  const int64_t at = row * p.tokens + token;
  const float* c = p.projected + (at * 3 + 1) * p.width;
  float* out = p.out + at * p.width;
  int64_t i = 0;
  for (; i + 4 * kLanes <= p.width; i += 4 * kLanes) {
    Floats total[4];
    for (int v = 0; v < 4; ++v) {
      total[v] = p.bias == nullptr ? broadcast(0.0f) : load(p.bias + i + v * kLanes);
    }
    for (int64_t tap = 0; tap < p.taps; ++tap) {
      const float *weight = p.weight + tap * p.width + i, *input = window + tap * p.width + i;
      for (int v = 0; v < 4; ++v) {
        total[v] = fmadd(load(weight + v * kLanes), load(input + v * kLanes), total[v]);
      }
    }
    for (int v = 0; v < 4; ++v) {
      store(out + i + v * kLanes, mul(total[v], load(c + i + v * kLanes)));
    }
  }
  for (; i < p.width; ++i) {
    float total = p.bias == nullptr ? 0.0f : p.bias[i];
    for (int64_t tap = 0; tap < p.taps; ++tap) {
      total = __builtin_fmaf(p.weight[tap * p.width + i], window[tap * p.width + i], total);
    }
    out[i] = total * c[i];
  }
}

}  // namespace
}  // namespace lfm2
