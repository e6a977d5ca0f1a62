// The product of row_matrix.h for few tokens: 4 rows at once. A register of codes is a part of one row; the whole numbers that
// it gives with a token are added up within each group of 32, so that a register holds kBlocks groups of 4 rows before
// anything becomes a float. Where the weights' groups have 16 inputs, so have the activations', and there are kShares = 2
// such registers: of the first halves, and of the second ones. Elsewhere kShares is 1.
//
// A token has the same bits, whatever the others: of each group the exact whole number, times both scales; groups 0, kBlocks,
// 2 * kBlocks... are added up in this order, so are those from 1 on, and so forth; then the chains' sums, (0 + 1) + (2 + 3).
// The halves of 32 inputs are added up in the place of their whole, one after the other.

#pragma once

#include "lanes.h"
#include "row_matrix.h"

namespace lfm2 {
namespace {

constexpr int64_t kAhead = 4096;  // bytes of codes: covers DRAM latency, across page boundaries too
// Into the second-level cache, not the first: that one has few lines under way at once, and DRAM keeps it waiting. On
// x86 a row of 4 bits then comes 1.10 times as fast, one of 8 bits 1.06 times; NEON was not measured and stays as it was.
#if defined(__AVX2__)
constexpr int kFetchLocality = 2;
#else
constexpr int kFetchLocality = 3;
#endif
constexpr int kRows = 4;          // of a tile of `dot`
constexpr int kSets = 4;          // of a piece: registers of scales, whose groups fill a register of each row
constexpr int kPartInputs = kBlocks * kGroupInputs;
// Tokens of one pass of `dot`: AVX-512 has registers for the sums of so many. For groups of 16, which few matrices have, half
// as many: a quarter of the code.
template <int kShares>
constexpr int kMostTokens = (kLanes == 16 ? 12 : 8) / kShares;
constexpr int64_t kLine = 64;

// A line of the weights `bytes` after `at`, which may lie behind the tensor's end: harmless.
LFM2_ALWAYS void fetch_weights(const uint8_t* at, int64_t bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(at) + bytes), 0, kFetchLocality);
}

// 4 rows of a matrix. Where fewer are left, the last one is taken again, and its results are dropped.
struct Rows {
  const uint8_t* codes[kRows];
  const uint8_t* scales[kRows];
  const uint8_t* points[kRows];  // null: there are none
};

// A piece, the inputs whose scales fill a register, has so many parts, of kShares sets each.
template <int kShares>
struct Piece {
  static constexpr int kParts = kSets / kShares;
  static constexpr int kInputs = kParts * kPartInputs;
};

// Which group of a piece block 0 of a set is; that of the next block is kShares further on.
template <int kShares>
LFM2_ALWAYS int first_group(int set) {
  return set / kShares * (kShares * kBlocks) + set % kShares;
}

// What is the same for all tiles of a matrix.
struct Walk {
  Order turned;       // a register of a row's groups to the sets', as `turn_blocks` wants them
  Order spread;       // some weights' groups to the activations' of a set, where
  bool is_spread;     // a group of the weights is several of the activations
  int shift;          // inputs to the weights' groups: a power of two, so no division
  int64_t groups, row_bytes, scale_bytes, point_bytes;  // of a row
  int64_t codes_ahead, scales_ahead, points_ahead;      // bytes to what is fetched meanwhile: rows of a later tile
};

template <int kShares>
LFM2_ALWAYS Walk walk_of(const RowMatrix& w) {
  alignas(64) int32_t turned[kLanes], spread[kLanes];
  const auto groups_per_scale = static_cast<int32_t>(w.group * kShares / kGroupInputs);
  for (int lane = 0; lane < kLanes; ++lane) {
    turned[lane] = first_group<kShares>(lane % 4) + lane / 4 * kShares;
    spread[lane] = lane / 4 / groups_per_scale * 4 + lane % 4;
  }
  const int64_t tile = kRows * w.row_bytes(), tiles = (kAhead + tile - 1) / tile;
  return {load_order(turned),
          load_order(spread),
          groups_per_scale > 1,
          __builtin_ctzll(static_cast<uint64_t>(w.group)),
          w.groups(),
          w.row_bytes(),
          w.scale_bytes(),
          w.point_bytes(),
          tiles * tile,
          tiles * kRows * w.scale_bytes(),
          tiles * kRows * w.point_bytes()};
}

