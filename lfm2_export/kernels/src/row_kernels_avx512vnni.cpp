// row_matrix.h with AVX-512 and VNNI.
//
// dot: a register of codes is 128 inputs of one row (64 at 8 bits); a lane sums up inputs of one group only, so scales are
// spread over lanes and applied once per register. block: 16 rows a register; codes, scales and zero points are turned
// from rows into lanes by transposing 16 x 16 words, which at 4 bits moves 8 weights at once.

#include "lanes_avx512.h"
#include "row_quantize.h"

namespace lfm2 {
namespace {

constexpr int64_t kAhead = 4096;  // bytes of codes: covers DRAM latency, across page boundaries too
constexpr int kMostTokens = 4;    // of one pass of `dot`
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

// Which lane of 16 scales of groups of 32 (or of the weights' groups) belongs to a lane.
LFM2_ALWAYS __m512i lanes_of(int first, int lanes_per_value) {
  alignas(64) int32_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    lanes[i] = first + i / lanes_per_value;
  }
  return _mm512_load_si512(lanes);
}

struct Spread {
  __m512i groups;  // the weights' scales to groups of 32
  int64_t per_piece;
  int64_t scales_ahead, points_ahead;  // bytes: those of the codes that are fetched meanwhile
};

LFM2_ALWAYS Spread spread_of(const RowMatrix& w) {
  const int64_t ahead = kAhead * 8 / w.bits / w.group;
  return {lanes_of(0, static_cast<int>(w.group / kGroupInputs)), kPadding / w.group, ahead * (w.half_scales ? 2 : 4),
          ahead / 2};
}

// May lie behind the tensor's end: harmless.
LFM2_ALWAYS void fetch_ahead(const uint8_t* at, int64_t bytes) {
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(at) + bytes), _MM_HINT_T0);
}

// Sums of one token that do not wait for each other: a multiply-add takes four cycles.
constexpr int sums_of(int tokens) {
  return tokens == 1 ? 4 : tokens == 2 ? 2 : 1;
}

// 512 inputs of a row with `kTokens` tokens: codes of `piece` begin at `codes`, `left` inputs are there at most.
template <int kBits, int kTokens, bool kWhole>
LFM2_ALWAYS void add_piece(const RowMatrix& w, const uint8_t* codes, const uint8_t* scales, const uint8_t* points,
                           int64_t piece, int64_t left, const Spread& spread, const RowActivations& x,
                           __m512 (&total)[kTokens][sums_of(kTokens)]) {
  constexpr int kSums = sums_of(kTokens);
  constexpr int kRegisters = kBits == 4 ? 4 : 8;
  const int64_t first = piece * spread.per_piece;
  const __mmask16 mask = first_lanes(kWhole ? spread.per_piece : left / w.group);
  fetch_ahead(scales + first * (w.half_scales ? 2 : 4), spread.scales_ahead);
  if (points != nullptr) {
    fetch_ahead(points + first / 2, spread.points_ahead);
  }
  const __m512 scale = load_scales(scales, first, mask, w.half_scales);
  const __m512 point = points == nullptr ? _mm512_set1_ps(kBits == 4 ? 8 : 128) : load_points(points, first, mask);
  const __m512 offset = _mm512_permutexvar_ps(spread.groups, _mm512_mul_ps(scale, point));
  const __m512 spread_scale = _mm512_permutexvar_ps(spread.groups, scale);
  __m512 both[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    const __mmask16 own = first_lanes(left / kGroupInputs);
    const int64_t own_first = piece * (kPadding / kGroupInputs);
    total[t][0] = _mm512_fnmadd_ps(offset, _mm512_maskz_loadu_ps(own, x.sums_of(t) + own_first), total[t][0]);
    both[t] = _mm512_mul_ps(spread_scale, _mm512_maskz_loadu_ps(own, x.scales_of(t) + own_first));
  }
  const __m512i nibble = _mm512_set1_epi8(15);
#pragma GCC unroll 8
  for (int r = 0; r < kRegisters; ++r) {
    const uint8_t* at = codes + piece * (kPadding * kBits / 8) + r * 64;
    fetch_ahead(at, kAhead);
    const __m512i bytes = kWhole ? _mm512_loadu_si512(at)
                                 : _mm512_maskz_loadu_epi8(first_bytes(left * kBits / 8 - r * 64), at);
    const __m512i low = kBits == 4 ? _mm512_and_si512(bytes, nibble) : bytes;
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
    const __m512i lanes = kBits == 4 ? lanes_of(4 * r, 4) : lanes_of(2 * r, 8);
    for (int t = 0; t < kTokens; ++t) {
      const int8_t* inputs = x.codes_of(t) + piece * kPadding + r * (kBits == 4 ? 128 : 64);
      __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, _mm512_loadu_si512(inputs));
      if (kBits == 4) {
        sum = _mm512_dpbusd_epi32(sum, high, _mm512_loadu_si512(inputs + 64));
      }
      __m512& to = total[t][(r + 1) % kSums];
      to = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_permutexvar_ps(lanes, both[t]), to);
    }
  }
}

