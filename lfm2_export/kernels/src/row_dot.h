// The product of row_matrix.h for few tokens: 4 rows at once. A register of codes is a part of one row; the whole numbers that
// it gives with a token are added up within each group of 32, so that a register holds kBlocks groups of 4 rows before
// anything becomes a float.
//
// A token has the same bits, whatever the others: of each group the exact whole number, times both scales; groups 0, kBlocks,
// 2 * kBlocks... are added up in this order, so are those from 1 on, and so forth; then the chains' sums, (0 + 1) + (2 + 3).

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
constexpr int kParts = 4;         // of a piece
constexpr int kPartInputs = kBlocks * kGroupInputs;
constexpr int kPieceInputs = kParts * kPartInputs;  // whose scales fill a register
constexpr int kMostTokens = 8;                      // of one pass of `dot`
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
  Order spread;       // the weights' groups of a piece to groups of 32, as `turn_blocks` wants them
  int shift;          // inputs to the weights' groups: a power of two, so no division
  int64_t per_piece;  // weights' groups that a piece has a share in
  int64_t codes_ahead, scales_ahead, points_ahead;  // bytes to what is fetched meanwhile: rows of a later tile
};

LFM2_ALWAYS Walk walk_of(const RowMatrix& w) {
  alignas(64) int32_t spread[kLanes];
  const auto groups_per_scale = static_cast<int32_t>(w.group / kGroupInputs);
  for (int lane = 0; lane < kLanes; ++lane) {
    spread[lane] = (lane % 4 * kBlocks + lane / 4) / groups_per_scale;
  }
  const int64_t tile = kRows * w.row_bytes(), tiles = (kAhead + tile - 1) / tile;
  const int64_t per_piece = kPieceInputs / w.group;
  return {load_order(spread),
          __builtin_ctzll(static_cast<uint64_t>(w.group)),
          per_piece > 0 ? per_piece : 1,
          tiles * tile,
          tiles * kRows * w.scale_bytes(),
          tiles * kRows * w.point_bytes()};
}

LFM2_ALWAYS Floats load_scales(const RowMatrix& w, const uint8_t* scales, int64_t first, int64_t count) {
  return w.half_scales ? load_halves_first(scales + first * 2, count) : load_first(scales + first * 4, count);
}

// Scales and zero points of a piece: of part p, block b of a register is group kBlocks * p + b, a lane of it a row.
struct Factors {
  Floats scales[kParts];
  Floats points[kParts];
};

template <int kBits, bool kPoints, bool kWhole>
LFM2_ALWAYS void load_factors(const RowMatrix& w, const Rows& rows, int64_t piece, int64_t left, const Walk& walk,
                              Factors& to) {
  static_assert(kRows == kParts);
  const int64_t first = piece * kPieceInputs >> walk.shift;
  const int64_t in_tail = left >> walk.shift;
  const int64_t count = kWhole ? walk.per_piece : in_tail > 0 ? in_tail : 1;
  for (int r = 0; r < kRows; ++r) {
    fetch_weights(rows.scales[r] + first * (w.half_scales ? 2 : 4), walk.scales_ahead);
    to.scales[r] = permute(load_scales(w, rows.scales[r], first, count), walk.spread);
    if (kPoints) {
      fetch_weights(rows.points[r] + first / 2, walk.points_ahead);
      to.points[r] = permute(load_nibbles_first(rows.points[r], first, count), walk.spread);
    } else {
      to.points[r] = broadcast(kBits == 4 ? 8 : kByteZero);
    }
  }
  turn_blocks(to.scales);
  if (kPoints) {
    turn_blocks(to.points);
  }
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
};

// Where in a token's codes a part's inputs begin.
template <int kBits>
LFM2_ALWAYS int64_t inputs_at(int64_t input) {
  return kBits == 8 ? input : input / 128 * 128 + input % 128 / 2;
}

// A piece of 4 rows with `kTokens` tokens; `left` inputs are there at most.
template <int kBits, bool kPoints, int kTokens, bool kWhole>
LFM2_ALWAYS void add_piece(const RowMatrix& w, const Rows& rows, int64_t piece, int64_t left, const Walk& walk,
                           const RowActivations& x, Floats (&total)[kTokens]) {
  constexpr int kPartBytes = kPartInputs * kBits / 8;
  Factors factors;
  load_factors<kBits, kPoints, kWhole>(w, rows, piece, left, walk, factors);
  const int64_t own = kWhole ? kLanes : left / kGroupInputs, first = piece * kLanes;
#pragma GCC unroll 4
  for (int part = 0; part < kParts; ++part) {
    const int64_t at = (piece * kParts + part) * kPartBytes;
    Codes<kBits> codes;
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* from = rows.codes[r] + at;
      codes.template load<kWhole>(r, from, left * kBits / 8 - part * kPartBytes);
      for (int64_t line = 0; line < kPartBytes; line += kLine) {
        if (part * kPartBytes % kLine == 0) {
          fetch_weights(from + line, walk.codes_ahead);
        }
      }
    }
    const Order blocks = order_of(kBlocks * part, 4);
    const int64_t inputs = inputs_at<kBits>(piece * kPieceInputs + part * kPartInputs);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const Bytes a = load_bytes(x.codes_of(t) + inputs);
      const Bytes b = load_bytes(x.codes_of(t) + inputs + Codes<kBits>::kSecond);
      decltype(codes.times(0, a, b)) m[kRows];
      for (int r = 0; r < kRows; ++r) {
        m[r] = codes.times(r, a, b);
      }
      const Floats sums = permute(load_first(x.sums_of(t) + first, own), blocks);
      const Floats scales = permute(load_first(x.scales_of(t) + first, own), blocks);
      // Whole numbers below 2^24: exact.
      const Floats centred = fnmadd(factors.points[part], sums, to_floats(sums_of_rows(m)));
      total[t] = fmadd(centred, mul(factors.scales[part], scales), total[t]);
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

template <int kBits, bool kPoints, int kTokens>
void dot_tokens(const RowMatrix& w, const RowActivations& x, float* y, int64_t stride) {
  const Walk walk = walk_of(w);
  const int64_t whole = w.columns / kPieceInputs, left = w.columns % kPieceInputs;
  for (int64_t row = 0; row < w.rows; row += kRows) {
    const Rows rows = rows_from(w, row);
    Floats total[kTokens];
    for (int t = 0; t < kTokens; ++t) {
      total[t] = broadcast(0.0f);
    }
    for (int64_t piece = 0; piece < whole; ++piece) {
      add_piece<kBits, kPoints, kTokens, true>(w, rows, piece, kPieceInputs, walk, x, total);
    }
    if (left > 0) {
      add_piece<kBits, kPoints, kTokens, false>(w, rows, whole, left, walk, x, total);
    }
    for (int t = 0; t < kTokens; ++t) {
      store_rows(total[t], w.rows - row, y + t * stride + row);
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

}  // namespace
}  // namespace lfm2
