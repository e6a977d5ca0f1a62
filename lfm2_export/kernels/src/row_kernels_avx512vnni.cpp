// row_matrix.h with AVX-512 and VNNI.
//
// dot: 4 rows at once. A register of codes is 128 inputs of one row (64 at 8 bits); the whole numbers that it gives with a
// token are added up within each group of 32, so that a register holds 4 groups of 4 rows before anything becomes a float.
// block: 16 rows a register; codes, scales and zero points are turned from rows into lanes by transposing 16 x 16 words,
// which at 4 bits moves 8 weights at once.
//
// Both give a token the same bits, whatever the others: of each group the exact whole number, times both scales; groups
// 0, 4, 8... are added up in this order, so are 1, 5, 9..., 2, 6, 10... and 3, 7, 11...; then (0 + 1) + (2 + 3).

#include "lanes_avx512.h"
#include "row_quantize.h"

namespace lfm2 {
namespace {

constexpr int64_t kAhead = 4096;  // bytes of codes: covers DRAM latency, across page boundaries too
constexpr int kRows = 4;          // of a tile of `dot`
constexpr int kParts = 4;         // of 512 inputs
constexpr int kMostTokens = 8;    // of one pass of `dot`
constexpr int kChains = 4;        // of sums that are added up apart
constexpr int kTileTokens = 6;    // of one pass of `block`: 2 x 6 sums of integers, as many of floats

LFM2_ALWAYS __mmask16 first_lanes(int64_t count) {
  return count >= kLanes ? 0xffff : static_cast<__mmask16>((1u << (count < 0 ? 0 : count)) - 1);
}

LFM2_ALWAYS __mmask64 first_bytes(int64_t count) {
  return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << (count < 0 ? 0 : count)) - 1;
}

LFM2_ALWAYS __m512 load_scales(const uint8_t* scales, int64_t first, __mmask16 mask, bool half) {
  if (half) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, scales + first * 2));
  }
  return _mm512_maskz_loadu_ps(mask, scales + first * 4);
}

// 16 zero points from group `first` (an even number) on; masked ones are 0.
LFM2_ALWAYS __m512 load_points(const uint8_t* points, int64_t first, __mmask16 mask) {
  const auto bytes = static_cast<__mmask16>(_pext_u32(mask, 0x5555));
  const __m128i pairs = _mm_maskz_loadu_epi8(bytes, points + first / 2);
  const __m128i nibble = _mm_set1_epi8(15);
  const __m128i low = _mm_and_si128(pairs, nibble);
  const __m128i high = _mm_and_si128(_mm_srli_epi16(pairs, 4), nibble);
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high)));
}

// quantize_row_group of elementwise code, on two registers: the same codes and scales.
LFM2_ALWAYS void quantize_registers(__m512 a, __m512 b, const RowActivations& to, int64_t group, int64_t token) {
  constexpr float kLeast = 1e-30f;  // as in elementwise.h
  const __m512 greatest_lanes = _mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b));
  const __mmask16 odd = _mm512_fpclass_ps_mask(a, 0x99) | _mm512_fpclass_ps_mask(b, 0x99);  // NaN, infinity
  const float greatest = _mm512_reduce_max_ps(greatest_lanes);
  const bool usable = odd == 0 && greatest > kLeast;
  const __m512 inverse = _mm512_set1_ps(usable ? 127.0f / greatest : 0.0f);
  const __mmask16 keep = usable ? 0xffff : 0;
  const __m512i low = _mm512_maskz_cvtps_epi32(keep, _mm512_mul_ps(a, inverse));
  const __m512i high = _mm512_maskz_cvtps_epi32(keep, _mm512_mul_ps(b, inverse));
  __m256i codes = _mm256_set_m128i(_mm512_cvtepi32_epi8(high), _mm512_cvtepi32_epi8(low));
  if (to.shifted) {
    codes = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
  }
  int8_t* row = to.codes_of(token);
  if (to.bits == 8) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + group * kGroupInputs), codes);
  } else {
    const __m256i apart = _mm256_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0,  //
                                          15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
    codes = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(codes, apart), 0xd8);
    int8_t* even = row + place_of(group * kGroupInputs, 4);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(even), _mm256_castsi256_si128(codes));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(even + 64), _mm256_extracti128_si256(codes, 1));
  }
  const int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
  const float scale = odd != 0 ? bits_to_float(0x7fc00000u) : usable ? greatest / 127.0f : 0.0f;
  store_scale(scale, sum, to, group, token);
}

