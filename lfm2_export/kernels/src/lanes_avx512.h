// What several of the AVX-512 kernels do with registers of 16 words.

#pragma once

#include <immintrin.h>

namespace lfm2 {
namespace {

#define LFM2_ALWAYS inline __attribute__((always_inline))

constexpr int kLanes = 16;

// 4 x 4 words in each quarter of four registers: word i of row r becomes word r of row i.
LFM2_ALWAYS void turn_quarters(__m512i& a, __m512i& b, __m512i& c, __m512i& d) {
  const __m512i t0 = _mm512_unpacklo_epi32(a, b), t1 = _mm512_unpackhi_epi32(a, b);
  const __m512i t2 = _mm512_unpacklo_epi32(c, d), t3 = _mm512_unpackhi_epi32(c, d);
  a = _mm512_unpacklo_epi64(t0, t2);
  b = _mm512_unpackhi_epi64(t0, t2);
  c = _mm512_unpacklo_epi64(t1, t3);
  d = _mm512_unpackhi_epi64(t1, t3);
}

// Rows to lanes: word i of row r becomes lane r of word i.
LFM2_ALWAYS void transpose(__m512i (&m)[kLanes]) {
  for (int i = 0; i < kLanes; i += 4) {
    turn_quarters(m[i], m[i + 1], m[i + 2], m[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {  // then the quarters
    const __m512i t0 = _mm512_shuffle_i32x4(m[j], m[j + 4], 0x88), t1 = _mm512_shuffle_i32x4(m[j], m[j + 4], 0xdd);
    const __m512i t2 = _mm512_shuffle_i32x4(m[j + 8], m[j + 12], 0x88);
    const __m512i t3 = _mm512_shuffle_i32x4(m[j + 8], m[j + 12], 0xdd);
    m[j] = _mm512_shuffle_i32x4(t0, t2, 0x88);
    m[j + 4] = _mm512_shuffle_i32x4(t1, t3, 0x88);
    m[j + 8] = _mm512_shuffle_i32x4(t0, t2, 0xdd);
    m[j + 12] = _mm512_shuffle_i32x4(t1, t3, 0xdd);
  }
}

// e^x for x <= 0, as exp_of_negative in elementwise.h; 0 is not reached, e^-87 is the least. NaN stays NaN: of two
// operands of which one is NaN, max returns the second.
LFM2_ALWAYS __m512 exp_lanes(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
  __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693359375f), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  constexpr float kPolynomial[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                   5.0000001201e-1f};
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (const float coefficient : kPolynomial) {
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(coefficient));
  }
  return _mm512_scalef_ps(_mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f)), n);
}

}  // namespace
}  // namespace lfm2
