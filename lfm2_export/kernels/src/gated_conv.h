// LFM2's short convolution between its two projections: C * conv(B * x), causal, with the state that it leaves.

#pragma once

#include <cstdint>

#include "work.h"

namespace lfm2 {

struct GatedConvProblem {
  const float* projected;  // [batch, tokens, 3, width]: B, C, x
  const float* weight;     // [taps][width], the oldest input's first
  const float* bias;       // [width] or null
  const float* state;      // [batch, taps - 1, width]: the gated inputs before the first token
  const float* attended;   // [batch, tokens]: what a gated input is multiplied with, 0 for padding
  const int64_t* rows;     // [batch, taps - 1]: which of (state, gated inputs) are the new state
  float* out;              // [batch, tokens, width]
  float* present;          // [batch, taps - 1, width]
  float* window;           // [batch, taps - 1 + tokens, width], or null: all of (state, gated inputs)
  int64_t batch, tokens, width, taps;
};

struct ConvKernels {
  // One gated input: to[width] = B * x * attended.
  void (*gate)(const GatedConvProblem& problem, int64_t row, int64_t token, float* to);

  // One output from its `taps` gated inputs, which lie one behind the other.
  void (*convolve)(const GatedConvProblem& problem, int64_t row, int64_t token, const float* window);
};

// The weight of a convolution [width, taps] as the kernels read it: [taps, width].
void turn_taps(const float* weight, int64_t width, int64_t taps, float* to);

// Row indices must have been checked. Throws std::bad_alloc.
void run_gated_conv(const GatedConvProblem& problem, const ConvKernels& kernels, const ThreadPool& pool);

}  // namespace lfm2