void quantize(const float* x, int64_t columns, const RowActivations& to, int64_t token) {
  for (int64_t group = 0; group < columns / kGroupInputs; ++group, x += kGroupInputs) {
    quantize_registers(_mm512_loadu_ps(x), _mm512_loadu_ps(x + kLanes), to, group, token);
  }
}

// silu of elementwise.h.
LFM2_ALWAYS __m512 silu_lanes(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 e = exp_lanes(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_mul_ps(x, _mm512_div_ps(_mm512_mask_blend_ps(negative, one, e), _mm512_add_ps(one, e)));
}

// 16 values, `step` floats apart, from value `first` on.
LFM2_ALWAYS __m512 load_apart(const float* x, int first, int step) {
  if (step == 1) {
    return _mm512_loadu_ps(x + first);
  }
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  // The last value of an odd half is the last float there is: one less is loaded behind it.
  return _mm512_permutex2var_ps(_mm512_loadu_ps(x + 2 * first), even,
                                _mm512_maskz_loadu_ps(0x7fff, x + 2 * first + kLanes));
}

void swiglu(const float* gate, const float* up, int step, const RowActivations& to, int64_t group, int64_t token) {
  __m512 product[2];
  for (int half = 0; half < 2; ++half) {
    const __m512 g = load_apart(gate, half * kLanes, step), u = load_apart(up, half * kLanes, step);
    product[half] = _mm512_mul_ps(silu_lanes(g), u);
  }
  quantize_registers(product[0], product[1], to, group, token);
}

// Lane i is `first` + i / lanes_per_value.
LFM2_ALWAYS __m512i lanes_of(int first, int lanes_per_value) {
  alignas(64) int32_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    lanes[i] = first + i / lanes_per_value;
  }
  return _mm512_load_si512(lanes);
}

// 4 rows of a matrix. Where fewer are left, the last one is taken again, and its results are dropped.
struct Rows {
  const uint8_t* codes[kRows];
  const uint8_t* scales[kRows];
  const uint8_t* points[kRows];  // null: there are none
};

LFM2_ALWAYS Rows rows_from(const RowMatrix& w, int64_t first) {
  Rows rows;
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r < w.rows ? first + r : w.rows - 1;
    rows.codes[r] = w.row(row);
    rows.scales[r] = w.scales_of(row);
    rows.points[r] = w.points_of(row);
  }
  return rows;
}

// What is the same for all tiles of a matrix.
struct Walk {
  __m512i spread;            // the weights' groups of a piece to groups of 32, as `turn_quarters` wants them
  int64_t per_piece;         // weights' groups of a piece
  int64_t codes_ahead, scales_ahead, points_ahead;  // bytes to what is fetched meanwhile: rows of a later tile
};

LFM2_ALWAYS Walk walk_of(const RowMatrix& w) {
  alignas(64) int32_t spread[kLanes];
  const auto groups_per_scale = static_cast<int32_t>(w.group / kGroupInputs);
  for (int lane = 0; lane < kLanes; ++lane) {
    spread[lane] = (lane % 4 * 4 + lane / 4) / groups_per_scale;
  }
  const int64_t tile = kRows * w.row_bytes(), tiles = (kAhead + tile - 1) / tile;
  return {_mm512_load_si512(spread), kPadding / w.group, tiles * tile, tiles * kRows * w.scale_bytes(),
          tiles * kRows * w.point_bytes()};
}

