// row_block.h's product with NEON: 8 rows by up to 6 tokens, group by group. Bytes multiply with their sign here, so
// activations are not shifted. A token gets the bits that row_dot.h gives it: there is one chain of sums.
//
// sdot takes 4 inputs of a token out of a register of 16 and multiplies them with those of 4 rows. smmla, where there is
// one, multiplies 8 inputs of 2 rows with those of 2 tokens: rows and tokens are paired then, and so are their sums until
// they are stored.

#pragma once

#include "row_dot.h"

namespace lfm2 {
namespace {

constexpr int64_t kFewTokens = 4;  // by instructions: 4 take as many as in `dot`, 9 fewer than 8 do there
constexpr bool kShifts = false, kTakesSmallGroups = false;
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int kTogether = 2;
#else
constexpr int kTogether = 1;
#endif
constexpr int kTileRowCount = 2 * kLanes;
constexpr int kTileTokens = 6;  // two registers of sums each, two of totals: that leaves 8 for weights and inputs
constexpr int kGroupRegisters = kTileRowCount * kGroupInputs / kBytes;  // of weights

// 8 rows as the tile reads them.
struct Block {
  Bytes* weights;  // [columns / 32][2 halves of the inputs][8], zero point taken out: [4 inputs][2 times 4 rows], or paired
                   // [2 times 8 inputs][4 times 2 rows]
  Floats* scales;  // [groups][kScales]: of 4 rows each, or paired of 2, each twice
};
constexpr int kScales = 2 * kTogether;

// Row `index`, or the last one, whose results are dropped then.
LFM2_ALWAYS int64_t row_or_last(const RowMatrix& w, int index) { return index < w.rows ? index : w.rows - 1; }

void arrange_scales(const RowMatrix& w, const Block& block) {
  for (int64_t first = 0; first < w.groups(); first += kLanes) {
    Floats m[2][kLanes];
    for (int r = 0; r < kTileRowCount; ++r) {
      m[r / kLanes][r % kLanes] = load_scales(w, w.scales_of(row_or_last(w, r)), first, w.groups() - first);
    }
    turn_blocks(m[0]);
    turn_blocks(m[1]);
    for (int64_t i = 0; i < kLanes && first + i < w.groups(); ++i) {
      Floats* to = block.scales + (first + i) * kScales;
      for (int half = 0; half < 2; ++half) {
        const Floats own = m[half][i];
#if defined(__ARM_FEATURE_MATMUL_INT8)
        to[2 * half] = vzip1q_f32(own, own);
        to[2 * half + 1] = vzip2q_f32(own, own);
#else
        to[half] = own;
#endif
      }
    }
  }
}

// 16 inputs of each of 4 rows to 4 registers of the block, `half` of its rows.
LFM2_ALWAYS void store_part(Bytes (&rows)[4], int half, Bytes* to) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  for (int pair = 0; pair < 2; ++pair) {
    const int64x2_t a = vreinterpretq_s64_s8(rows[2 * pair]), b = vreinterpretq_s64_s8(rows[2 * pair + 1]);
    to[2 * half + pair] = vreinterpretq_s8_s64(vzip1q_s64(a, b));
    to[4 + 2 * half + pair] = vreinterpretq_s8_s64(vzip2q_s64(a, b));
  }
#else
  Ints m[4] = {as_ints(rows[0]), as_ints(rows[1]), as_ints(rows[2]), as_ints(rows[3])};
  turn_blocks(m[0], m[1], m[2], m[3]);
  for (int i = 0; i < 4; ++i) {
    to[2 * i + half] = as_bytes(m[i]);
  }
#endif
}

// A group of inputs of 4 rows. The next 8 rows are fetched meanwhile.
template <int kBits>
LFM2_ALWAYS void arrange_group(const RowMatrix& w, const Bytes (&points)[kTileRowCount], int64_t group, int half,
                               Bytes* to) {
  Bytes first[4], second[4];
  for (int r = 0; r < 4; ++r) {
    const uint8_t* from = w.row(row_or_last(w, 4 * half + r)) + group * (kGroupInputs * kBits / 8);
    if (group % (kLine * 8 / kBits / kGroupInputs) == 0) {
      fetch_weights(from, kTileRowCount * w.row_bytes());
    }
    const Bytes codes = load_bytes(from);
    first[r] = vsubq_s8(kBits == 4 ? low_nibbles(codes) : codes, points[4 * half + r]);
    second[r] = vsubq_s8(kBits == 4 ? high_nibbles(codes) : load_bytes(from + kBytes), points[4 * half + r]);
  }
  store_part(first, half, to);
  store_part(second, half, to + kGroupRegisters / 2);
}

template <int kBits>
void arrange_codes(const RowMatrix& w, const Block& block) {
  Bytes points[kTileRowCount];
  for (Bytes& point : points) {
    point = vdupq_n_s8(kBits == 4 ? 8 : -128);
  }
  for (int64_t group = 0; group < w.columns / kGroupInputs; ++group) {
    if (w.zero_points != nullptr && group * kGroupInputs % w.group == 0) {
      const int64_t its = group * kGroupInputs / w.group;
      for (int r = 0; r < kTileRowCount; ++r) {
        points[r] = vdupq_n_s8(w.points_of(row_or_last(w, r))[its / 2] >> its % 2 * 4 & 15);
      }
    }
    Bytes* to = block.weights + group * kGroupRegisters;
    arrange_group<kBits>(w, points, group, 0, to);
    arrange_group<kBits>(w, points, group, 1, to);
  }
}

// Tokens of a tile, in pairs where those are multiplied together: a last one without another is its own partner.
template <int kTokens>
constexpr int kPlaces = (kTokens + kTogether - 1) / kTogether * kTogether;

template <int kTokens>
struct Inputs {
  const int8_t* codes[kPlaces<kTokens>];
  const float* scales[kPlaces<kTokens>];
};

template <int kTokens>
LFM2_ALWAYS Inputs<kTokens> inputs_of(const RowActivations& x) {
  Inputs<kTokens> found;
  for (int t = 0; t < kPlaces<kTokens>; ++t) {
    const int token = t < kTokens ? t : kTokens - 1;
    found.codes[t] = x.codes_of(token);
    found.scales[t] = x.scales_of(token);
  }
  return found;
}

// [token][half of the rows], or paired: row 2 * i and the next one with both tokens, i being 0 to 3.
template <int kTokens>
using TileSums = Floats[kPlaces<kTokens>][2];

#if defined(__ARM_FEATURE_MATMUL_INT8)

// A group's inputs are 16 from `first` on, and 16 from `second` on.
template <int kTokens>
LFM2_ALWAYS void add_group(const Bytes* weights, const Floats* scales, const Inputs<kTokens>& x, int64_t first,
                           int64_t second, int64_t group, TileSums<kTokens>& total) {
  constexpr int kPairs = kPlaces<kTokens> / 2;
  Ints sum[kPairs][4];
  for (int p = 0; p < kPairs; ++p) {
    sum[p][0] = sum[p][1] = sum[p][2] = sum[p][3] = zero_ints();
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const int64_t at = half == 0 ? first : second;
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part, weights += 4) {
#pragma GCC unroll 4
      for (int p = 0; p < kPairs; ++p) {
        const int64x2_t a = vreinterpretq_s64_s8(load_bytes(x.codes[2 * p] + at));
        const int64x2_t b = vreinterpretq_s64_s8(load_bytes(x.codes[2 * p + 1] + at));
        const Bytes pair = vreinterpretq_s8_s64(part == 0 ? vzip1q_s64(a, b) : vzip2q_s64(a, b));
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          sum[p][r] = vmmlaq_s32(sum[p][r], weights[r], pair);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < kPairs; ++p) {
    const float32x2_t both = {x.scales[2 * p][group], x.scales[2 * p + 1][group]};
    const Floats scale = vcombine_f32(both, both);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      Floats& to = total[2 * p + r / 2][r % 2];
      to = fmadd(to_floats(sum[p][r]), mul(scales[r], scale), to);
    }
  }
}

// From pairs to [token][half of the rows].
template <int kTokens>
LFM2_ALWAYS void part_pairs(TileSums<kTokens>& total) {
  for (int t = 0; t < kTokens; t += 2) {
    const Floats upper[] = {total[t][0], total[t][1]}, lower[] = {total[t + 1][0], total[t + 1][1]};
    total[t][0] = vuzp1q_f32(upper[0], upper[1]);
    total[t][1] = vuzp1q_f32(lower[0], lower[1]);
    total[t + 1][0] = vuzp2q_f32(upper[0], upper[1]);
    total[t + 1][1] = vuzp2q_f32(lower[0], lower[1]);
  }
}

#else

template <int kWord, int kTokens>
LFM2_ALWAYS void add_word(const Bytes* weights, const Bytes (&inputs)[kTokens], Ints (&sum)[kTokens][2]) {
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
    sum[t][0] = vdotq_laneq_s32(sum[t][0], weights[2 * kWord], inputs[t], kWord);
    sum[t][1] = vdotq_laneq_s32(sum[t][1], weights[2 * kWord + 1], inputs[t], kWord);
  }
}

