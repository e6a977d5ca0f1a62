// The products of a program that runs on row_matrix.h: one matrix, a dense feed-forward, and one layer's experts. Each
// needs scratch memory, 64-byte aligned, of the size that it names. Sizes must have been checked.

#pragma once

#include <cstddef>

#include "float_matmul.h"
#include "routing.h"
#include "row_matrix.h"
#include "work.h"

namespace lfm2 {

struct MatMulProblem {
  RowInput in;  // [tokens, w.columns]
  RowMatrix w;
  const float* bias;  // [w.rows] or null
  int64_t tokens;
  float* out;  // [tokens, w.rows]
};

// out = in w' + bias
void run_matmul(const MatMulProblem& problem, const RowKernels& kernels, const ThreadPool& pool, void* scratch);

size_t matmuls_scratch_bytes(const MatMulProblem* problems, int count);

// Several products of one input (the first one's), by matrices of one width: threads meet once for all of them.
void run_matmuls(const MatMulProblem* problems, int count, const RowKernels& kernels, const ThreadPool& pool,
                 void* scratch);

struct FeedForwardProblem {
  RowInput in;           // [tokens, width]
  RowMatrix gate, up;    // w1, w3 [inner, width]
  RowMatrix down;        // w2 [width, inner]
  int64_t tokens;
  float* out;  // [tokens, width]
};

size_t feed_forward_scratch_bytes(const FeedForwardProblem& problem);

// out = (silu(in w1') * in w3') w2'
void run_feed_forward(const FeedForwardProblem& problem, const RowKernels& kernels, const ThreadPool& pool,
                      void* scratch);

struct RowMoeProblem {
  RowInput in;  // [tokens, width]
  Routing routing;
  const float* router;  // [width, experts], of which the logits are made; null: routing has them, and there is no norm
  RowMatrix gate_up;  // [experts * 2 * inner, width]; of an expert's rows the even ones are w1's, the odd ones w3's
  RowMatrix down;     // [experts * width, inner]
  int64_t tokens;
  float* out;  // [tokens, width]

  int64_t width() const { return gate_up.columns; }
  int64_t inner() const { return down.columns; }
};

size_t row_moe_scratch_bytes(const RowMoeProblem& problem);

// The sparse feed-forward of moe.h, on such weights.
void run_row_moe(const RowMoeProblem& problem, const RowKernels& kernels, const FloatKernels& floats,
                 const ThreadPool& pool, void* scratch);

}  // namespace lfm2
