// One matrix, and a dense feed-forward, which is cut as the sparse one is (moe_pass.h): a task makes one group of the last
// matrix's inputs at once, from 32 rows of gate and up, so that what lies between the matrices is never stored in floats.

#include "row_matmul.h"

#include <algorithm>

#include "row_work.h"

namespace lfm2 {
namespace {

constexpr int64_t kPassTokens = 1024;  // bounds the scratch memory

struct FeedForwardScratch {
  RowActivations x, inner;
};

FeedForwardScratch take_feed_forward(Arena& arena, const FeedForwardProblem& problem) {
  const int64_t tokens = std::min(problem.tokens, kPassTokens);
  return {take_activations(arena, tokens, problem.gate), take_activations(arena, tokens, problem.down)};
}

// One group of inner inputs of all tokens.
void gate_up(const FeedForwardProblem& problem, const RowKernels& kernels, const RowActivations& x,
             const RowActivations& inner, int64_t group) {
  const size_t count = x.tokens * kGroupInputs;
  auto* gate = static_cast<float*>(thread_scratch(Use::kGateUp, 2 * count * sizeof(float)));
  float* up = gate + count;
  multiply(kernels, problem.gate.part(group * kGroupInputs, kGroupInputs), x, gate, kGroupInputs);
  multiply(kernels, problem.up.part(group * kGroupInputs, kGroupInputs), x, up, kGroupInputs);
  for (int64_t token = 0; token < x.tokens; ++token) {
    kernels.swiglu(gate + token * kGroupInputs, up + token * kGroupInputs, 1, inner, group, token);
  }
}

}  // namespace

size_t matmul_scratch_bytes(const MatMulProblem& problem) {
  Arena arena(nullptr);
  take_activations(arena, problem.tokens, problem.w);
  return arena.used();
}

void run_matmul(const MatMulProblem& problem, const RowKernels& kernels, const ThreadPool& pool, void* scratch) {
  Arena arena(scratch);
  const RowMatrix& w = problem.w;
  RowActivations x = take_activations(arena, problem.tokens, w);
  x.shifted = is_worth_arranging(kernels, problem.tokens);
  quantize_all(kernels, pool, problem.x, w.columns, x);
  const int64_t rows = rows_of_a_task(w, x, pool);
  share_out(pool, ceil_div(w.rows, rows), [&](int64_t task) {
    const int64_t first = task * rows, count = std::min(rows, w.rows - first);
    multiply(kernels, w.part(first, count), x, problem.out + first, w.rows);
    if (problem.bias != nullptr) {
      for (int64_t token = 0; token < problem.tokens; ++token) {
        kernels.accumulate(1.0f, problem.bias + first, problem.out + token * w.rows + first, count);
      }
    }
  });
}

size_t feed_forward_scratch_bytes(const FeedForwardProblem& problem) {
  Arena arena(nullptr);
  take_feed_forward(arena, problem);
  return arena.used();
}

void run_feed_forward(const FeedForwardProblem& problem, const RowKernels& kernels, const ThreadPool& pool,
                      void* scratch) {
  Arena arena(scratch);
  const FeedForwardScratch all = take_feed_forward(arena, problem);
  const int64_t width = problem.gate.columns, groups = problem.gate.rows / kGroupInputs;
  for (int64_t first = 0; first < problem.tokens; first += kPassTokens) {
    const int64_t tokens = std::min(kPassTokens, problem.tokens - first);
    RowActivations x = all.x.part(0, tokens), inner = all.inner.part(0, tokens);
    x.shifted = inner.shifted = is_worth_arranging(kernels, tokens);
    quantize_all(kernels, pool, problem.x + first * width, width, x);
    share_out(pool, groups, [&](int64_t group) { gate_up(problem, kernels, x, inner, group); });
    const int64_t rows = rows_of_a_task(problem.down, inner, pool);
    share_out(pool, ceil_div(width, rows), [&](int64_t task) {
      const int64_t row = task * rows;
      float* out = problem.out + first * width + row;
      multiply(kernels, problem.down.part(row, std::min(rows, width - row)), inner, out, width);
    });
  }
}

}  // namespace lfm2
