// Stands before the compiler's header of this name, and brings the instructions of AVX-512 and AVX-VNNI that the
// kernels use as functions that need no more than AVX2: so those kernels are tested where no processor has them. A
// register of 64 bytes is two of 32.
//
// Inside namespace lfm2 these functions hide the compiler's, whose names they have. An instruction that is not here is
// an error there: the compiler's own does not take these registers, or wants its set to be enabled.
//
// What they compute is Intel's documentation of each instruction; where that leaves an order open, GCC 12's header.

#pragma once

// Defined by hand, so that the kernels take their way; to the compiler's header they would say that the set is enabled.
#pragma push_macro("__AVX512F__")
#pragma push_macro("__AVXVNNI__")
#undef __AVX512F__
#undef __AVXVNNI__
#include_next <immintrin.h>
#pragma pop_macro("__AVXVNNI__")
#pragma pop_macro("__AVX512F__")

#include <cmath>
#include <cstdint>
#include <cstring>

// Some compilers have macros for what takes an immediate operand.
#undef _mm256_dpbusd_avx_epi32
#undef _mm512_cmp_ps_mask
#undef _mm512_dpbusd_epi32
#undef _mm512_roundscale_ps
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_i32x4

#define LFM2_EMULATED inline __attribute__((always_inline))

namespace lfm2 {
namespace {

// To each sum the products of its 4 bytes, which are unsigned in the first operand and signed in the second: at most
// 255 * -128, which 16 bits hold, but not two of them.
LFM2_EMULATED __m256i _mm256_dpbusd_avx_epi32(__m256i sum, __m256i bytes, __m256i signed_bytes) {
  const __m256i even = _mm256_and_si256(bytes, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(bytes, 8);
  const __m256i signed_even = _mm256_srai_epi16(_mm256_slli_epi16(signed_bytes, 8), 8);
  const __m256i signed_odd = _mm256_srai_epi16(signed_bytes, 8);
  const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(even, signed_even), _mm256_madd_epi16(odd, signed_odd));
  return _mm256_add_epi32(sum, products);
}

#if defined(__AVX512F__)

// As the compiler's: what lies in memory under another type may be read through them.
struct __attribute__((may_alias, aligned(64))) __m512 {
  __m256 low, high;
};
struct __attribute__((may_alias, aligned(64))) __m512i {
  __m256i low, high;
};

// What is done lane by lane, or within blocks of 16 bytes.
#define LFM2_OF_ONE(to, from, name) \
  LFM2_EMULATED to _mm512_##name(from x) { return {_mm256_##name(x.low), _mm256_##name(x.high)}; }
#define LFM2_OF_TWO(type, name)                                          \
  LFM2_EMULATED type _mm512_##name(type a, type b) {                     \
    return {_mm256_##name(a.low, b.low), _mm256_##name(a.high, b.high)}; \
  }
#define LFM2_OF_THREE(type, name)                                                      \
  LFM2_EMULATED type _mm512_##name(type a, type b, type c) {                           \
    return {_mm256_##name(a.low, b.low, c.low), _mm256_##name(a.high, b.high, c.high)}; \
  }

LFM2_OF_ONE(__m512, __m512i, cvtepi32_ps)
LFM2_OF_ONE(__m512i, __m512, cvtps_epi32)
LFM2_OF_TWO(__m512, add_ps)
LFM2_OF_TWO(__m512, sub_ps)
LFM2_OF_TWO(__m512, mul_ps)
LFM2_OF_TWO(__m512, div_ps)
LFM2_OF_TWO(__m512, max_ps)
LFM2_OF_THREE(__m512, fmadd_ps)
LFM2_OF_THREE(__m512, fnmadd_ps)
LFM2_OF_TWO(__m512i, add_epi32)
LFM2_OF_TWO(__m512i, add_epi8)
LFM2_OF_TWO(__m512i, sub_epi8)
LFM2_OF_TWO(__m512i, sub_epi32)
LFM2_OF_TWO(__m512i, max_epi32)
LFM2_OF_TWO(__m512i, mullo_epi32)
LFM2_OF_TWO(__m512i, srlv_epi32)
LFM2_OF_TWO(__m512i, unpacklo_epi32)
LFM2_OF_TWO(__m512i, unpackhi_epi32)
LFM2_OF_TWO(__m512i, unpacklo_epi64)
LFM2_OF_TWO(__m512i, unpackhi_epi64)

#undef LFM2_OF_ONE
#undef LFM2_OF_TWO
#undef LFM2_OF_THREE

LFM2_EMULATED __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i bytes, __m512i signed_bytes) {
  return {_mm256_dpbusd_avx_epi32(sum.low, bytes.low, signed_bytes.low),
          _mm256_dpbusd_avx_epi32(sum.high, bytes.high, signed_bytes.high)};
}
LFM2_EMULATED __m512i _mm512_and_si512(__m512i a, __m512i b) {
  return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)};
}
LFM2_EMULATED __m512i _mm512_xor_si512(__m512i a, __m512i b) {
  return {_mm256_xor_si256(a.low, b.low), _mm256_xor_si256(a.high, b.high)};
}
LFM2_EMULATED __m512i _mm512_srli_epi16(__m512i x, unsigned count) {
  return {_mm256_srli_epi16(x.low, static_cast<int>(count)), _mm256_srli_epi16(x.high, static_cast<int>(count))};
}
LFM2_EMULATED __m512i _mm512_slli_epi32(__m512i x, unsigned count) {
  return {_mm256_slli_epi32(x.low, static_cast<int>(count)), _mm256_slli_epi32(x.high, static_cast<int>(count))};
}