// May lie behind the tensor's end: harmless.
LFM2_ALWAYS void fetch_ahead(const uint8_t* at, int64_t bytes) {
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(at) + bytes), _MM_HINT_T0);
}

// Scales and zero points of a piece: of part p, quarter q of a register is group 4 * p + q, a lane of it a row.
struct Factors {
  __m512 scales[kParts];
  __m512 points[kParts];
};

LFM2_ALWAYS void turn(__m512 (&rows)[kRows]) {
  __m512i m[kRows];
  for (int r = 0; r < kRows; ++r) {
    m[r] = _mm512_castps_si512(rows[r]);
  }
  turn_quarters(m[0], m[1], m[2], m[3]);
  for (int r = 0; r < kRows; ++r) {
    rows[r] = _mm512_castsi512_ps(m[r]);
  }
}

template <int kBits, bool kPoints, bool kWhole>
LFM2_ALWAYS void load_factors(const RowMatrix& w, const Rows& rows, int64_t piece, int64_t left, const Walk& walk,
                              Factors& to) {
  static_assert(kRows == kParts);
  const int64_t first = piece * walk.per_piece;
  const __mmask16 mask = first_lanes(kWhole ? walk.per_piece : left / w.group);
  for (int r = 0; r < kRows; ++r) {
    fetch_ahead(rows.scales[r] + first * (w.half_scales ? 2 : 4), walk.scales_ahead);
    to.scales[r] = _mm512_permutexvar_ps(walk.spread, load_scales(rows.scales[r], first, mask, w.half_scales));
    if (kPoints) {
      fetch_ahead(rows.points[r] + first / 2, walk.points_ahead);
      to.points[r] = _mm512_permutexvar_ps(walk.spread, load_points(rows.points[r], first, mask));
    } else {
      to.points[r] = _mm512_set1_ps(kBits == 4 ? 8 : 128);
    }
  }
  turn(to.scales);
  if (kPoints) {
    turn(to.points);
  }
}

// 128 inputs of each row: at 4 bits the even ones, then the odd ones; at 8 bits half of them, then the others.
struct Codes {
  __m512i first[kRows];
  __m512i second[kRows];
};

template <bool kWhole>
LFM2_ALWAYS __m512i load_bytes(const uint8_t* at, int64_t left) {
  return kWhole ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8(first_bytes(left), at);
}

template <int kBits, bool kWhole>
LFM2_ALWAYS Codes load_codes(const Rows& rows, int64_t at, int64_t left, const Walk& walk) {
  const __m512i nibble = _mm512_set1_epi8(15);
  Codes codes;
  for (int r = 0; r < kRows; ++r) {
    const uint8_t* from = rows.codes[r] + at;
    const __m512i bytes = load_bytes<kWhole>(from, left);
    fetch_ahead(from, walk.codes_ahead);
    if (kBits == 4) {
      codes.first[r] = _mm512_and_si512(bytes, nibble);
      codes.second[r] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
    } else {
      codes.first[r] = bytes;
      codes.second[r] = load_bytes<kWhole>(from + 64, left - 64);
      fetch_ahead(from + 64, walk.codes_ahead);
    }
  }
  return codes;
}

// A row's products with 128 inputs, the four groups in the four quarters.
template <int kBits>
LFM2_ALWAYS __m512i products(__m512i first, __m512i second, __m512i a, __m512i b) {
  const __m512i low = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, a);
  if (kBits == 4) {
    return _mm512_dpbusd_epi32(low, second, b);
  }
  const __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), second, b);
  return _mm512_add_epi32(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xdd));
}

// Quarter q, lane r: the sum of row r's quarter q.
LFM2_ALWAYS __m512i sums_of_rows(const __m512i (&m)[kRows]) {
  const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(m[0], m[1]), _mm512_unpackhi_epi32(m[0], m[1]));
  const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(m[2], m[3]), _mm512_unpackhi_epi32(m[2], m[3]));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

