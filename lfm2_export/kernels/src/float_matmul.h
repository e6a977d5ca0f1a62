// A product by a matrix of floats: the router of a sparse layer, and layers that are not quantized. A result's bits do not
// depend on how many rows of x there are, as those of a general product of a library may.

#pragma once

#include <cstdint>

#include "work.h"

namespace lfm2 {

struct FloatMatMulProblem {
  const float* x;  // [tokens, inputs]
  const float* w;  // [inputs, outputs]
  int64_t tokens, inputs, outputs;
  float* out;  // [tokens, outputs]
};

struct FloatKernels {
  // Outputs first .. first+count-1 of some tokens: each the sum over inputs in their order.
  void (*multiply)(const FloatMatMulProblem& problem, int64_t token, int64_t tokens, int64_t first, int64_t count);
};

void run_float_matmul(const FloatMatMulProblem& problem, const FloatKernels& kernels, const ThreadPool& pool);

}  // namespace lfm2
