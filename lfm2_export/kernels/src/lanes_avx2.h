// lanes.h with AVX2 and FMA: 8 lanes; with AVX-VNNI where the compiler may use it.

#pragma once

#include <immintrin.h>

namespace lfm2 {
namespace {

constexpr int kLanes = 8;

using Floats = __m256;
using Ints = __m256i;
using Bytes = __m256i;
using Order = __m256i;
using Mask = __m256;

LFM2_ALWAYS Ints int_lanes(int64_t count) {
  const auto limit = static_cast<int32_t>(count > kLanes ? kLanes : count < 0 ? 0 : count);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(limit), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
LFM2_ALWAYS Mask first_lanes(int64_t count) { return _mm256_castsi256_ps(int_lanes(count)); }

// Of lanes that are 0 or -1.
LFM2_ALWAYS Mask mask_of(const int32_t* at) { return _mm256_loadu_ps(reinterpret_cast<const float*>(at)); }
LFM2_ALWAYS Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
LFM2_ALWAYS Mask without(Mask a, Mask b) { return _mm256_andnot_ps(b, a); }
LFM2_ALWAYS bool has_any(Mask a) { return _mm256_movemask_ps(a) != 0; }
LFM2_ALWAYS Floats select(Mask mask, Floats a, Floats b) { return _mm256_blendv_ps(b, a, mask); }
LFM2_ALWAYS Floats keep(Mask mask, Floats x) { return _mm256_and_ps(mask, x); }

LFM2_ALWAYS Floats load(const float* at) { return _mm256_loadu_ps(at); }
LFM2_ALWAYS void store(float* at, Floats x) { _mm256_storeu_ps(at, x); }
LFM2_ALWAYS void store_first(float* at, Floats x, int64_t count) {
  count >= kLanes ? store(at, x) : _mm256_maskstore_ps(at, int_lanes(count), x);
}
LFM2_ALWAYS Floats broadcast(float x) { return _mm256_set1_ps(x); }
LFM2_ALWAYS Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
LFM2_ALWAYS Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
LFM2_ALWAYS Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
LFM2_ALWAYS Floats fmadd(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }    // a * b + c
LFM2_ALWAYS Floats fnmadd(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a * b
LFM2_ALWAYS Floats max_or_second(Floats a, Floats b) { return _mm256_max_ps(a, b); }  // where one is NaN, b
LFM2_ALWAYS Floats round_to_whole(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
LFM2_ALWAYS Floats times_power_of_two(Floats x, Floats n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
LFM2_ALWAYS float greatest_of(Floats x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
LFM2_ALWAYS float sum_of(Floats x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
LFM2_ALWAYS Floats bytes_to_floats(const uint8_t* at) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadu_si64(at)));
}
LFM2_ALWAYS Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
LFM2_ALWAYS Mask is_negative(Floats x) { return _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ); }  // of -0 not
LFM2_ALWAYS Ints magnitude_bits(Floats x) {
  return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
}
LFM2_ALWAYS Ints to_nearest_ints(Floats x) { return _mm256_cvtps_epi32(x); }

// x[0], x[2], ...; the float behind the last of them is not read.
LFM2_ALWAYS Floats load_every_second(const float* x) {
  const __m256 pairs = _mm256_shuffle_ps(_mm256_loadu_ps(x), _mm256_loadu_ps(x + kLanes - 1), 0xd8);
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(pairs), 0xd8));
}
LFM2_ALWAYS Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }

// `count` bytes below 16; behind them 0.
LFM2_ALWAYS __m128i load_few(const void* at, int64_t count) {
  alignas(16) uint8_t few[16] = {};
  for (int64_t i = 0; i < count; ++i) {
    few[i] = static_cast<const uint8_t*>(at)[i];
  }
  return _mm_load_si128(reinterpret_cast<const __m128i*>(few));
}

// The first `count` lanes; the others are 0, and nothing behind `count` is read.
LFM2_ALWAYS Floats load_first(const void* at, int64_t count) {
  return count >= kLanes ? load(static_cast<const float*>(at))
                         : _mm256_maskload_ps(static_cast<const float*>(at), int_lanes(count));
}

// The same of IEEE halves.
LFM2_ALWAYS Floats load_halves_first(const void* at, int64_t count) {
  __m128i halves;
  if (count >= kLanes) {
    halves = _mm_loadu_si128(static_cast<const __m128i*>(at));
  } else if (count == 4) {
    halves = _mm_loadu_si64(at);
  } else if (count == 2) {
    halves = _mm_loadu_si32(at);
  } else {
    halves = load_few(at, 2 * count);
  }
  return _mm256_cvtph_ps(halves);
}

// The same of numbers of 4 bits, from number `first` (an even one where count > 1) on.
LFM2_ALWAYS Floats load_nibbles_first(const uint8_t* at, int64_t first, int64_t count) {
  uint32_t word = 0;
  at += first / 2;
  if (count >= kLanes) {
    std::memcpy(&word, at, sizeof word);
  } else {
    for (int64_t i = 0; 2 * i < count; ++i) {
      word |= static_cast<uint32_t>(at[i]) << 8 * i;
    }
  }
  const __m256i all = _mm256_set1_epi32(static_cast<int32_t>(word >> first % 2 * 4));
  const __m256i apart = _mm256_srlv_epi32(all, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
  return _mm256_cvtepi32_ps(_mm256_and_si256(apart, _mm256_set1_epi32(15)));
}

LFM2_ALWAYS Order load_order(const int32_t* lanes) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes)); }
LFM2_ALWAYS Floats permute(Floats x, Order order) { return _mm256_permutevar8x32_ps(x, order); }