LFM2_EMULATED __m512 _mm512_castsi512_ps(__m512i x) {
  return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)};
}
LFM2_EMULATED __m512i _mm512_castps_si512(__m512 x) {
  return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)};
}
LFM2_EMULATED __m128 _mm512_castps512_ps128(__m512 x) { return _mm256_castps256_ps128(x.low); }

LFM2_EMULATED __m512 _mm512_setzero_ps() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
LFM2_EMULATED __m512i _mm512_setzero_si512() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
LFM2_EMULATED __m512 _mm512_set1_ps(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
LFM2_EMULATED __m512i _mm512_set1_epi32(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
LFM2_EMULATED __m512i _mm512_set1_epi8(char x) { return {_mm256_set1_epi8(x), _mm256_set1_epi8(x)}; }
LFM2_EMULATED __m512i _mm512_set_epi32(int x15, int x14, int x13, int x12, int x11, int x10, int x9, int x8,  //
                                       int x7, int x6, int x5, int x4, int x3, int x2, int x1, int x0) {
  return {_mm256_set_epi32(x7, x6, x5, x4, x3, x2, x1, x0), _mm256_set_epi32(x15, x14, x13, x12, x11, x10, x9, x8)};
}

LFM2_EMULATED __m512 _mm512_loadu_ps(const void* at) {
  const auto* from = static_cast<const float*>(at);
  return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
LFM2_EMULATED __m512i _mm512_loadu_si512(const void* at) {
  const auto* from = static_cast<const __m256i*>(at);
  return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}
LFM2_EMULATED __m512i _mm512_load_si512(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 64 != 0) {
    __builtin_trap();
  }
  return _mm512_loadu_si512(at);
}
LFM2_EMULATED void _mm512_storeu_ps(void* at, __m512 x) {
  _mm256_storeu_ps(static_cast<float*>(at), x.low);
  _mm256_storeu_ps(static_cast<float*>(at) + 8, x.high);
}

// Lanes that are 0 or -1, as AVX2 has its masks. Nor does it touch what they leave out.
struct MaskLanes {
  __m256i low, high;
};
LFM2_EMULATED __m256i lanes_of_mask(int mask) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask), bits), bits);
}
LFM2_EMULATED MaskLanes lanes_of(__mmask16 mask) { return {lanes_of_mask(mask), lanes_of_mask(mask >> 8)}; }
LFM2_EMULATED __mmask16 mask_of_lanes(__m256 low, __m256 high) {
  return static_cast<__mmask16>(_mm256_movemask_ps(low) | _mm256_movemask_ps(high) << 8);
}

