// lanes.h with AVX-512 and VNNI: 16 lanes.

#pragma once

#include <immintrin.h>

namespace lfm2 {
namespace {

constexpr int kLanes = 16;

using Floats = __m512;
using Ints = __m512i;
using Bytes = __m512i;
using Order = __m512i;
using Mask = __mmask16;

LFM2_ALWAYS Mask first_lanes(int64_t count) {
  return count >= kLanes ? 0xffff : static_cast<Mask>((1u << (count < 0 ? 0 : count)) - 1);
}

// Of lanes that are 0 or -1.
LFM2_ALWAYS Mask mask_of(const int32_t* at) {
  const __m512i lanes = _mm512_loadu_si512(at);
  return _mm512_test_epi32_mask(lanes, lanes);
}
LFM2_ALWAYS Mask both(Mask a, Mask b) { return a & b; }
LFM2_ALWAYS Mask without(Mask a, Mask b) { return a & static_cast<Mask>(~b); }
LFM2_ALWAYS bool has_any(Mask a) { return a != 0; }
LFM2_ALWAYS Floats select(Mask mask, Floats a, Floats b) { return _mm512_mask_blend_ps(mask, b, a); }
LFM2_ALWAYS Floats keep(Mask mask, Floats x) { return _mm512_maskz_mov_ps(mask, x); }

LFM2_ALWAYS Floats load(const float* at) { return _mm512_loadu_ps(at); }
LFM2_ALWAYS void store(float* at, Floats x) { _mm512_storeu_ps(at, x); }
LFM2_ALWAYS void store_first(float* at, Floats x, int64_t count) { _mm512_mask_storeu_ps(at, first_lanes(count), x); }
LFM2_ALWAYS Floats broadcast(float x) { return _mm512_set1_ps(x); }
LFM2_ALWAYS Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
LFM2_ALWAYS Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
LFM2_ALWAYS Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
LFM2_ALWAYS Floats fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }    // a * b + c
LFM2_ALWAYS Floats fnmadd(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
LFM2_ALWAYS Floats max_or_second(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // where one is NaN, b
LFM2_ALWAYS Floats round_to_whole(Floats x) { return _mm512_roundscale_ps(x, 0); }
LFM2_ALWAYS Floats times_power_of_two(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
LFM2_ALWAYS float greatest_of(Floats x) { return _mm512_reduce_max_ps(x); }
LFM2_ALWAYS float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
LFM2_ALWAYS Floats bytes_to_floats(const uint8_t* at) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
}
LFM2_ALWAYS Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
LFM2_ALWAYS Mask is_negative(Floats x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ); }  // of -0 not
LFM2_ALWAYS Ints magnitude_bits(Floats x) { return _mm512_castps_si512(_mm512_abs_ps(x)); }
LFM2_ALWAYS Ints to_nearest_ints(Floats x) { return _mm512_cvtps_epi32(x); }

// x[0], x[2], ...; the float behind the last of them is not read.
LFM2_ALWAYS Floats load_every_second(const float* x) {
  const __m512i order = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 14, 12, 10, 8, 6, 4, 2, 0);
  return _mm512_permutex2var_ps(_mm512_loadu_ps(x), order, _mm512_loadu_ps(x + kLanes - 1));
}
LFM2_ALWAYS Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }

// The first `count` lanes; the others are 0, and nothing behind `count` is read.
LFM2_ALWAYS Floats load_first(const void* at, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), at); }

// The same of IEEE halves.
LFM2_ALWAYS Floats load_halves_first(const void* at, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), at));
}

// The same of numbers of 4 bits, from number `first` (an even one where count > 1) on.
LFM2_ALWAYS Floats load_nibbles_first(const uint8_t* at, int64_t first, int64_t count) {
  const auto bytes = static_cast<Mask>(_pext_u32(first_lanes(count), 0x5555));
  const __m128i pairs = _mm_maskz_loadu_epi8(bytes, at + first / 2);
  const __m128i nibble = _mm_set1_epi8(15);
  const __m128i low = _mm_and_si128(pairs, nibble);
  const __m128i high = _mm_and_si128(_mm_srli_epi16(pairs, 4), nibble);
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high)));
}

LFM2_ALWAYS Order load_order(const int32_t* lanes) { return _mm512_load_si512(lanes); }
LFM2_ALWAYS Floats permute(Floats x, Order order) { return _mm512_permutexvar_ps(order, x); }

