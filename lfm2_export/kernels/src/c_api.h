// A C interface to the operators on quantized weights, without a runtime: for tests, benchmarks and other hosts.
//
// Every function returns 0, or 1 for kernels that are unknown here, 2 for what does not fit (lfm2_last_fault says what), 3
// for no memory. `kernels` may be null: those that a program would take. `threads`: 1 to 1024.

#pragma once

#include <cstdint>

#define LFM2_EXPORT extern "C" __attribute__((visibility("default")))

// `count` elements of the type that the function names; data null: an optional array that is left out.
struct Lfm2Array {
  const void* data;
  int64_t count;
};

// How matrices are stored (row_matrix.h).
struct Lfm2RowFormat {
  int bits;
  int half_scales;
  int64_t group;
};

// A matrix: codes in bytes, scales in floats or halves, zero points in bytes, or left out.
struct Lfm2RowWeights {
  Lfm2Array codes, scales, zero_points;
};

// What the calling thread's last 2 was about.
LFM2_EXPORT const char* lfm2_last_fault();

// The names of the kernels that this processor runs, fastest first; the list ends with null.
LFM2_EXPORT const char* const* lfm2_runnable_kernels();

// One sparse feed-forward on packed tiles; moe.h has the shapes. `expert_bias` may be left out.
LFM2_EXPORT int lfm2_moe_ffn(const char* kernels, int threads, Lfm2Array x, Lfm2Array router_logits,
                             Lfm2Array expert_bias, Lfm2Array gate_up, Lfm2Array down, int64_t tokens, int64_t width,
                             int64_t inner, int64_t experts, int64_t top_k, int normalize, float scale, Lfm2Array out);

// One matrix; row_matmul.h has the shapes. `bias` may be left out.
LFM2_EXPORT int lfm2_matmul_nbits(const char* kernels, int threads, Lfm2Array x, const Lfm2RowWeights* w,
                                  const Lfm2RowFormat* format, Lfm2Array bias, int64_t tokens, int64_t rows,
                                  int64_t columns, Lfm2Array out);

// One dense feed-forward, by matrices of one format.
LFM2_EXPORT int lfm2_feed_forward(const char* kernels, int threads, Lfm2Array x, const Lfm2RowWeights* gate,
                                  const Lfm2RowWeights* up, const Lfm2RowWeights* down, const Lfm2RowFormat* format,
                                  int64_t tokens, int64_t width, int64_t inner, Lfm2Array out);

// One sparse feed-forward, by matrices of one format. `expert_bias` may be left out.
LFM2_EXPORT int lfm2_sparse_moe_nbits(const char* kernels, int threads, Lfm2Array x, Lfm2Array router_logits,
                                      Lfm2Array expert_bias, const Lfm2RowWeights* gate_up, const Lfm2RowWeights* down,
                                      const Lfm2RowFormat* format, int64_t tokens, int64_t width, int64_t experts,
                                      int64_t top_k, int normalize, float scale, Lfm2Array out);