LFM2_ALWAYS Bytes load_bytes(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
LFM2_ALWAYS Bytes load_bytes_first(const void* at, int64_t count) {
  if (count >= 32) {
    return load_bytes(at);
  }
  if (count < 16) {
    return _mm256_zextsi128_si256(load_few(at, count));
  }
  const auto* from = static_cast<const __m128i*>(at);
  return _mm256_setr_m128i(_mm_loadu_si128(from), load_few(from + 1, count - 16));
}
LFM2_ALWAYS Bytes low_nibbles(Bytes x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
LFM2_ALWAYS Bytes high_nibbles(Bytes x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }
LFM2_ALWAYS Ints zero_ints() { return _mm256_setzero_si256(); }
LFM2_ALWAYS Ints broadcast_int(int32_t x) { return _mm256_set1_epi32(x); }
LFM2_ALWAYS Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
LFM2_ALWAYS Ints sub_ints(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
LFM2_ALWAYS Ints max_ints(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
LFM2_ALWAYS int32_t greatest_of(Ints x) {
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
LFM2_ALWAYS int32_t sum_of(Ints x) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

// 32 codes as bytes, exclusive or `flip`: one after the other, or the even ones and the odd ones apart.
LFM2_ALWAYS __m256i as_codes(const Ints (&x)[4], int8_t flip) {
  const __m256i all = _mm256_packs_epi16(_mm256_packs_epi32(x[0], x[1]), _mm256_packs_epi32(x[2], x[3]));
  const __m256i codes = _mm256_permutevar8x32_epi32(all, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  return _mm256_xor_si256(codes, _mm256_set1_epi8(flip));
}
LFM2_ALWAYS void store_in_order(const Ints (&x)[4], int8_t flip, int8_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), as_codes(x, flip));
}
LFM2_ALWAYS void store_apart(const Ints (&x)[4], int8_t flip, int8_t* even, int8_t* odd) {
  const __m256i order = _mm256_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0,  //
                                        15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m256i codes = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(as_codes(x, flip), order), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(even), _mm256_castsi256_si128(codes));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(odd), _mm256_extracti128_si256(codes, 1));
}
LFM2_ALWAYS Ints times_128(Ints x) { return _mm256_slli_epi32(x, 7); }
LFM2_ALWAYS Bytes broadcast_byte(int8_t x) { return _mm256_set1_epi8(x); }
LFM2_ALWAYS Bytes add_bytes(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
LFM2_ALWAYS Bytes sub_bytes(Bytes a, Bytes b) { return _mm256_sub_epi8(a, b); }
LFM2_ALWAYS Bytes exclusive_or(Bytes a, Bytes b) { return _mm256_xor_si256(a, b); }

// Number `index` (below 8) of 4 bits of each lane, in all of its bytes.
LFM2_ALWAYS Bytes nibble_of_lanes(Ints x, int index) {
  const __m256i shifted = _mm256_srl_epi32(x, _mm_cvtsi32_si128(4 * index));
  return _mm256_mullo_epi32(_mm256_and_si256(shifted, _mm256_set1_epi32(15)), _mm256_set1_epi32(0x01010101));
}

// 4 x 4 words in each block of four registers: word i of row r becomes word r of row i.
LFM2_ALWAYS void turn_blocks(Ints& a, Ints& b, Ints& c, Ints& d) {
  const __m256i t0 = _mm256_unpacklo_epi32(a, b), t1 = _mm256_unpackhi_epi32(a, b);
  const __m256i t2 = _mm256_unpacklo_epi32(c, d), t3 = _mm256_unpackhi_epi32(c, d);
  a = _mm256_unpacklo_epi64(t0, t2);
  b = _mm256_unpackhi_epi64(t0, t2);
  c = _mm256_unpacklo_epi64(t1, t3);
  d = _mm256_unpackhi_epi64(t1, t3);
}

LFM2_ALWAYS Ints as_ints(Floats x) { return _mm256_castps_si256(x); }
LFM2_ALWAYS Ints as_ints(Bytes x) { return x; }
LFM2_ALWAYS Bytes as_bytes(Ints x) { return x; }
LFM2_ALWAYS Floats as_floats(Ints x) { return _mm256_castsi256_ps(x); }

// Rows to lanes: word i of row r becomes lane r of word i.
LFM2_ALWAYS void transpose(Ints (&m)[kLanes]) {
  turn_blocks(m[0], m[1], m[2], m[3]);
  turn_blocks(m[4], m[5], m[6], m[7]);
  for (int j = 0; j < 4; ++j) {  // then the blocks
    const __m256i low = _mm256_permute2x128_si256(m[j], m[j + 4], 0x20);
    m[j + 4] = _mm256_permute2x128_si256(m[j], m[j + 4], 0x31);
    m[j] = low;
  }
}

// Block b, lane r: the sum of row r's block b.
LFM2_ALWAYS Ints sums_of_rows(const Ints (&m)[4]) {
  const __m256i a = _mm256_add_epi32(_mm256_unpacklo_epi32(m[0], m[1]), _mm256_unpackhi_epi32(m[0], m[1]));
  const __m256i b = _mm256_add_epi32(_mm256_unpacklo_epi32(m[2], m[3]), _mm256_unpackhi_epi32(m[2], m[3]));
  return _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}

// The same apart for the first and the second half of each block.
LFM2_ALWAYS void halves_of_rows(const Ints (&m)[4], Ints (&to)[2]) {
  const __m256i a = _mm256_unpacklo_epi32(m[0], m[1]), b = _mm256_unpacklo_epi32(m[2], m[3]);
  const __m256i c = _mm256_unpackhi_epi32(m[0], m[1]), d = _mm256_unpackhi_epi32(m[2], m[3]);
  to[0] = _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
  to[1] = _mm256_add_epi32(_mm256_unpacklo_epi64(c, d), _mm256_unpackhi_epi64(c, d));
}

// Of two registers' blocks the even ones, and the odd ones.
LFM2_ALWAYS void every_second_block(Ints a, Ints b, Ints (&to)[2]) {
  to[0] = _mm256_permute2x128_si256(a, b, 0x20);
  to[1] = _mm256_permute2x128_si256(a, b, 0x31);
}

// Lane by lane the sum of the blocks, to 4 floats.
LFM2_ALWAYS void store_sum_of_blocks(float* at, Floats x) {
  _mm_storeu_ps(at, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}

LFM2_ALWAYS Bytes broadcast_word(const int8_t* x) {
  int32_t bits;
  std::memcpy(&bits, x, sizeof bits);
  return _mm256_set1_epi32(bits);
}

// 16 inputs of a token; 4 of them at a time are multiplied with the 4 bytes of each lane.
struct SixteenInputs {
  const int8_t* at;
};
LFM2_ALWAYS SixteenInputs load_sixteen(const int8_t* at) { return {at}; }

// Pairs of blocks of two registers: of a 0 and 1, of b 0 and 1.
LFM2_ALWAYS Ints add_pairs_of_blocks(Ints a, Ints b) {
  return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

#if defined(__AVXVNNI__)

// Bytes of weights at 8 bits as `byte_products` wants them; kByteZero is what is left of their zero point.
constexpr int kByteZero = 128;
using ByteWeights = Bytes;
LFM2_ALWAYS ByteWeights byte_weights(Bytes codes) { return codes; }

// Of each 4 bytes of two registers of weights the sum of their products with a's and b's; a block for each block.
LFM2_ALWAYS Ints nibble_products(Bytes first, Bytes second, Bytes a, Bytes b) {
  return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), first, a), second, b);
}

// The same of 8 bits, where two neighbouring blocks go into one.
LFM2_ALWAYS Ints byte_products(ByteWeights first, ByteWeights second, Bytes a, Bytes b) {
  return add_pairs_of_blocks(_mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), first, a),
                             _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), second, b));
}

