// One vocabulary for the kernels that are written once and compiled for every instruction set: registers of floats, of
// whole numbers and of bytes, and what the kernels do with them. The compiler's flags say which set it is.
//
// A register has kLanes lanes of 32 bits, in kBlocks blocks of 4. Results of one set are the same bits on every processor
// that has it; between sets sums differ in their order only, because they have as many chains as a register has blocks.

#pragma once

#include <cstdint>
#include <cstring>

#define LFM2_ALWAYS inline __attribute__((always_inline))

#if defined(__AVX512F__)
#include "lanes_avx512.h"
#elif defined(__AVX2__)
#include "lanes_avx2.h"
#else
#include "lanes_neon.h"
#endif

namespace lfm2 {
namespace {

constexpr int kBlocks = kLanes / 4;
constexpr int kBytes = 4 * kLanes;

// `bytes` after `at`, which may lie behind a tensor's end: harmless.
LFM2_ALWAYS void fetch_ahead(const void* at, int64_t bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(at) + bytes));
}

// Lane i is `first` + i / lanes_per_value * step.
LFM2_ALWAYS Order order_of(int first, int lanes_per_value, int step = 1) {
  alignas(64) int32_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    lanes[i] = first + i / lanes_per_value * step;
  }
  return load_order(lanes);
}

LFM2_ALWAYS void turn_blocks(Floats (&rows)[4]) {
  Ints m[4];
  for (int r = 0; r < 4; ++r) {
    m[r] = as_ints(rows[r]);
  }
  turn_blocks(m[0], m[1], m[2], m[3]);
  for (int r = 0; r < 4; ++r) {
    rows[r] = as_floats(m[r]);
  }
}

// e^x for x <= 0, as exp_of_negative in elementwise.h; 0 is not reached, e^-87 is the least. NaN stays NaN.
LFM2_ALWAYS Floats exp_lanes(Floats x) {
  x = max_or_second(broadcast(-87.0f), x);
  const Floats n = round_to_whole(mul(x, broadcast(1.44269504088896341f)));
  Floats r = fmadd(n, broadcast(-0.693359375f), x);
  r = fmadd(n, broadcast(2.12194440e-4f), r);
  constexpr float kPolynomial[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                   5.0000001201e-1f};
  Floats p = broadcast(1.9875691500e-4f);
  for (const float coefficient : kPolynomial) {
    p = fmadd(p, r, broadcast(coefficient));
  }
  return times_power_of_two(add(fmadd(p, mul(r, r), r), broadcast(1.0f)), n);
}

}  // namespace
}  // namespace lfm2