// 512 inputs of 4 rows with `kTokens` tokens; `left` inputs are there at most.
template <int kBits, bool kPoints, int kTokens, bool kWhole>
LFM2_ALWAYS void add_piece(const RowMatrix& w, const Rows& rows, int64_t piece, int64_t left, const Walk& walk,
                           const RowActivations& x, __m512 (&total)[kTokens]) {
  Factors factors;
  load_factors<kBits, kPoints, kWhole>(w, rows, piece, left, walk, factors);
  const __mmask16 own = first_lanes(left / kGroupInputs);
#pragma GCC unroll 4
  for (int part = 0; part < kParts; ++part) {
    constexpr int kBytes = 128 * kBits / 8;
    const int64_t at = (piece * kParts + part) * kBytes;
    const Codes codes = load_codes<kBits, kWhole>(rows, at, left * kBits / 8 - part * kBytes, walk);
    const __m512i quarters = lanes_of(4 * part, 4);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const int8_t* inputs = x.codes_of(t) + piece * kPadding + part * 128;
      const __m512i a = _mm512_loadu_si512(inputs), b = _mm512_loadu_si512(inputs + 64);
      __m512i m[kRows];
      for (int r = 0; r < kRows; ++r) {
        m[r] = products<kBits>(codes.first[r], codes.second[r], a, b);
      }
      const int64_t first = piece * (kPadding / kGroupInputs);
      const __m512 sums = _mm512_permutexvar_ps(quarters, _mm512_maskz_loadu_ps(own, x.sums_of(t) + first));
      const __m512 scales = _mm512_permutexvar_ps(quarters, _mm512_maskz_loadu_ps(own, x.scales_of(t) + first));
      // Whole numbers below 2^24: exact.
      const __m512 centred = _mm512_fnmadd_ps(factors.points[part], sums, _mm512_cvtepi32_ps(sums_of_rows(m)));
      total[t] = _mm512_fmadd_ps(centred, _mm512_mul_ps(factors.scales[part], scales), total[t]);
    }
  }
}

// The order in which `block` adds them, too.
LFM2_ALWAYS __m128 sum_of_quarters(__m512 x) {
  x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
  return _mm512_castps512_ps128(_mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e)));
}

// Without a masked store: GCC makes one of a part of a register that faults on what the mask leaves out.
LFM2_ALWAYS void store_rows(__m128 sums, int64_t count, float* y) {
  if (count >= kRows) {
    return _mm_storeu_ps(y, sums);
  }
  alignas(16) float all[kRows];
  _mm_store_ps(all, sums);
  std::memcpy(y, all, static_cast<size_t>(count) * sizeof(float));
}

template <int kBits, bool kPoints, int kTokens>
void dot_tokens(const RowMatrix& w, const RowActivations& x, float* y, int64_t stride) {
  const Walk walk = walk_of(w);
  const int64_t whole = w.columns / kPadding, left = w.columns % kPadding;
  for (int64_t row = 0; row < w.rows; row += kRows) {
    const Rows rows = rows_from(w, row);
    __m512 total[kTokens] = {};
    for (int64_t piece = 0; piece < whole; ++piece) {
      add_piece<kBits, kPoints, kTokens, true>(w, rows, piece, kPadding, walk, x, total);
    }
    if (left > 0) {
      add_piece<kBits, kPoints, kTokens, false>(w, rows, whole, left, walk, x, total);
    }
    for (int t = 0; t < kTokens; ++t) {
      store_rows(sum_of_quarters(total[t]), w.rows - row, y + t * stride + row);
    }
  }
}

