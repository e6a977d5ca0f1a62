// Packed tiles with smmla (the matrix extension, ARMv8.6), which multiplies 8 inputs of two rows with those of two tokens.

#pragma once

#include "tile_stripes.h"

namespace lfm2 {
namespace {

// A stripe as smmla takes it: 8 neighbouring inputs of two rows in a register.
struct RowPairs {
  Bytes first[kQuads];   // rows 0 and 1; inputs 8*i ..
  Bytes second[kQuads];  // rows 2 and 3
  Floats scales;
};

LFM2_ALWAYS RowPairs pair_rows(const Stripe& s) {
  RowPairs r;
  r.scales = s.scales;
  for (int i = 0; i < 2; ++i) {
    const auto zip = [&r](int to, Bytes quad, Bytes next) {
      r.first[to] = as_bytes(vzip1q_s32(as_ints(quad), as_ints(next)));
      r.second[to] = as_bytes(vzip2q_s32(as_ints(quad), as_ints(next)));
    };
    zip(i, s.low[2 * i], s.low[2 * i + 1]);
    zip(2 + i, s.high[2 * i], s.high[2 * i + 1]);
  }
  return r;
}

// 8 neighbouring inputs of two tokens in a register.
struct TokenPair {
  Bytes inputs[kQuads];
  Ints offsets;
};

LFM2_ALWAYS TokenPair pair_tokens(const Activations& x, int64_t at) {
  TokenPair t;
  for (int half = 0; half < 2; ++half) {
    const int64x2_t a = vreinterpretq_s64_s8(load_bytes(x.codes + at * kGroup + 16 * half));
    const int64x2_t b = vreinterpretq_s64_s8(load_bytes(x.codes + (at + 1) * kGroup + 16 * half));
    t.inputs[2 * half] = vreinterpretq_s8_s64(vzip1q_s64(a, b));
    t.inputs[2 * half + 1] = vreinterpretq_s8_s64(vzip2q_s64(a, b));
  }
  const int32x2_t both = vld1_s32(x.offsets + at);
  t.offsets = vcombine_s32(both, both);
  return t;
}

LFM2_ALWAYS void add_to(Ints sum, Floats scales, float scale, float* rows) {
  store(rows, fmadd(to_floats(sum), mul(scales, broadcast(scale)), load(rows)));
}

LFM2_ALWAYS void add_pair(const RowPairs& r, const TokenPair& t, const Activations& x, int64_t at, float* rows) {
  Ints upper = t.offsets, lower = t.offsets;  // row 0 with both tokens, row 1 with both; rows 2 and 3
  for (int i = 0; i < kQuads; ++i) {
    upper = vmmlaq_s32(upper, r.first[i], t.inputs[i]);
    lower = vmmlaq_s32(lower, r.second[i], t.inputs[i]);
  }
  add_to(vuzp1q_s32(upper, lower), r.scales, x.scales[at], rows);
  add_to(vuzp2q_s32(upper, lower), r.scales, x.scales[at + 1], rows + kTileRows);
}

// Adds one group of all tokens that have another; how many these are.
LFM2_ALWAYS int64_t add_pairs_of_tokens(const uint8_t* tile, const Activations& x, int64_t group, float* y) {
  const int64_t end = x.tokens / 2 * 2;
  for (int stripe = 0; stripe < kStripes; ++stripe) {
    const RowPairs r = pair_rows(unpack(tile, stripe));
    for (int64_t token = 0; token < end; token += 2) {
      const int64_t at = group * x.tokens + token;
      add_pair(r, pair_tokens(x, at), x, at, y + token * kTileRows + stripe * kLanes);
    }
  }
  return end;
}

}  // namespace
}  // namespace lfm2