LFM2_ALWAYS Ints add_byte_products(Ints sum, ByteWeights weights, Bytes x) {
  return _mm256_dpbusd_avx_epi32(sum, weights, x);
}

// Products of 32 inputs with a lane's weights of 4 bits, 4 times 8 of them; `offset` takes the zero point out.
struct NibbleSum {
  __m256i low_sum, high_sum;

  LFM2_ALWAYS void start(int32_t offset) {
    low_sum = _mm256_set1_epi32(offset);
    high_sum = _mm256_setzero_si256();
  }
  template <int kQuad>
  LFM2_ALWAYS void add(Bytes low, Bytes high, SixteenInputs first, SixteenInputs second) {
    low_sum = _mm256_dpbusd_avx_epi32(low_sum, low, broadcast_word(first.at + 4 * kQuad));
    high_sum = _mm256_dpbusd_avx_epi32(high_sum, high, broadcast_word(second.at + 4 * kQuad));
  }
  LFM2_ALWAYS Floats total() const { return _mm256_cvtepi32_ps(_mm256_add_epi32(low_sum, high_sum)); }
};

// sum + the four signed bytes of each lane.
LFM2_ALWAYS Ints add_quads(Ints sum, Bytes x) { return _mm256_dpbusd_avx_epi32(sum, _mm256_set1_epi8(1), x); }