template <int kBits, int kTokens>
void dot_tokens(const RowMatrix& w, const RowActivations& x, float* y, int64_t stride) {
  constexpr int kSums = sums_of(kTokens);
  const Spread spread = spread_of(w);
  const int64_t whole = w.columns / kPadding, left = w.columns % kPadding;
  // Divisions, which are as slow as a row: not in the loop.
  const int64_t row_bytes = w.row_bytes(), scale_bytes = w.scale_bytes(), point_bytes = w.point_bytes();
  const uint8_t *codes = w.codes, *scales = w.scales_of(0), *points = w.zero_points;
  for (int64_t row = 0; row < w.rows; ++row) {
    __m512 total[kTokens][kSums] = {};
    for (int64_t piece = 0; piece < whole; ++piece) {
      add_piece<kBits, kTokens, true>(w, codes, scales, points, piece, kPadding, spread, x, total);
    }
    if (left > 0) {
      add_piece<kBits, kTokens, false>(w, codes, scales, points, whole, left, spread, x, total);
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int i = 1; i < kSums; ++i) {
        total[t][0] = _mm512_add_ps(total[t][0], total[t][i]);
      }
      y[t * stride + row] = _mm512_reduce_add_ps(total[t][0]);
    }
    codes += row_bytes;
    scales += scale_bytes;
    points = points == nullptr ? nullptr : points + point_bytes;
  }
}

template <int kBits>
void dot_bits(const RowMatrix& w, const RowActivations& x, float* y, int64_t stride) {
  for (int64_t first = 0; first < x.tokens; first += kMostTokens) {
    const int64_t count = x.tokens - first < kMostTokens ? x.tokens - first : kMostTokens;
    const RowActivations some = x.part(first, count);
    float* to = y + first * stride;
    switch (count) {
      case 1: dot_tokens<kBits, 1>(w, some, to, stride); break;
      case 2: dot_tokens<kBits, 2>(w, some, to, stride); break;
      case 3: dot_tokens<kBits, 3>(w, some, to, stride); break;
      default: dot_tokens<kBits, 4>(w, some, to, stride);
    }
  }
}

void dot(const RowMatrix& w, const RowActivations& x, float* y, int64_t stride) {
  w.bits == 4 ? dot_bits<4>(w, x, y, stride) : dot_bits<8>(w, x, y, stride);
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

template <int kTokens, int kBits>
void block_tile(const Block& block, const RowMatrix& w, const RowActivations& x, float* y, int64_t stride,
                Ahead& ahead) {
  __m512 total[kTokens][2];
  for (int t = 0; t < kTokens; ++t) {
    total[t][0] = total[t][1] = _mm512_setzero_ps();
  }
  const int64_t groups_per_scale = w.group / kGroupInputs;
  const int8_t* inputs = x.codes;
  const __m512* scales = block.scales;
  int64_t until_next = groups_per_scale;
  for (int64_t group = 0; group < w.columns / kGroupInputs; ++group) {
    ahead.step();
    const __m512i* words = block.words + group * (kGroupInputs / 4 * 2);
    // At 4 bits word 2*i holds even inputs, word 2*i + 1 odd ones, which lie 64 further on.
    const int8_t* from = kBits == 4 ? inputs + group / 4 * 128 + group % 4 * 16 : inputs + group * kGroupInputs;
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
    if (--until_next == 0) {
      until_next = groups_per_scale;
      scales += 2;
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    _mm512_mask_storeu_ps(y + t * stride, first_lanes(w.rows), total[t][0]);
    _mm512_mask_storeu_ps(y + t * stride + kLanes, first_lanes(w.rows - kLanes), total[t][1]);
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