LFM2_EMULATED __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* at) {
  const auto* from = static_cast<const float*>(at);
  const MaskLanes lanes = lanes_of(mask);
  return {_mm256_maskload_ps(from, lanes.low), _mm256_maskload_ps(from + 8, lanes.high)};
}
LFM2_EMULATED void _mm512_mask_storeu_ps(void* at, __mmask16 mask, __m512 x) {
  const MaskLanes lanes = lanes_of(mask);
  _mm256_maskstore_ps(static_cast<float*>(at), lanes.low, x.low);
  _mm256_maskstore_ps(static_cast<float*>(at) + 8, lanes.high, x.high);
}
LFM2_EMULATED __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 x) {
  const MaskLanes lanes = lanes_of(mask);
  return {_mm256_and_ps(_mm256_castsi256_ps(lanes.low), x.low), _mm256_and_ps(_mm256_castsi256_ps(lanes.high), x.high)};
}
LFM2_EMULATED __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) {  // b where it is set
  const MaskLanes lanes = lanes_of(mask);
  return {_mm256_blendv_ps(a.low, b.low, _mm256_castsi256_ps(lanes.low)),
          _mm256_blendv_ps(a.high, b.high, _mm256_castsi256_ps(lanes.high))};
}

// `kSize` bytes for each bit.
template <int kSize, typename Register>
LFM2_EMULATED Register load_masked(uint64_t mask, const void* at) {
  alignas(64) char bytes[sizeof(Register)] = {};
  for (size_t i = 0; i < sizeof bytes; i += kSize) {
    if (mask >> (i / kSize) & 1) {
      std::memcpy(bytes + i, static_cast<const char*>(at) + i, kSize);
    }
  }
  Register found;
  std::memcpy(&found, bytes, sizeof found);
  return found;
}
LFM2_EMULATED __m512i _mm512_maskz_loadu_epi8(__mmask64 mask, const void* at) {
  return load_masked<1, __m512i>(mask, at);
}
LFM2_EMULATED __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* at) {
  return load_masked<2, __m256i>(mask, at);
}
LFM2_EMULATED __m128i _mm_maskz_loadu_epi8(__mmask16 mask, const void* at) {
  return load_masked<1, __m128i>(mask, at);
}

LFM2_EMULATED __mmask16 _mm512_test_epi32_mask(__m512i a, __m512i b) {  // where they have a bit in common
  const __m512i both = _mm512_and_si512(a, b);
  const __m256i zero = _mm256_setzero_si256();
  return static_cast<__mmask16>(~mask_of_lanes(_mm256_castsi256_ps(_mm256_cmpeq_epi32(both.low, zero)),
                                               _mm256_castsi256_ps(_mm256_cmpeq_epi32(both.high, zero))));
}
LFM2_EMULATED __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int how) {
  if (how != _CMP_LT_OQ) {
    __builtin_trap();
  }
  return mask_of_lanes(_mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ));
}

LFM2_EMULATED __m512 _mm512_abs_ps(__m512 x) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.low, magnitude), _mm256_and_ps(x.high, magnitude)};
}
LFM2_EMULATED __m512 _mm512_roundscale_ps(__m512 x, int how) {  // 0: to a whole number, to even where two are as near
  if (how != 0) {
    __builtin_trap();
  }
  return {_mm256_round_ps(x.low, _MM_FROUND_TO_NEAREST_INT), _mm256_round_ps(x.high, _MM_FROUND_TO_NEAREST_INT)};
}

