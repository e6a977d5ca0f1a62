#include "row_work.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

namespace lfm2 {
namespace {

constexpr int64_t kTasksPerWorker = 8;
constexpr int64_t kLeastRows = 16;  // of a task: less is not worth fetching one
constexpr int64_t kTogether = 4;    // rows that some kernels take at once

class Grown {
 public:
  void* at_least(int64_t bytes) {
    if (size_ < bytes) {
      size_ = 0;
      const int64_t rounded = round_up(bytes, kAlignment);
      memory_.reset(rounded == kTooMany ? nullptr : std::aligned_alloc(kAlignment, static_cast<size_t>(rounded)));
      if (memory_ == nullptr) {
        throw std::bad_alloc();
      }
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace

void* thread_scratch(Use use, int64_t bytes) {
  thread_local Grown grown[static_cast<int>(Use::kCount)];
  return grown[static_cast<int>(use)].at_least(bytes);
}

RowActivations take_activations(Arena& arena, int64_t tokens, const RowMatrix& w) {
  const int64_t padded = round_up(w.columns, kPadding);
  RowActivations found = {};
  found.groups = padded / (w.has_small_groups() ? kLeastGroup : kGroupInputs);
  found.codes = arena.take<int8_t>(times(tokens, padded));
  found.scales = arena.take<float>(times(tokens, found.groups));
  found.sums = arena.take<float>(times(tokens, found.groups));
  found.tokens = tokens;
  found.padded = padded;
  found.bits = w.bits;
  found.small_groups = w.has_small_groups();
  return found;
}

void SharedInput::take(Arena& arena, int64_t tokens, const RowMatrix& w) {
  RowActivations& its = of(w);
  if (its.padded == 0) {
    its = take_activations(arena, tokens, w);
  }
}

SharedInput SharedInput::first(int64_t tokens) const {
  SharedInput found = *this;
  for (RowActivations& its : found.by_kind) {
    its.tokens = tokens;
  }
  return found;
}

void SharedInput::quantize(const RowKernels& kernels, const ThreadPool& pool, const RowInput& in, int64_t columns) {
  int64_t tokens = 0;
  for (RowActivations& its : by_kind) {
    if (its.padded > 0) {
      its.shifted = kernels.takes_shifted(its.tokens, its.small_groups);
      tokens = its.tokens;
    }
  }
  const int64_t at_once = ceil_div(tokens, pool.workers * kTasksPerWorker);
  share_out(pool, ceil_div(tokens, at_once), [&](int64_t task) {
    for (int64_t token = task * at_once; token < std::min(tokens, (task + 1) * at_once); ++token) {
      quantize_token(kernels, in, columns, token);
    }
  });
}

void SharedInput::quantize_token(const RowKernels& kernels, const RowInput& in, int64_t columns, int64_t token) const {
  const float* row = in.x + token * columns;
  if (in.gamma != nullptr) {
    auto* normed = static_cast<float*>(thread_scratch(Use::kNorm, columns * static_cast<int64_t>(sizeof(float))));
    kernels.normalize(in, columns, token, normed);
    row = normed;
  }
  for (const RowActivations& its : by_kind) {
    if (its.padded > 0) {
      kernels.quantize(row, columns, its, token);
    }
  }
}

void multiply(const RowKernels& kernels, const RowMatrix& w, const RowActivations& x, float* y, int64_t stride) {
  if (!kernels.takes_block(x.tokens, x.small_groups)) {
    return kernels.dot(w, x, y, stride);
  }
  void* scratch = thread_scratch(Use::kBlock, block_scratch_bytes(w.columns, w.has_small_groups()));
  for (int64_t row = 0; row < w.rows; row += kBlockRows) {
    kernels.block(w.part(row, std::min<int64_t>(kBlockRows, w.rows - row)), x, y + row, stride, scratch);
  }
}

int64_t rows_of_a_task(int64_t all, bool arranged, const ThreadPool& pool) {
  if (arranged) {
    return kBlockRows;
  }
  const int64_t rows = ceil_div(all, pool.workers * kTasksPerWorker);
  return std::max(kLeastRows, ceil_div(rows, kTogether) * kTogether);
}

}  // namespace lfm2