LFM2_ALWAYS Bytes load_bytes(const void* at) { return _mm512_loadu_si512(at); }
LFM2_ALWAYS Bytes load_bytes_first(const void* at, int64_t count) {
  return _mm512_maskz_loadu_epi8(count >= 64 ? ~__mmask64{0} : (__mmask64{1} << (count < 0 ? 0 : count)) - 1, at);
}
LFM2_ALWAYS Bytes low_nibbles(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
LFM2_ALWAYS Bytes high_nibbles(Bytes x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
LFM2_ALWAYS Ints zero_ints() { return _mm512_setzero_si512(); }
LFM2_ALWAYS Ints broadcast_int(int32_t x) { return _mm512_set1_epi32(x); }
LFM2_ALWAYS Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
LFM2_ALWAYS Ints sub_ints(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
LFM2_ALWAYS Ints max_ints(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
LFM2_ALWAYS int32_t greatest_of(Ints x) { return _mm512_reduce_max_epi32(x); }
LFM2_ALWAYS int32_t sum_of(Ints x) { return _mm512_reduce_add_epi32(x); }

// 32 codes as bytes, exclusive or `flip`: one after the other, or the even ones and the odd ones apart.
LFM2_ALWAYS __m256i as_codes(const Ints (&x)[2], int8_t flip) {
  const __m256i codes = _mm256_set_m128i(_mm512_cvtepi32_epi8(x[1]), _mm512_cvtepi32_epi8(x[0]));
  return _mm256_xor_si256(codes, _mm256_set1_epi8(flip));
}
LFM2_ALWAYS void store_in_order(const Ints (&x)[2], int8_t flip, int8_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), as_codes(x, flip));
}
LFM2_ALWAYS void store_apart(const Ints (&x)[2], int8_t flip, int8_t* even, int8_t* odd) {
  const __m256i order = _mm256_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0,  //
                                        15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m256i codes = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(as_codes(x, flip), order), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(even), _mm256_castsi256_si128(codes));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(odd), _mm256_extracti128_si256(codes, 1));
}
LFM2_ALWAYS Ints times_128(Ints x) { return _mm512_slli_epi32(x, 7); }
LFM2_ALWAYS Bytes broadcast_byte(int8_t x) { return _mm512_set1_epi8(x); }
LFM2_ALWAYS Bytes add_bytes(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
LFM2_ALWAYS Bytes sub_bytes(Bytes a, Bytes b) { return _mm512_sub_epi8(a, b); }
LFM2_ALWAYS Bytes exclusive_or(Bytes a, Bytes b) { return _mm512_xor_si512(a, b); }

// Number `index` (below 8) of 4 bits of each lane, in all of its bytes.
LFM2_ALWAYS Bytes nibble_of_lanes(Ints x, int index) {
  const __m512i shifted = _mm512_srlv_epi32(x, _mm512_set1_epi32(4 * index));
  return _mm512_mullo_epi32(_mm512_and_si512(shifted, _mm512_set1_epi32(15)), _mm512_set1_epi32(0x01010101));
}

// 4 x 4 words in each block of four registers: word i of row r becomes word r of row i.
LFM2_ALWAYS void turn_blocks(Ints& a, Ints& b, Ints& c, Ints& d) {
  const __m512i t0 = _mm512_unpacklo_epi32(a, b), t1 = _mm512_unpackhi_epi32(a, b);
  const __m512i t2 = _mm512_unpacklo_epi32(c, d), t3 = _mm512_unpackhi_epi32(c, d);
  a = _mm512_unpacklo_epi64(t0, t2);
  b = _mm512_unpackhi_epi64(t0, t2);
  c = _mm512_unpacklo_epi64(t1, t3);
  d = _mm512_unpackhi_epi64(t1, t3);
}

// Rows to lanes: word i of row r becomes lane r of word i.
LFM2_ALWAYS void transpose(Ints (&m)[kLanes]) {
  for (int i = 0; i < kLanes; i += 4) {
    turn_blocks(m[i], m[i + 1], m[i + 2], m[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {  // then the blocks
    const __m512i t0 = _mm512_shuffle_i32x4(m[j], m[j + 4], 0x88), t1 = _mm512_shuffle_i32x4(m[j], m[j + 4], 0xdd);
    const __m512i t2 = _mm512_shuffle_i32x4(m[j + 8], m[j + 12], 0x88);
    const __m512i t3 = _mm512_shuffle_i32x4(m[j + 8], m[j + 12], 0xdd);
    m[j] = _mm512_shuffle_i32x4(t0, t2, 0x88);
    m[j + 4] = _mm512_shuffle_i32x4(t1, t3, 0x88);
    m[j + 8] = _mm512_shuffle_i32x4(t0, t2, 0xdd);
    m[j + 12] = _mm512_shuffle_i32x4(t1, t3, 0xdd);
  }
}

LFM2_ALWAYS Ints as_ints(Floats x) { return _mm512_castps_si512(x); }
LFM2_ALWAYS Ints as_ints(Bytes x) { return x; }
LFM2_ALWAYS Bytes as_bytes(Ints x) { return x; }
LFM2_ALWAYS Floats as_floats(Ints x) { return _mm512_castsi512_ps(x); }

// Bytes of weights at 8 bits as `byte_products` wants them; kByteZero is what is left of their zero point.
constexpr int kByteZero = 128;
using ByteWeights = Bytes;
LFM2_ALWAYS ByteWeights byte_weights(Bytes codes) { return codes; }

// Of each 4 bytes of two registers of weights the sum of their products with a's and b's; a block for each block.
LFM2_ALWAYS Ints nibble_products(Bytes first, Bytes second, Bytes a, Bytes b) {
  return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), first, a), second, b);
}

// The same of 8 bits, where two neighbouring blocks go into one.
LFM2_ALWAYS Ints byte_products(ByteWeights first, ByteWeights second, Bytes a, Bytes b) {
  const __m512i low = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, a);
  const __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), second, b);
  return _mm512_add_epi32(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xdd));
}