// Products of 32 shifted inputs with a lane's weights, 8 times 4 of them; `offset` takes the shift out.
template <int kBits>
struct TileSum {
  __m256i sum;

  LFM2_ALWAYS void start(Ints offset) { sum = offset; }
  LFM2_ALWAYS void add(int, Bytes four, Bytes weights) { sum = _mm256_dpbusd_avx_epi32(sum, four, weights); }
  LFM2_ALWAYS Floats total() const { return _mm256_cvtepi32_ps(sum); }
};

#else

// vpmaddubsw adds two products in 16 bits and saturates: what each of them may hold is said where it is used.

// Weights of 8 bits less 128, and their size, which is multiplied with an input that has taken over their sign.
constexpr int kByteZero = 0;
struct ByteWeights {
  __m256i sizes, values;
};
LFM2_ALWAYS ByteWeights byte_weights(Bytes codes) {
  const __m256i values = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
  return {_mm256_abs_epi8(values), values};
}

// At most 2 * 128 * 127 = 32512.
LFM2_ALWAYS Ints signed_products(const ByteWeights& weights, Bytes x) {
  const __m256i pairs = _mm256_maddubs_epi16(weights.sizes, _mm256_sign_epi8(x, weights.values));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// Two sums of 16 bits in each lane.
struct Pairs {
  __m256i lanes;
};

// Of each 4 bytes of two registers of weights the products with a's and b's; at most 2 * 2 * 15 * 127 = 7620.
LFM2_ALWAYS Pairs nibble_products(Bytes first, Bytes second, Bytes a, Bytes b) {
  return {_mm256_add_epi16(_mm256_maddubs_epi16(first, a), _mm256_maddubs_epi16(second, b))};
}

// The same of 8 bits, where two neighbouring blocks go into one.
LFM2_ALWAYS Ints byte_products(ByteWeights first, ByteWeights second, Bytes a, Bytes b) {
  return add_pairs_of_blocks(signed_products(first, a), signed_products(second, b));
}

LFM2_ALWAYS Ints add_byte_products(Ints sum, ByteWeights weights, Bytes x) {
  return _mm256_add_epi32(sum, signed_products(weights, x));
}

// At most 4 * 7620 = 30480 before the pairs are added.
LFM2_ALWAYS Ints sums_of_rows(const Pairs (&m)[4]) {
  const __m256i a = _mm256_add_epi16(_mm256_unpacklo_epi32(m[0].lanes, m[1].lanes),
                                     _mm256_unpackhi_epi32(m[0].lanes, m[1].lanes));
  const __m256i b = _mm256_add_epi16(_mm256_unpacklo_epi32(m[2].lanes, m[3].lanes),
                                     _mm256_unpackhi_epi32(m[2].lanes, m[3].lanes));
  const __m256i sums = _mm256_add_epi16(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
  return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
}

// The same apart for the first and the second half of each block.
LFM2_ALWAYS void halves_of_rows(const Pairs (&m)[4], Ints (&to)[2]) {
  const __m256i a = _mm256_unpacklo_epi32(m[0].lanes, m[1].lanes), b = _mm256_unpacklo_epi32(m[2].lanes, m[3].lanes);
  const __m256i c = _mm256_unpackhi_epi32(m[0].lanes, m[1].lanes), d = _mm256_unpackhi_epi32(m[2].lanes, m[3].lanes);
  const __m256i first = _mm256_add_epi16(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
  const __m256i second = _mm256_add_epi16(_mm256_unpacklo_epi64(c, d), _mm256_unpackhi_epi64(c, d));
  to[0] = _mm256_madd_epi16(first, _mm256_set1_epi16(1));
  to[1] = _mm256_madd_epi16(second, _mm256_set1_epi16(1));
}

// Products of 32 inputs with a lane's weights of 4 bits, 4 times 8 of them; `offset` takes the zero point out.
// A product is at most 15 * 127 and vpmaddubsw adds two: eight of those sums are at most 30480, so 16 bits hold them.
struct NibbleSum {
  __m256i low_sum, high_sum, offsets;

  LFM2_ALWAYS void start(int32_t offset) {
    low_sum = high_sum = _mm256_setzero_si256();
    offsets = _mm256_set1_epi32(offset);
  }
  template <int kQuad>
  LFM2_ALWAYS void add(Bytes low, Bytes high, SixteenInputs first, SixteenInputs second) {
    low_sum = _mm256_add_epi16(low_sum, _mm256_maddubs_epi16(low, broadcast_word(first.at + 4 * kQuad)));
    high_sum = _mm256_add_epi16(high_sum, _mm256_maddubs_epi16(high, broadcast_word(second.at + 4 * kQuad)));
  }
  LFM2_ALWAYS Floats total() const {
    const __m256i sums = _mm256_madd_epi16(_mm256_add_epi16(low_sum, high_sum), _mm256_set1_epi16(1));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(sums, offsets));
  }
};

// sum + the four signed bytes of each lane.
LFM2_ALWAYS Ints add_quads(Ints sum, Bytes x) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), x);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Products of 32 shifted inputs with a lane's weights, 8 times 4 of them; `offset` takes the shift out.
template <int kBits>
struct TileSum;