// A group's inputs are 16 from `first` on, and 16 from `second` on.
template <int kTokens>
LFM2_ALWAYS void add_group(const Bytes* weights, const Floats* scales, const Inputs<kTokens>& x, int64_t first,
                           int64_t second, int64_t group, TileSums<kTokens>& total) {
  Ints sum[kTokens][2];
  for (int t = 0; t < kTokens; ++t) {
    sum[t][0] = sum[t][1] = zero_ints();
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half, weights += kGroupRegisters / 2) {
    Bytes inputs[kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      inputs[t] = load_bytes(x.codes[t] + (half == 0 ? first : second));
    }
    add_word<0>(weights, inputs, sum);
    add_word<1>(weights, inputs, sum);
    add_word<2>(weights, inputs, sum);
    add_word<3>(weights, inputs, sum);
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
    const Floats scale = broadcast(x.scales[t][group]);
    total[t][0] = fmadd(to_floats(sum[t][0]), mul(scales[0], scale), total[t][0]);
    total[t][1] = fmadd(to_floats(sum[t][1]), mul(scales[1], scale), total[t][1]);
  }
}

template <int kTokens>
LFM2_ALWAYS void part_pairs(TileSums<kTokens>&) {}

#endif

template <int kTokens>
void block_tile(const Block& block, const RowMatrix& w, const RowActivations& x, float* y, int64_t stride) {
  TileSums<kTokens> total;
  for (auto& its : total) {
    its[0] = its[1] = broadcast(0.0f);
  }
  const int scale_shift = __builtin_ctzll(static_cast<uint64_t>(w.group / kGroupInputs));
  const Inputs<kTokens> inputs = inputs_of<kTokens>(x);
  for (int64_t group = 0; group < w.columns / kGroupInputs; ++group) {
    const int64_t input = group * kGroupInputs, first = w.bits == 4 ? inputs_at<4>(input) : inputs_at<8>(input);
    const int64_t second = first + (w.bits == 4 ? Codes<4>::kSecond : Codes<8>::kSecond);
    add_group<kTokens>(block.weights + group * kGroupRegisters, block.scales + (group >> scale_shift) * kScales, inputs,
                       first, second, group, total);
  }
  part_pairs<kTokens>(total);
  for (int t = 0; t < kTokens; ++t) {
    store_first(y + t * stride, total[t][0], w.rows);
    store_first(y + t * stride + kLanes, total[t][1], w.rows - kLanes);
  }
}