LFM2_ALWAYS Rows rows_from(const RowMatrix& w, int64_t first, const Walk& walk) {
  Rows rows;
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r < w.rows ? first + r : w.rows - 1;
    rows.codes[r] = w.codes + row * walk.row_bytes;
    rows.scales[r] = static_cast<const uint8_t*>(w.scales) + row * walk.scale_bytes;
    rows.points[r] = w.zero_points == nullptr ? nullptr : w.zero_points + row * walk.point_bytes;
  }
  return rows;
}

LFM2_ALWAYS Floats load_scales(const RowMatrix& w, const uint8_t* scales, int64_t first, int64_t count) {
  return w.half_scales ? load_halves_first(scales + first * 2, count) : load_first(scales + first * 4, count);
}

// Scales and zero points of some of 4 rows' groups as floats: of each group the rows side by side, groups in the order in
// which sets take them. Turning them once for some thousand inputs takes a fraction of what it takes piece by piece.
struct Factors {
  static constexpr int64_t kGroups = 64;
  alignas(64) float scales[(kGroups + kBlocks) * kRows];  // a register is read from any group on
  alignas(64) float points[(kGroups + kBlocks) * kRows];
};

LFM2_ALWAYS void store_sets(Floats (&rows)[kRows], float* to) {
  static_assert(kRows == kSets);
  turn_blocks(rows);
  for (int set = 0; set < kSets; ++set) {
    store(to + set * kLanes, rows[set]);
  }
}

// Groups of each row that fill a register; where `count` are fewer, what is behind them is 0.
template <bool kPoints>
LFM2_ALWAYS void load_some_factors(const RowMatrix& w, const Rows& rows, int64_t first, int64_t count, const Walk& walk,
                                   float* scales, float* points) {
  Floats four[kRows];
  for (int r = 0; r < kRows; ++r) {
    fetch_weights(rows.scales[r] + first * (w.half_scales ? 2 : 4), walk.scales_ahead);
    four[r] = permute(load_scales(w, rows.scales[r], first, count), walk.turned);
  }
  store_sets(four, scales);
  if (kPoints) {
    for (int r = 0; r < kRows; ++r) {
      fetch_weights(rows.points[r] + first / 2, walk.points_ahead);
      four[r] = permute(load_nibbles_first(rows.points[r], first, count), walk.turned);
    }
    store_sets(four, points);
  }
}

// `count` groups of each row from `first` on. Not inline: it is the same for any number of tokens.
template <bool kPoints>
__attribute__((noinline)) void load_factors(const RowMatrix& w, const Rows& rows, int64_t first, int64_t count,
                                            const Walk& walk, Factors& to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    load_some_factors<kPoints>(w, rows, first + i, kLanes, walk, to.scales + i * kRows, to.points + i * kRows);
  }
  if (i < count) {
    load_some_factors<kPoints>(w, rows, first + i, count - i, walk, to.scales + i * kRows, to.points + i * kRows);
  }
}

// A set's, from its first group on.
LFM2_ALWAYS Floats load_set(const float* factors, int64_t group, const Walk& walk) {
  const Floats found = load(factors + group * kRows);
  return kBlocks > 1 && walk.is_spread ? permute(found, walk.spread) : found;
}

template <bool kWhole>
LFM2_ALWAYS Bytes load_part(const uint8_t* at, int64_t left) {
  return kWhole ? load_bytes(at) : load_bytes_first(at, left);
}

// A part of each row: at 4 bits its even inputs, then the odd ones; at 8 bits half of them, then the others.
template <int kBits>
struct Codes;

template <>
struct Codes<4> {
  static constexpr int kSecond = 64;  // bytes to the second half's inputs in the activations
  Bytes first[kRows], second[kRows];

  template <bool kWhole>
  LFM2_ALWAYS void load(int r, const uint8_t* from, int64_t left) {
    const Bytes bytes = load_part<kWhole>(from, left);
    first[r] = low_nibbles(bytes);
    second[r] = high_nibbles(bytes);
  }
  LFM2_ALWAYS auto times(int r, Bytes a, Bytes b) const { return nibble_products(first[r], second[r], a, b); }
  LFM2_ALWAYS void sum_halves(Bytes a, Bytes b, Ints (&to)[2]) const {
    decltype(times(0, a, b)) m[kRows];
    for (int r = 0; r < kRows; ++r) {
      m[r] = times(r, a, b);
    }
    halves_of_rows(m, to);
  }
};

