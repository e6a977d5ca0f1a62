// One matrix, and a dense feed-forward, which is cut as the sparse one is (moe_pass.h): a task makes one group of the last
// matrix's inputs at once, from 32 rows of gate and up, so that what lies between the matrices is never stored in floats.

#include "row_matmul.h"

#include <algorithm>

#include "row_work.h"

namespace lfm2 {
namespace {

constexpr int64_t kPassTokens = 1024;  // bounds the scratch memory

struct FeedForwardScratch {
  SharedInput x;
  RowActivations inner;
};

FeedForwardScratch take_feed_forward(Arena& arena, const FeedForwardProblem& problem) {
  const int64_t tokens = std::min(problem.tokens, kPassTokens);
  FeedForwardScratch found;
  found.x.take(arena, tokens, problem.gate);
  found.x.take(arena, tokens, problem.up);
  found.inner = take_activations(arena, tokens, problem.down);
  return found;
}

SharedInput take_input(Arena& arena, const MatMulProblem* problems, int count) {
  SharedInput found;
  for (int i = 0; i < count; ++i) {
    found.take(arena, problems[i].tokens, problems[i].w);
  }
  return found;
}

// One group of inner inputs of all tokens.
void gate_up(const FeedForwardProblem& problem, const RowKernels& kernels, const SharedInput& x,
             const RowActivations& inner, int64_t group) {
  const int64_t count = inner.tokens * kGroupInputs;  // of kPassTokens at most
  auto* gate = static_cast<float*>(thread_scratch(Use::kGateUp, 2 * count * static_cast<int64_t>(sizeof(float))));
  float* up = gate + count;
  multiply(kernels, problem.gate.part(group * kGroupInputs, kGroupInputs), x.of(problem.gate), gate, kGroupInputs);
  multiply(kernels, problem.up.part(group * kGroupInputs, kGroupInputs), x.of(problem.up), up, kGroupInputs);
  for (int64_t token = 0; token < inner.tokens; ++token) {
    kernels.swiglu(gate + token * kGroupInputs, up + token * kGroupInputs, 1, inner, group, token);
  }
}

void some_rows(const MatMulProblem& problem, const RowKernels& kernels, const RowActivations& x, int64_t first,
               int64_t count) {
  const RowMatrix& w = problem.w;
  multiply(kernels, w.part(first, count), x, problem.out + first, w.rows);
  if (problem.bias != nullptr) {
    for (int64_t token = 0; token < problem.tokens; ++token) {
      kernels.accumulate(1.0f, problem.bias + first, problem.out + token * w.rows + first, count);
    }
  }
}

}  // namespace

size_t matmuls_scratch_bytes(const MatMulProblem* problems, int count) {
  Arena arena(nullptr);
  take_input(arena, problems, count);
  return arena.used();
}

void run_matmul(const MatMulProblem& problem, const RowKernels& kernels, const ThreadPool& pool, void* scratch) {
  run_matmuls(&problem, 1, kernels, pool, scratch);
}

void run_matmuls(const MatMulProblem* problems, int count, const RowKernels& kernels, const ThreadPool& pool,
                 void* scratch) {
  Arena arena(scratch);
  SharedInput x = take_input(arena, problems, count);
  x.quantize(kernels, pool, problems->in, problems->w.columns);
  int64_t all_rows = 0;
  bool takes_block = false;
  for (int i = 0; i < count; ++i) {
    all_rows += problems[i].w.rows;
    takes_block |= kernels.takes_block(problems->tokens, problems[i].w.has_small_groups());
  }
  const int64_t rows = rows_of_a_task(all_rows, takes_block, pool);
  int64_t tasks = 0;
  for (int i = 0; i < count; ++i) {
    tasks += ceil_div(problems[i].w.rows, rows);
  }
  share_out(pool, tasks, [&](int64_t task) {
    const MatMulProblem* problem = problems;
    for (int64_t its = 0; task >= (its = ceil_div(problem->w.rows, rows)); ++problem) {
      task -= its;
    }
    some_rows(*problem, kernels, x.of(problem->w), task * rows, std::min(rows, problem->w.rows - task * rows));
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
    SharedInput x = all.x.first(tokens);
    x.quantize(kernels, pool, problem.in.from(first, width), width);
    RowActivations inner = all.inner.part(0, tokens);
    inner.shifted = kernels.takes_shifted(tokens, inner.small_groups);
    share_out(pool, groups, [&](int64_t group) { gate_up(problem, kernels, x, inner, group); });
    const int64_t rows = rows_of_a_task(width, kernels.takes_block(tokens, inner.small_groups), pool);
    share_out(pool, ceil_div(width, rows), [&](int64_t task) {
      const int64_t row = task * rows;
      float* out = problem.out + first * width + row;
      multiply(kernels, problem.down.part(row, std::min(rows, width - row)), inner, out, width);
    });
  }
}

}  // namespace lfm2