// `count` tokens of 1 to kTokens.
template <int kTokens, typename... Arguments>
LFM2_ALWAYS void some_tokens(int64_t count, Arguments&&... arguments) {
  if constexpr (kTokens > 1) {
    if (count < kTokens) {
      return some_tokens<kTokens - 1>(count, arguments...);
    }
  }
  block_tile<kTokens>(arguments...);
}

void block(const RowMatrix& w, const RowActivations& x, float* y, int64_t stride, void* scratch) {
  if (w.group < kGroupInputs) {
    return dot(w, x, y, stride);
  }
  auto* weights = static_cast<Bytes*>(scratch);
  const Block arranged = {weights, reinterpret_cast<Floats*>(weights + w.columns / kGroupInputs * kGroupRegisters)};
  for (int64_t row = 0; row < w.rows; row += kTileRowCount) {
    const RowMatrix some = w.part(row, w.rows - row < kTileRowCount ? w.rows - row : kTileRowCount);
    arrange_scales(some, arranged);
    w.bits == 4 ? arrange_codes<4>(some, arranged) : arrange_codes<8>(some, arranged);
    for (int64_t first = 0; first < x.tokens; first += kTileTokens) {
      const int64_t count = x.tokens - first < kTileTokens ? x.tokens - first : kTileTokens;
      some_tokens<kTileTokens>(count, arranged, some, x.part(first, count), y + first * stride + row, stride);
    }
  }
}

}  // namespace
}  // namespace lfm2