template <int kBits, bool kPoints>
void dot_points(const RowMatrix& w, const RowActivations& x, float* y, int64_t stride) {
  for (int64_t first = 0; first < x.tokens; first += kMostTokens) {
    const int64_t count = x.tokens - first < kMostTokens ? x.tokens - first : kMostTokens;
    const RowActivations some = x.part(first, count);
    float* to = y + first * stride;
    switch (count) {
      case 1: dot_tokens<kBits, kPoints, 1>(w, some, to, stride); break;
      case 2: dot_tokens<kBits, kPoints, 2>(w, some, to, stride); break;
      case 3: dot_tokens<kBits, kPoints, 3>(w, some, to, stride); break;
      case 4: dot_tokens<kBits, kPoints, 4>(w, some, to, stride); break;
      case 5: dot_tokens<kBits, kPoints, 5>(w, some, to, stride); break;
      case 6: dot_tokens<kBits, kPoints, 6>(w, some, to, stride); break;
      case 7: dot_tokens<kBits, kPoints, 7>(w, some, to, stride); break;
      default: dot_tokens<kBits, kPoints, 8>(w, some, to, stride);
    }
  }
}

void dot(const RowMatrix& w, const RowActivations& x, float* y, int64_t stride) {
  if (w.bits == 8) {
    dot_points<8, false>(w, x, y, stride);
  } else if (w.zero_points == nullptr) {
    dot_points<4, false>(w, x, y, stride);
  } else {
    dot_points<4, true>(w, x, y, stride);
  }
}

// A block's rows as lanes. Words come in the order in which activations lie: at 4 bits, of 8 inputs the even ones, then
// the odd ones.
struct Block {
  __m512i* words;    // [columns / 4][2]: 4 weights, zero point taken out
  __m512i* offsets;  // [columns / 32][2]: -128 * their sum, which takes the activations' shift out
  __m512* scales;    // [groups][2]
};

Block block_in(void* scratch, int64_t columns) {
  auto* words = static_cast<__m512i*>(scratch);
  __m512i* offsets = words + columns / 4 * 2;
  return {words, offsets, reinterpret_cast<__m512*>(offsets + columns / kGroupInputs * 2)};
}

LFM2_ALWAYS void load_words(const uint8_t* from, int64_t stride, int64_t rows, int64_t bytes, __m512i (&m)[kLanes]) {
  const __mmask64 mask = first_bytes(bytes);
  for (int r = 0; r < kLanes; ++r) {
    m[r] = r < rows ? _mm512_maskz_loadu_epi8(mask, from + r * stride) : _mm512_setzero_si512();
  }
  transpose(m);
}

void arrange_scales(const RowMatrix& w, int half, int64_t rows, const Block& block) {
  for (int64_t first = 0; first < w.groups(); first += kLanes) {
    const __mmask16 mask = first_lanes(w.groups() - first);
    __m512i m[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      m[r] = r < rows ? _mm512_castps_si512(load_scales(w.scales_of(half * kLanes + r), first, mask, w.half_scales))
                      : _mm512_setzero_si512();
    }
    transpose(m);
    for (int64_t i = 0; i < kLanes && first + i < w.groups(); ++i) {
      block.scales[(first + i) * 2 + half] = _mm512_castsi512_ps(m[i]);
    }
  }
}

// Zero points of 128 groups at most, as bytes of lanes: 8 groups in a word.
struct Points {
  __m512i words[kLanes];

  LFM2_ALWAYS __m512i of(int64_t group) const {
    const __m512i shifted = _mm512_srlv_epi32(words[group / 8], _mm512_set1_epi32(static_cast<int>(group % 8 * 4)));
    return _mm512_mullo_epi32(_mm512_and_si512(shifted, _mm512_set1_epi32(15)), _mm512_set1_epi32(0x01010101));
  }
};

constexpr int64_t kPointGroups = 128;

