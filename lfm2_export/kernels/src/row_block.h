// The product of row_matrix.h for many tokens: 2 * kLanes rows, whose codes, scales and zero points are turned from rows into
// lanes by transposing words, which at 4 bits moves 8 weights at once. A token gets the bits that row_dot.h gives it.

#pragma once

#include "row_dot.h"

namespace lfm2 {
namespace {

// One token more would be another pass of `dot`, which takes as long. AVX-512: on a Sapphire Rapids the 1.2B over 4 tokens
// took 1.18 steps and over 8 1.77 in `dot`, over 9 2.27 and over 12 2.53 in `block`; that `dot` goes on at that rate up to 12
// is expected, not measured. Without VNNI `dot` gains less from more tokens: at 5 `block` takes as long with 4 bits, at
// 6 less (with 8 bits 0.8 of the time, before its sums stayed in registers).
#if defined(__AVX512F__)
constexpr int64_t kFewTokens = 12;
#elif defined(__AVXVNNI__)
constexpr int64_t kFewTokens = 8;
#else
constexpr int64_t kFewTokens = 5;
#endif
constexpr bool kShifts = true, kTakesSmallGroups = true;
constexpr int kChains = kBlocks;                   // of sums that are added up apart
constexpr int kTileTokens = kLanes == 16 ? 6 : 4;  // of a pass: two registers of sums each

// A block's rows as lanes. Words come in the order in which activations lie: at 4 bits, of 8 inputs the even ones, then
// the odd ones.
struct Block {
  Ints* words;     // [columns / 4][2]: 4 weights, zero point taken out
  Ints* offsets;   // [columns / 32 * kShares][2]: -128 * a group's sum, which takes the activations' shift out
  Floats* scales;  // [groups][2]
};

// A chain's groups lie side by side, as they are read.
struct GroupOrder {
  int64_t least, more;  // groups of a chain; how many of the first chains have one more

  LFM2_ALWAYS int64_t begin(int64_t chain) const { return chain * least + (chain < more ? chain : more); }
  LFM2_ALWAYS int64_t of(int64_t group) const { return begin(group % kChains) + group / kChains; }
};

LFM2_ALWAYS GroupOrder order_of_groups(int64_t columns) {
  const int64_t groups = columns / kGroupInputs;
  return {groups / kChains, groups % kChains};
}

Block block_in(void* scratch, int64_t columns, int shares) {
  auto* words = static_cast<Ints*>(scratch);
  Ints* offsets = words + columns / 4 * 2;
  return {words, offsets, reinterpret_cast<Floats*>(offsets + columns / kGroupInputs * shares * 2)};
}

LFM2_ALWAYS void load_words(const uint8_t* from, int64_t stride, int64_t rows, int64_t bytes, Ints (&m)[kLanes]) {
  for (int r = 0; r < kLanes; ++r) {
    m[r] = r < rows ? load_bytes_first(from + r * stride, bytes) : zero_ints();
  }
  transpose(m);
}

void arrange_scales(const RowMatrix& w, int half, int64_t rows, const Block& block) {
  for (int64_t first = 0; first < w.groups(); first += kLanes) {
    Ints m[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      m[r] = r < rows ? as_ints(load_scales(w, w.scales_of(half * kLanes + r), first, w.groups() - first)) : zero_ints();
    }
    transpose(m);
    for (int64_t i = 0; i < kLanes && first + i < w.groups(); ++i) {
      block.scales[(first + i) * 2 + half] = as_floats(m[i]);
    }
  }
}

constexpr int64_t kPointGroups = 8 * kLanes;  // whose zero points a register of a row holds, 8 in a word

template <int kBits, int kShares>
LFM2_ALWAYS void arrange_codes(const RowMatrix& w, int half, int64_t rows, const Block& block) {
  constexpr int kInputs = kBytes * 8 / kBits;  // in a register of a row
  constexpr int kShare = kGroupInputs / kShares, kWords = kShare / 4;
  const bool has_points = w.zero_points != nullptr;
  const GroupOrder order = order_of_groups(w.columns);
  Ints points[kLanes];
  for (int64_t at = 0; at < w.columns; at += kInputs) {
    const int64_t left = w.columns - at < kInputs ? w.columns - at : kInputs;
    if (has_points && at / w.group % kPointGroups == 0 && at % w.group == 0) {
      const int64_t bytes = w.point_bytes() - at / w.group / 2;
      load_words(w.points_of(half * kLanes) + at / w.group / 2, w.point_bytes(), rows, bytes, points);
    }
    Ints m[kLanes];
    load_words(w.row(half * kLanes) + at * kBits / 8, w.row_bytes(), rows, left * kBits / 8, m);
    for (int64_t inner = 0; inner < left; inner += kShare) {
      const int64_t group = (at + inner) / w.group % kPointGroups;
      const Bytes point = has_points ? nibble_of_lanes(points[group / 8], group % 8) : broadcast_byte(8);
      const int64_t place = order.of((at + inner) / kGroupInputs) * kShares + inner / kShare % kShares;
      Ints* to = block.words + place * (kWords * 2) + half;
      Bytes four_bits = zero_ints();  // 8 weights below 16 at most: a byte holds their sum
      Ints sum = zero_ints();
      for (int i = 0; i < kWords; ++i) {
        Bytes word;
        if (kBits == 4) {
          const Bytes pairs = m[inner / 8 + i / 2];
          word = sub_bytes(i % 2 == 0 ? low_nibbles(pairs) : high_nibbles(pairs), point);
          four_bits = add_bytes(four_bits, word);
        } else {
          word = exclusive_or(m[inner / 4 + i], broadcast_byte(-kShift));
          sum = add_quads(sum, word);
        }
        to[i * 2] = word;
      }
      sum = kBits == 4 ? add_quads(sum, four_bits) : sum;
      block.offsets[place * 2 + half] = sub_ints(zero_ints(), times_128(sum));
    }
  }
}

template <int kShares>
void arrange(const RowMatrix& w, const Block& block) {
  static_assert(kShift == 128);
  for (int half = 0; half < 2; ++half) {
    const int64_t rows = w.rows - half * kLanes;
    arrange_scales(w, half, rows, block);
    w.bits == 4 ? arrange_codes<4, kShares>(w, half, rows, block) : arrange_codes<8, kShares>(w, half, rows, block);
  }
}

// What is probably needed next, the rows behind this block's: fetched some lines at a time while this block computes.
struct Ahead {
  uintptr_t at, end;
  int64_t lines;  // of a step, so that all are fetched by the last one