template <>
struct Codes<8> {
  static constexpr int kSecond = kBytes;
  ByteWeights first[kRows], second[kRows];

  template <bool kWhole>
  LFM2_ALWAYS void load(int r, const uint8_t* from, int64_t left) {
    first[r] = byte_weights(load_part<kWhole>(from, left));
    second[r] = byte_weights(load_part<kWhole>(from + kBytes, left - kBytes));
  }
  LFM2_ALWAYS auto times(int r, Bytes a, Bytes b) const { return byte_products(first[r], second[r], a, b); }
  LFM2_ALWAYS void sum_halves(Bytes a, Bytes b, Ints (&to)[2]) const {
    Ints m[kRows], n[kRows];  // a block is half of a group of 32
    for (int r = 0; r < kRows; ++r) {
      m[r] = add_byte_products(zero_ints(), first[r], a);
      n[r] = add_byte_products(zero_ints(), second[r], b);
    }
    every_second_block(sums_of_rows(m), sums_of_rows(n), to);
  }
};

// A part's whole numbers, without its zero points.
template <int kBits>
LFM2_ALWAYS void add_up(const Codes<kBits>& codes, Bytes a, Bytes b, Ints (&to)[1]) {
  decltype(codes.times(0, a, b)) m[kRows];
  for (int r = 0; r < kRows; ++r) {
    m[r] = codes.times(r, a, b);
  }
  to[0] = sums_of_rows(m);
}

template <int kBits>
LFM2_ALWAYS void add_up(const Codes<kBits>& codes, Bytes a, Bytes b, Ints (&to)[2]) {
  codes.sum_halves(a, b, to);
}

// Where in a token's codes a part's inputs begin.
template <int kBits>
LFM2_ALWAYS int64_t inputs_at(int64_t input) {
  return kBits == 8 ? input : input / 128 * 128 + input % 128 / 2;
}

// A piece of 4 rows with `kTokens` tokens; `left` inputs are there at most.
template <int kBits, int kShares, bool kPoints, int kTokens, bool kWhole>
LFM2_ALWAYS void add_piece(const Rows& rows, int64_t piece, int64_t left, const Walk& walk, const Factors& factors,
                           int64_t first_factor, const RowActivations& x, Floats (&total)[kTokens]) {
  constexpr int kPartBytes = kPartInputs * kBits / 8, kParts = Piece<kShares>::kParts;
  const int64_t own = kWhole ? kLanes : left * kShares / kGroupInputs, first = piece * kLanes;
#pragma GCC unroll 4
  for (int part = 0; part < kParts; ++part) {
    const int64_t at = (piece * kParts + part) * kPartBytes;
    Codes<kBits> codes;
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* from = rows.codes[r] + at;
      codes.template load<kWhole>(r, from, left * kBits / 8 - part * kPartBytes);
    }
    // As they lie in memory, not as they are read: processors' own prefetching then helps (AVX2, T = 1: 1.16 times as fast).
    for (int64_t line = 0; line < kRows * kPartBytes; line += kLine) {
      fetch_weights(rows.codes[0] + at * kRows + line, walk.codes_ahead);
    }
    Order blocks[kShares];
    Floats weight_scales[kShares], points[kShares];
    for (int share = 0; share < kShares; ++share) {
      const int64_t set = (piece * kParts + part) * kShares + share;
      const int64_t group = (kShares == 1 ? set * kPartInputs >> walk.shift : set * kBlocks) - first_factor;
      blocks[share] = order_of(first_group<kShares>(part * kShares + share), 4, kShares);
      weight_scales[share] = load_set(factors.scales, group, walk);
      points[share] = kPoints ? load_set(factors.points, group, walk) : broadcast(kBits == 4 ? 8 : kByteZero);
    }
    const int64_t inputs = inputs_at<kBits>((piece * kParts + part) * kPartInputs);
#pragma GCC unroll 12
    for (int t = 0; t < kTokens; ++t) {
      const Bytes a = load_bytes(x.codes_of(t) + inputs);
      const Bytes b = load_bytes(x.codes_of(t) + inputs + Codes<kBits>::kSecond);
      Ints products[kShares];
      add_up(codes, a, b, products);
      for (int share = 0; share < kShares; ++share) {
        const Floats sums = permute(load_first(x.sums_of(t) + first, own), blocks[share]);
        const Floats scales = permute(load_first(x.scales_of(t) + first, own), blocks[share]);
        // Whole numbers below 2^24: exact.
        const Floats centred = fnmadd(points[share], sums, to_floats(products[share]));
        total[t] = fmadd(centred, mul(weight_scales[share], scales), total[t]);
      }
    }
  }
}