template <int kBits>
LFM2_ALWAYS void arrange_codes(const RowMatrix& w, int half, int64_t rows, const Block& block) {
  constexpr int kInputs = kBits == 4 ? 128 : 64;  // in a register of a row
  const __m512i nibble = _mm512_set1_epi8(15), ones = _mm512_set1_epi8(1);
  const bool has_points = w.zero_points != nullptr;
  Points points;
  for (int64_t at = 0; at < w.columns; at += kInputs) {
    const int64_t left = w.columns - at < kInputs ? w.columns - at : kInputs;
    if (has_points && at / w.group % kPointGroups == 0 && at % w.group == 0) {
      const int64_t bytes = w.point_bytes() - at / w.group / 2;
      load_words(w.points_of(half * kLanes) + at / w.group / 2, w.point_bytes(), rows, bytes, points.words);
    }
    __m512i m[kLanes];
    load_words(w.row(half * kLanes) + at * kBits / 8, w.row_bytes(), rows, left * kBits / 8, m);
    for (int64_t inner = 0; inner < left; inner += kGroupInputs) {
      const int64_t group = (at + inner) / w.group;
      const __m512i point = has_points ? points.of(group % kPointGroups) : _mm512_set1_epi8(8);
      __m512i* to = block.words + (at + inner) / 4 * 2 + half;
      __m512i sum = _mm512_setzero_si512();
      for (int i = 0; i < kGroupInputs / 4; ++i) {
        __m512i word;
        if (kBits == 4) {
          const __m512i pairs = m[inner / 8 + i / 2];
          const __m512i code = _mm512_and_si512(i % 2 == 0 ? pairs : _mm512_srli_epi16(pairs, 4), nibble);
          word = _mm512_sub_epi8(code, point);
        } else {
          word = _mm512_xor_si512(m[inner / 4 + i], _mm512_set1_epi8(-128));
        }
        to[i * 2] = word;
        sum = _mm512_dpbusd_epi32(sum, ones, word);
      }
      block.offsets[(at + inner) / kGroupInputs * 2 + half] =
          _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum, 7));
    }
  }
}

void arrange(const RowMatrix& w, const Block& block) {
  for (int half = 0; half < 2; ++half) {
    const int64_t rows = w.rows - half * kLanes;
    arrange_scales(w, half, rows, block);
    w.bits == 4 ? arrange_codes<4>(w, half, rows, block) : arrange_codes<8>(w, half, rows, block);
  }
}

LFM2_ALWAYS __m512i four_inputs(const int8_t* x) {
  int32_t bits;
  std::memcpy(&bits, x, sizeof bits);
  return _mm512_set1_epi32(bits);
}

// What is probably needed next, the rows behind this block's: fetched line by line while this block computes.
struct Ahead {
  uintptr_t at, end;

  LFM2_ALWAYS void step() {
    if (at < end) {
      _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
      at += 64;
    }
  }
};

template <int kTokens>
using TileSums = __m512[kTokens][2];

// Groups `chain`, chain + 4, ... of all rows of a block and `kTokens` tokens.
template <int kTokens, int kBits>
LFM2_ALWAYS void add_chain(const Block& block, const RowMatrix& w, const RowActivations& x, int64_t chain,
                           TileSums<kTokens>& total, Ahead& ahead) {
  for (int t = 0; t < kTokens; ++t) {
    total[t][0] = total[t][1] = _mm512_setzero_ps();
  }
  // A power of two: a shift instead of a division.
  const int scale_shift = __builtin_ctzll(static_cast<uint64_t>(w.group / kGroupInputs));
  for (int64_t group = chain; group < w.columns / kGroupInputs; group += kChains) {
    ahead.step();
    const __m512i* words = block.words + group * (kGroupInputs / 4 * 2);
    const __m512* scales = block.scales + (group >> scale_shift) * 2;
    // At 4 bits word 2*i holds even inputs, word 2*i + 1 odd ones, which lie 64 further on.
    const int8_t* from = x.codes + (kBits == 4 ? group / 4 * 128 + group % 4 * 16 : group * kGroupInputs);
    __m512i sum[kTokens][2];
    for (int t = 0; t < kTokens; ++t) {
      sum[t][0] = block.offsets[group * 2];
      sum[t][1] = block.offsets[group * 2 + 1];
    }
#pragma GCC unroll 8
    for (int i = 0; i < kGroupInputs / 4; ++i) {
      const __m512i first = words[i * 2], second = words[i * 2 + 1];
      const int at = kBits == 4 ? i / 2 * 4 + i % 2 * 64 : i * 4;
#pragma GCC unroll 6
      for (int t = 0; t < kTokens; ++t) {
        const __m512i four = four_inputs(from + t * x.padded + at);
        sum[t][0] = _mm512_dpbusd_epi32(sum[t][0], four, first);
        sum[t][1] = _mm512_dpbusd_epi32(sum[t][1], four, second);
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      const __m512 scale = _mm512_set1_ps(x.scales_of(t)[group]);
      total[t][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t][0]), _mm512_mul_ps(scales[0], scale), total[t][0]);
      total[t][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t][1]), _mm512_mul_ps(scales[1], scale), total[t][1]);
    }
  }
}

