// A C interface to the same code, without a runtime: for tests, benchmarks and other hosts.

#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "layout.h"
#include "moe.h"
#include "row_matmul.h"

#define LFM2_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Result { kDone, kUnknownKernels, kWrongSizes, kNoMemory };

void run_threads(const void*, int workers, void (*task)(void*, int), void* context) {
  std::vector<std::thread> others;
  for (int worker = 1; worker < workers; ++worker) {
    others.emplace_back(task, context, worker);
  }
  task(context, 0);
  for (std::thread& other : others) {
    other.join();
  }
}

// run(scratch) with so much scratch memory.
template <typename Run>
int with_scratch(size_t bytes, const Run& run) {
  const std::unique_ptr<void, void (*)(void*)> scratch(std::aligned_alloc(lfm2::kAlignment, bytes), std::free);
  if (scratch == nullptr) {
    return kNoMemory;
  }
  try {
    run(scratch.get());
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return kDone;
}

// Null: those that a program would take.
const lfm2::RowKernels* row_kernels(const char* name) {
  return name == nullptr ? &lfm2::best_row_kernels() : lfm2::row_kernels_by_name(name);
}

bool fits(const lfm2::RowMatrix& w) {
  const bool known_group = w.group == 32 || w.group == 64 || w.group == 128 || w.group == 256;
  const bool known_format = w.bits == 4 || (w.bits == 8 && w.zero_points == nullptr);
  return known_group && known_format && w.rows > 0 && w.columns > 0 && w.columns % w.group == 0;
}

}  // namespace

// The names of the kernels that this processor runs, fastest first; the list ends with null.
LFM2_EXPORT const char* const* lfm2_runnable_kernels() {
  return lfm2::runnable_kernels();
}

// The same of the kernels for ONNX Runtime's weights.
LFM2_EXPORT const char* const* lfm2_runnable_row_kernels() {
  return lfm2::runnable_row_kernels();
}

// One sparse feed-forward on plain buffers (see moe.h for their shapes); `expert_bias` may be null. Returns 0, or 1 for
// kernels that are unknown here, 2 for sizes that do not fit the layout, 3 for no memory. So do the others below.
LFM2_EXPORT int lfm2_moe_ffn(const char* kernels_name, int threads, const float* x, const float* router_logits,
                             const float* expert_bias, const uint8_t* gate_up, const uint8_t* down, int64_t tokens,
                             int64_t width, int64_t inner, int64_t experts, int64_t top_k, int normalize, float scale,
                             float* out) {
  const lfm2::Kernels* kernels = lfm2::kernels_by_name(kernels_name);
  if (kernels == nullptr) {
    return kUnknownKernels;
  }
  if (width % lfm2::kGroup != 0 || inner % lfm2::kGroup != 0 || top_k < 1 || top_k > experts) {
    return kWrongSizes;
  }
  const lfm2::MoeProblem problem = {
      x, {router_logits, expert_bias, experts, top_k, normalize != 0, scale}, gate_up, down, tokens, width, inner, out};
  return with_scratch(lfm2::moe_scratch_bytes(problem), [&](void* scratch) {
    lfm2::run_moe(problem, *kernels, {threads, run_threads, nullptr}, scratch);
  });
}

// One matrix on plain buffers: row_matmul.h has the shapes. `zero_points` and `bias` may be null.
LFM2_EXPORT int lfm2_matmul_nbits(const char* kernels_name, int threads, const float* x, const uint8_t* codes,
                                  const void* scales, int half_scales, const uint8_t* zero_points, const float* bias,
                                  int64_t tokens, int64_t rows, int64_t columns, int bits, int64_t group, float* out) {
  const lfm2::RowKernels* kernels = row_kernels(kernels_name);
  if (kernels == nullptr) {
    return kUnknownKernels;
  }
  const lfm2::MatMulProblem problem = {
      x, {codes, scales, zero_points, rows, columns, group, bits, half_scales != 0}, bias, tokens, out};
  if (tokens < 1 || !fits(problem.w)) {
    return kWrongSizes;
  }
  return with_scratch(lfm2::matmul_scratch_bytes(problem), [&](void* scratch) {
    lfm2::run_matmul(problem, *kernels, {threads, run_threads, nullptr}, scratch);
  });
}

// What the matrices of a feed-forward have in common.
struct Lfm2RowFormat {
  int bits;
  int half_scales;
  int64_t group;
};

// One matrix of it; `zero_points` may be null.
struct Lfm2RowWeights {
  const uint8_t* codes;
  const void* scales;
  const uint8_t* zero_points;
};

namespace {

lfm2::RowMatrix matrix_of(const Lfm2RowWeights& weights, const Lfm2RowFormat& format, int64_t rows, int64_t columns) {
  return {weights.codes, weights.scales, weights.zero_points, rows,
          columns,       format.group,   format.bits,         format.half_scales != 0};
}

}  // namespace

// One dense feed-forward.
LFM2_EXPORT int lfm2_feed_forward(const char* kernels_name, int threads, const float* x, const Lfm2RowWeights* gate,
                                  const Lfm2RowWeights* up, const Lfm2RowWeights* down, const Lfm2RowFormat* format,
                                  int64_t tokens, int64_t width, int64_t inner, float* out) {
  const lfm2::RowKernels* kernels = row_kernels(kernels_name);
  if (kernels == nullptr) {
    return kUnknownKernels;
  }
  const lfm2::FeedForwardProblem problem = {x,
                                            matrix_of(*gate, *format, inner, width),
                                            matrix_of(*up, *format, inner, width),
                                            matrix_of(*down, *format, width, inner),
                                            tokens,
                                            out};
  if (tokens < 1 || !fits(problem.gate) || !fits(problem.up) || !fits(problem.down)) {
    return kWrongSizes;
  }
  return with_scratch(lfm2::feed_forward_scratch_bytes(problem), [&](void* scratch) {
    lfm2::run_feed_forward(problem, *kernels, {threads, run_threads, nullptr}, scratch);
  });
}

// One sparse feed-forward; `expert_bias` may be null.
LFM2_EXPORT int lfm2_sparse_moe_nbits(const char* kernels_name, int threads, const float* x,
                                      const float* router_logits, const float* expert_bias,
                                      const Lfm2RowWeights* gate_up, const Lfm2RowWeights* down,
                                      const Lfm2RowFormat* format, int64_t tokens, int64_t width, int64_t inner,
                                      int64_t experts, int64_t top_k, int normalize, float scale, float* out) {
  const lfm2::RowKernels* kernels = row_kernels(kernels_name);
  if (kernels == nullptr) {
    return kUnknownKernels;
  }
  const lfm2::RowMoeProblem problem = {x,
                                       {router_logits, expert_bias, experts, top_k, normalize != 0, scale},
                                       matrix_of(*gate_up, *format, experts * 2 * inner, width),
                                       matrix_of(*down, *format, experts * width, inner),
                                       tokens,
                                       out};
  if (tokens < 1 || top_k < 1 || top_k > experts || !fits(problem.gate_up) || !fits(problem.down)) {
    return kWrongSizes;
  }
  return with_scratch(lfm2::row_moe_scratch_bytes(problem), [&](void* scratch) {
    lfm2::run_row_moe(problem, *kernels, {threads, run_threads, nullptr}, scratch);
  });
}