LFM2_ALWAYS void store_rows(Floats sums, int64_t count, float* y) {
  if (count >= kRows) {
    return store_sum_of_blocks(y, sums);
  }
  alignas(16) float all[kRows];
  store_sum_of_blocks(all, sums);
  std::memcpy(y, all, static_cast<size_t>(count) * sizeof(float));
}

template <int kBits, int kShares, bool kPoints, int kTokens>
void dot_tokens(const RowMatrix& w, const RowActivations& x, float* y, int64_t stride) {
  constexpr int kPieceInputs = Piece<kShares>::kInputs;
  const Walk walk = walk_of<kShares>(w);
  const int64_t whole = w.columns / kPieceInputs, left = w.columns % kPieceInputs, pieces = whole + (left > 0);
  const int64_t at_once = (Factors::kGroups << walk.shift) / kPieceInputs;  // pieces whose factors are there
  Factors factors;
  for (int64_t row = 0; row < w.rows; row += kRows) {
    const Rows rows = rows_from(w, row, walk);
    Floats total[kTokens];
    for (int t = 0; t < kTokens; ++t) {
      total[t] = broadcast(0.0f);
    }
    for (int64_t begin = 0; begin < pieces; begin += at_once) {
      const int64_t group = begin * kPieceInputs >> walk.shift, more = walk.groups - group;
      load_factors<kPoints>(w, rows, group, more < Factors::kGroups ? more : Factors::kGroups, walk, factors);
      const int64_t end = begin + at_once < pieces ? begin + at_once : pieces;
      for (int64_t piece = begin; piece < (end < whole ? end : whole); ++piece) {
        add_piece<kBits, kShares, kPoints, kTokens, true>(rows, piece, kPieceInputs, walk, factors, group, x, total);
      }
      if (end > whole) {
        add_piece<kBits, kShares, kPoints, kTokens, false>(rows, whole, left, walk, factors, group, x, total);
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      store_rows(total[t], w.rows - row, y + t * stride + row);
    }
  }
}

// All of x, 1 to `kTokens` of them.
template <int kBits, int kShares, bool kPoints, int kTokens>
LFM2_ALWAYS void dot_some(const RowMatrix& w, const RowActivations& x, float* y, int64_t stride) {
  if constexpr (kTokens > 1) {
    if (x.tokens < kTokens) {
      return dot_some<kBits, kShares, kPoints, kTokens - 1>(w, x, y, stride);
    }
  }
  dot_tokens<kBits, kShares, kPoints, kTokens>(w, x, y, stride);
}

template <int kBits, int kShares, bool kPoints>
void dot_points(const RowMatrix& w, const RowActivations& x, float* y, int64_t stride) {
  constexpr int64_t kMost = kMostTokens<kShares>;
  for (int64_t first = 0; first < x.tokens; first += kMost) {
    const int64_t count = x.tokens - first < kMost ? x.tokens - first : kMost;
    dot_some<kBits, kShares, kPoints, kMost>(w, x.part(first, count), y + first * stride, stride);
  }
}

template <int kShares>
LFM2_ALWAYS void dot_shares(const RowMatrix& w, const RowActivations& x, float* y, int64_t stride) {
  if (w.bits == 8) {
    dot_points<8, kShares, false>(w, x, y, stride);
  } else if (w.zero_points == nullptr) {
    dot_points<4, kShares, false>(w, x, y, stride);
  } else {
    dot_points<4, kShares, true>(w, x, y, stride);
  }
}

void dot(const RowMatrix& w, const RowActivations& x, float* y, int64_t stride) {
  x.small_groups ? dot_shares<kSmallShares>(w, x, y, stride) : dot_shares<1>(w, x, y, stride);
}

}  // namespace
}  // namespace lfm2