template <int kTokens>
LFM2_ALWAYS void add_sums(const TileSums<kTokens>& a, TileSums<kTokens>& to) {
  for (int t = 0; t < kTokens; ++t) {
    to[t][0] = _mm512_add_ps(a[t][0], to[t][0]);
    to[t][1] = _mm512_add_ps(a[t][1], to[t][1]);
  }
}

template <int kTokens, int kBits>
void block_tile(const Block& block, const RowMatrix& w, const RowActivations& x, float* y, int64_t stride,
                Ahead& ahead) {
  TileSums<kTokens> sums[kChains];
  for (int chain = 0; chain < kChains; ++chain) {
    TileSums<kTokens> total;
    add_chain<kTokens, kBits>(block, w, x, chain, total, ahead);
    std::memcpy(sums[chain], total, sizeof total);
  }
  add_sums<kTokens>(sums[0], sums[1]);
  add_sums<kTokens>(sums[2], sums[3]);
  add_sums<kTokens>(sums[1], sums[3]);
  for (int t = 0; t < kTokens; ++t) {
    _mm512_mask_storeu_ps(y + t * stride, first_lanes(w.rows), sums[3][t][0]);
    _mm512_mask_storeu_ps(y + t * stride + kLanes, first_lanes(w.rows - kLanes), sums[3][t][1]);
  }
}

template <int kBits>
void block_bits(const RowMatrix& w, const RowActivations& x, float* y, int64_t stride, const Block& block) {
  const auto next = reinterpret_cast<uintptr_t>(w.row(w.rows));
  Ahead ahead = {next, next + w.rows * w.row_bytes()};
  for (int64_t first = 0; first < x.tokens; first += kTileTokens) {
    const int64_t count = x.tokens - first < kTileTokens ? x.tokens - first : kTileTokens;
    const RowActivations some = x.part(first, count);
    float* to = y + first * stride;
    switch (count) {
      case 1: block_tile<1, kBits>(block, w, some, to, stride, ahead); break;
      case 2: block_tile<2, kBits>(block, w, some, to, stride, ahead); break;
      case 3: block_tile<3, kBits>(block, w, some, to, stride, ahead); break;
      case 4: block_tile<4, kBits>(block, w, some, to, stride, ahead); break;
      case 5: block_tile<5, kBits>(block, w, some, to, stride, ahead); break;
      default: block_tile<6, kBits>(block, w, some, to, stride, ahead);
    }
  }
}

void block(const RowMatrix& w, const RowActivations& x, float* y, int64_t stride, void* scratch) {
  const Block arranged = block_in(scratch, w.columns);
  arrange(w, arranged);
  w.bits == 4 ? block_bits<4>(w, x, y, stride, arranged) : block_bits<8>(w, x, y, stride, arranged);
}

}  // namespace

const RowKernels kAvx512VnniRowKernels = {
    "avx512vnni", quantize, swiglu, dot, block, accumulate_row};

}  // namespace lfm2