LFM2_ALWAYS Ints add_byte_products(Ints sum, ByteWeights weights, Bytes x) {
  return _mm512_dpbusd_epi32(sum, weights, x);
}

// Block b, lane r: the sum of row r's block b.
LFM2_ALWAYS Ints sums_of_rows(const Ints (&m)[4]) {
  const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(m[0], m[1]), _mm512_unpackhi_epi32(m[0], m[1]));
  const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(m[2], m[3]), _mm512_unpackhi_epi32(m[2], m[3]));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

// The same apart for the first and the second half of each block.
LFM2_ALWAYS void halves_of_rows(const Ints (&m)[4], Ints (&to)[2]) {
  const __m512i a = _mm512_unpacklo_epi32(m[0], m[1]), b = _mm512_unpacklo_epi32(m[2], m[3]);
  const __m512i c = _mm512_unpackhi_epi32(m[0], m[1]), d = _mm512_unpackhi_epi32(m[2], m[3]);
  to[0] = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  to[1] = _mm512_add_epi32(_mm512_unpacklo_epi64(c, d), _mm512_unpackhi_epi64(c, d));
}

// Of two registers' blocks the even ones, and the odd ones.
LFM2_ALWAYS void every_second_block(Ints a, Ints b, Ints (&to)[2]) {
  to[0] = _mm512_shuffle_i32x4(a, b, 0x88);
  to[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
}

// Lane by lane the sum of the blocks, (0 + 1) + (2 + 3), to 4 floats.
LFM2_ALWAYS void store_sum_of_blocks(float* at, Floats x) {
  x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
  _mm_storeu_ps(at, _mm512_castps512_ps128(_mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e))));
}

LFM2_ALWAYS Bytes broadcast_word(const int8_t* x) {
  int32_t bits;
  std::memcpy(&bits, x, sizeof bits);
  return _mm512_set1_epi32(bits);
}

// 16 inputs of a token; 4 of them at a time are multiplied with the 4 bytes of each lane.
struct SixteenInputs {
  const int8_t* at;
};
LFM2_ALWAYS SixteenInputs load_sixteen(const int8_t* at) { return {at}; }

// Products of 32 inputs with a lane's weights of 4 bits, 4 times 8 of them; `offset` takes the zero point out.
struct NibbleSum {
  __m512i sum;

  LFM2_ALWAYS void start(int32_t offset) { sum = _mm512_set1_epi32(offset); }
  template <int kQuad>
  LFM2_ALWAYS void add(Bytes low, Bytes high, SixteenInputs first, SixteenInputs second) {
    sum = _mm512_dpbusd_epi32(sum, low, broadcast_word(first.at + 4 * kQuad));
    sum = _mm512_dpbusd_epi32(sum, high, broadcast_word(second.at + 4 * kQuad));
  }
  LFM2_ALWAYS Floats total() const { return _mm512_cvtepi32_ps(sum); }
};

// sum + the four signed bytes of each lane.
LFM2_ALWAYS Ints add_quads(Ints sum, Bytes x) { return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), x); }

// Products of 32 shifted inputs with a lane's weights, 8 times 4 of them; `offset` takes the shift out.
template <int kBits>
struct TileSum {
  __m512i sum;

  LFM2_ALWAYS void start(Ints offset) { sum = offset; }
  LFM2_ALWAYS void add(int, Bytes four, Bytes weights) { sum = _mm512_dpbusd_epi32(sum, four, weights); }
  LFM2_ALWAYS Floats total() const { return _mm512_cvtepi32_ps(sum); }
};

}  // namespace
}  // namespace lfm2
