// What the products on row_matrix.h share: room for activations, and one matrix times them on one thread.

#pragma once

#include "row_matrix.h"
#include "work.h"

namespace lfm2 {

// Room for `tokens` quantized inputs of w.
RowActivations take_activations(Arena& arena, int64_t tokens, const RowMatrix& w);

// An input that several matrices read: once for each kind of them that there is. The order of codes differs between 4 and 8
// bits, and groups of 16 have scales of their own.
struct SharedInput {
  static constexpr int kKinds = 4;
  RowActivations by_kind[kKinds] = {};  // without columns where no matrix is of the kind

  static int kind_of(const RowMatrix& w) { return 2 * w.has_small_groups() + (w.bits == 8); }
  RowActivations& of(const RowMatrix& w) { return by_kind[kind_of(w)]; }
  const RowActivations& of(const RowMatrix& w) const { return by_kind[kind_of(w)]; }

  // Makes room for w's; all matrices have one width.
  void take(Arena& arena, int64_t tokens, const RowMatrix& w);

  SharedInput first(int64_t tokens) const;
  // All tokens of `in`, by all workers; its sums are written.
  void quantize(const RowKernels& kernels, const ThreadPool& pool, const RowInput& in, int64_t columns);

 private:
  void quantize_token(const RowKernels& kernels, const RowInput& in, int64_t columns, int64_t token) const;
};

// y[token * stride + row] of all rows of w, on this thread.
void multiply(const RowKernels& kernels, const RowMatrix& w, const RowActivations& x, float* y, int64_t stride);

// Rows of a task, where so many are shared out among all workers, and perhaps rearranged.
int64_t rows_of_a_task(int64_t all, bool arranged, const ThreadPool& pool);

// Memory of this thread, kept from call to call; each `Use` has its own. 64-byte aligned. Throws std::bad_alloc.
enum class Use { kBlock, kGateUp, kAttention, kWindow, kNorm, kCount };
void* thread_scratch(Use use, int64_t bytes);

}  // namespace lfm2