// Weights are -15 to 15, shifted inputs 1 to 255: four times 2 * 15 * 255 are 30600.
template <>
struct TileSum<4> {
  __m256i sum, pairs;

  LFM2_ALWAYS void start(Ints offset) { sum = offset; }
  LFM2_ALWAYS void add(int i, Bytes four, Bytes weights) {
    const __m256i products = _mm256_maddubs_epi16(four, weights);
    pairs = i % 4 == 0 ? products : _mm256_add_epi16(pairs, products);
    if (i % 4 == 3) {
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    // GCC would multiply everything before it adds, and store what no register is left for.
    __asm__("" : "+x"(pairs));
  }
  LFM2_ALWAYS Floats total() const { return _mm256_cvtepi32_ps(sum); }
};

// Shifted inputs are too large for signed_products: the shift is taken out before, not by the offset.
template <>
struct TileSum<8> {
  __m256i sum;

  LFM2_ALWAYS void start(Ints) { sum = _mm256_setzero_si256(); }
  LFM2_ALWAYS void add(int, Bytes four, Bytes weights) {
    const __m256i inputs = _mm256_xor_si256(four, _mm256_set1_epi8(-128));
    sum = _mm256_add_epi32(sum, signed_products({_mm256_abs_epi8(weights), weights}, inputs));
    __asm__("" : "+x"(sum));
  }
  LFM2_ALWAYS Floats total() const { return _mm256_cvtepi32_ps(sum); }
};

#endif

}  // namespace
}  // namespace lfm2