  LFM2_ALWAYS void step() {
    for (int64_t i = 0; i < lines && at < end; ++i, at += kLine) {
      __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
    }
  }
};

template <int kTokens>
using TileSums = Floats[kTokens][2];

// Groups `chain`, chain + kChains, ... of all rows of a block and `kTokens` tokens.
template <int kTokens, int kBits, int kShares>
LFM2_ALWAYS void add_chain(const Block& block, const RowMatrix& w, const RowActivations& x, int64_t chain,
                           TileSums<kTokens>& total, Ahead& ahead) {
  for (int t = 0; t < kTokens; ++t) {
    total[t][0] = total[t][1] = broadcast(0.0f);
  }
  constexpr int kWords = kGroupInputs / 4 / kShares;
  // A power of two: a shift instead of a division.
  const int scale_shift = __builtin_ctzll(static_cast<uint64_t>(w.group * kShares / kGroupInputs));
  const int64_t begin = order_of_groups(w.columns).begin(chain) * kShares;
  const Ints *words = block.words + begin * (kWords * 2), *offsets = block.offsets + begin * 2;
  for (int64_t group = chain; group < w.columns / kGroupInputs; group += kChains) {
    ahead.step();
#pragma GCC unroll 2
    for (int share = 0; share < kShares; ++share, words += kWords * 2, offsets += 2) {
      const int64_t its = group * kShares + share;
      const Floats* scales = block.scales + (its >> scale_shift) * 2;
      // At 4 bits word 2*i holds even inputs, word 2*i + 1 odd ones, which lie 64 further on.
      const int8_t* from = x.codes + inputs_at<kBits>(its * (kGroupInputs / kShares));
      TileSum<kBits> sum[kTokens][2];
      for (int t = 0; t < kTokens; ++t) {
        sum[t][0].start(offsets[0]);
        sum[t][1].start(offsets[1]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kWords; ++i) {
        const Bytes first = words[i * 2], second = words[i * 2 + 1];
        const int at = kBits == 4 ? i / 2 * 4 + i % 2 * 64 : i * 4;
#pragma GCC unroll 6
        for (int t = 0; t < kTokens; ++t) {
          const Bytes four = broadcast_word(from + t * x.padded + at);
          sum[t][0].add(i, four, first);
          sum[t][1].add(i, four, second);
        }
      }
      for (int t = 0; t < kTokens; ++t) {
        const Floats scale = broadcast(x.scales_of(t)[its]);
        total[t][0] = fmadd(sum[t][0].total(), mul(scales[0], scale), total[t][0]);
        total[t][1] = fmadd(sum[t][1].total(), mul(scales[1], scale), total[t][1]);
      }
    }
  }
}

template <int kTokens>
LFM2_ALWAYS void add_sums(const TileSums<kTokens>& a, TileSums<kTokens>& to) {
  for (int t = 0; t < kTokens; ++t) {
    to[t][0] = add(a[t][0], to[t][0]);
    to[t][1] = add(a[t][1], to[t][1]);
  }
}

template <int kTokens, int kBits, int kShares>
void block_tile(const Block& block, const RowMatrix& w, const RowActivations& x, float* y, int64_t stride,
                Ahead& ahead) {
  TileSums<kTokens> sums[kChains];
  for (int chain = 0; chain < kChains; ++chain) {
    TileSums<kTokens> total;
    add_chain<kTokens, kBits, kShares>(block, w, x, chain, total, ahead);
    std::memcpy(sums[chain], total, sizeof total);
  }
  for (int apart = 1; apart < kChains; apart *= 2) {  // (0 + 1) + (2 + 3), into the last one
    for (int chain = 2 * apart - 1; chain < kChains; chain += 2 * apart) {
      add_sums<kTokens>(sums[chain - apart], sums[chain]);
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    store_first(y + t * stride, sums[kChains - 1][t][0], w.rows);
    store_first(y + t * stride + kLanes, sums[kChains - 1][t][1], w.rows - kLanes);
  }
}

// `count` tokens of 1 to kTokens.
template <int kBits, int kShares, int kTokens, typename... Arguments>
LFM2_ALWAYS void some_tokens(int64_t count, Arguments&... arguments) {
  if constexpr (kTokens > 1) {
    if (count < kTokens) {
      return some_tokens<kBits, kShares, kTokens - 1>(count, arguments...);
    }
  }
  block_tile<kTokens, kBits, kShares>(arguments...);
}

template <int kBits, int kShares>
void block_bits(const RowMatrix& w, const RowActivations& x, float* y, int64_t stride, const Block& block) {
  const auto next = reinterpret_cast<uintptr_t>(w.row(w.rows));
  const int64_t bytes = w.rows * w.row_bytes(), tiles = (x.tokens + kTileTokens - 1) / kTileTokens;
  Ahead ahead = {next, next + bytes, bytes / (tiles * (w.columns / kGroupInputs) * kLine) + 1};
  for (int64_t first = 0; first < x.tokens; first += kTileTokens) {
    const int64_t count = x.tokens - first < kTileTokens ? x.tokens - first : kTileTokens;
    const RowActivations some = x.part(first, count);
    float* to = y + first * stride;
    some_tokens<kBits, kShares, kTileTokens>(count, block, w, some, to, stride, ahead);
  }
}

template <int kShares>
LFM2_ALWAYS void block_shares(const RowMatrix& w, const RowActivations& x, float* y, int64_t stride, void* scratch) {
  const Block arranged = block_in(scratch, w.columns, kShares);
  for (int64_t row = 0; row < w.rows; row += 2 * kLanes) {
    const RowMatrix some = w.part(row, w.rows - row < 2 * kLanes ? w.rows - row : 2 * kLanes);
    arrange<kShares>(some, arranged);
    w.bits == 4 ? block_bits<4, kShares>(some, x, y + row, stride, arranged)
                : block_bits<8, kShares>(some, x, y + row, stride, arranged);
  }
}

void block(const RowMatrix& w, const RowActivations& x, float* y, int64_t stride, void* scratch) {
  x.small_groups ? block_shares<kSmallShares>(w, x, y, stride, scratch) : block_shares<1>(w, x, y, stride, scratch);
}

}  // namespace
}  // namespace lfm2