// x * 2^floor(n), rounded once.
inline float scaled(float x, float n) {
  if (std::isnan(x) || std::isnan(n)) {
    return std::isnan(x) ? x : n;
  }
  if (std::isinf(n) && (n > 0 ? x == 0 : std::isinf(x))) {
    return NAN;
  }
  return std::ldexp(x, static_cast<int>(std::floor(std::fmin(std::fmax(n, -1000.0f), 1000.0f))));
}
LFM2_EMULATED __m512 _mm512_scalef_ps(__m512 x, __m512 n) {
  alignas(64) float lanes[16], powers[16];
  _mm512_storeu_ps(lanes, x);
  _mm512_storeu_ps(powers, n);
  for (int i = 0; i < 16; ++i) {
    lanes[i] = scaled(lanes[i], powers[i]);
  }
  return _mm512_loadu_ps(lanes);
}

LFM2_EMULATED __m512i _mm512_cvtepu8_epi32(__m128i x) {
  return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
LFM2_EMULATED __m128i _mm512_cvtepi32_epi8(__m512i x) {  // their last bytes
  const __m256i first = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i low = _mm256_shuffle_epi8(x.low, first), high = _mm256_shuffle_epi8(x.high, first);
  return _mm_unpacklo_epi64(_mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)),
                            _mm_unpacklo_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}
LFM2_EMULATED __m512 _mm512_cvtph_ps(__m256i x) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
}

// Lane i is x's lane index[i], of which 4 bits count; then, with 5 bits, one of a's or b's.
LFM2_EMULATED __m256 permuted(__m256i index, __m512 x) {
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(x.low, index), _mm256_permutevar8x32_ps(x.high, index),
                          _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
LFM2_EMULATED __m512 _mm512_permutexvar_ps(__m512i index, __m512 x) {
  return {permuted(index.low, x), permuted(index.high, x)};
}
LFM2_EMULATED __m256 permuted(__m256i index, __m512 a, __m512 b) {
  return _mm256_blendv_ps(permuted(index, a), permuted(index, b), _mm256_castsi256_ps(_mm256_slli_epi32(index, 27)));
}
LFM2_EMULATED __m512 _mm512_permutex2var_ps(__m512 a, __m512i index, __m512 b) {
  return {permuted(index.low, a, b), permuted(index.high, a, b)};
}

// Of the blocks of 16 bytes two of a, then two of b: 2 bits say which.
LFM2_EMULATED __m128i block_of(__m512i x, int index) {
  const __m256i half = index & 2 ? x.high : x.low;
  return index & 1 ? _mm256_extracti128_si256(half, 1) : _mm256_castsi256_si128(half);
}
LFM2_EMULATED __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int order) {
  return {_mm256_setr_m128i(block_of(a, order & 3), block_of(a, order >> 2 & 3)),
          _mm256_setr_m128i(block_of(b, order >> 4 & 3), block_of(b, order >> 6 & 3))};
}
LFM2_EMULATED __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int order) {
  return _mm512_castsi512_ps(_mm512_shuffle_i32x4(_mm512_castps_si512(a), _mm512_castps_si512(b), order));
}

// The upper half with the lower one, as long as there are two.
LFM2_EMULATED float _mm512_reduce_add_ps(__m512 x) {
  const __m256 eight = _mm256_add_ps(x.high, x.low);
  const __m128 four = _mm_add_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
LFM2_EMULATED float _mm512_reduce_max_ps(__m512 x) {
  const __m256 eight = _mm256_max_ps(x.high, x.low);
  const __m128 four = _mm_max_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
LFM2_EMULATED int _mm512_reduce_add_epi32(__m512i x) {
  const __m256i eight = _mm256_add_epi32(x.high, x.low);
  const __m128i four = _mm_add_epi32(_mm256_extracti128_si256(eight, 1), _mm256_castsi256_si128(eight));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
LFM2_EMULATED int _mm512_reduce_max_epi32(__m512i x) {
  const __m256i eight = _mm256_max_epi32(x.high, x.low);
  const __m128i four = _mm_max_epi32(_mm256_extracti128_si256(eight, 1), _mm256_castsi256_si128(eight));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

#endif

}  // namespace
}  // namespace lfm2

#undef LFM2_EMULATED
