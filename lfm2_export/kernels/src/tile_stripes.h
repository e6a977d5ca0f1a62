// Packed tiles (layout.h) in lanes.h's words. A register holds kLanes rows of a tile, a stripe; 32 inputs of it unpack into
// 8 registers, which stay there while the tokens pass by. Where there are 32 registers of 16 lanes, two stripes do, and
// share the inputs.

#pragma once

#include "kernels.h"
#include "lanes.h"
#include "layout.h"

namespace lfm2 {
namespace {

constexpr int kStripes = kTileRows / kLanes;
constexpr int kTogether = kLanes == 16 ? 2 : 1;
// Far enough to cover DRAM latency, across page boundaries too; what lies behind the tensor's end is harmless.
constexpr int64_t kPrefetchBytes = (kLanes == 16 ? 12 : kLanes) * kTileBytes;

struct Stripe {
  Bytes low[kQuads];   // inputs 4*quad ..
  Bytes high[kQuads];  // inputs 16 + 4*quad ..
  Floats scales;
};

LFM2_ALWAYS Stripe unpack(const uint8_t* tile, int stripe) {
  Stripe s;
  s.scales = load_halves_first(tile + stripe * kLanes * 2, kLanes);
  const uint8_t* codes = tile + kCodesOffset + stripe * kBytes;
  for (int quad = 0; quad < kQuads; ++quad) {
    const Bytes pairs = load_bytes(codes + quad * kTileRows * 4);
    s.low[quad] = low_nibbles(pairs);
    s.high[quad] = high_nibbles(pairs);
  }
  return s;
}

LFM2_ALWAYS void prefetch(const uint8_t* tile) {
  for (int line = 0; line < kTileBytes; line += 64) {
    fetch_ahead(tile, kPrefetchBytes + line);
  }
}

template <int kQuad>
LFM2_ALWAYS void add_quad(const Stripe (&s)[kTogether], SixteenInputs first, SixteenInputs second,
                          NibbleSum (&sum)[kTogether]) {
  for (int i = 0; i < kTogether; ++i) {
    sum[i].add<kQuad>(s[i].low[kQuad], s[i].high[kQuad], first, second);
  }
}

// Adds one group of one token.
LFM2_ALWAYS void add_group(const Stripe (&s)[kTogether], const Activations& x, int64_t at, Floats (&total)[kTogether]) {
  const SixteenInputs first = load_sixteen(x.codes + at * kGroup), second = load_sixteen(x.codes + at * kGroup + 16);
  NibbleSum sum[kTogether];
  for (NibbleSum& one : sum) {
    one.start(x.offsets[at]);
  }
  add_quad<0>(s, first, second, sum);
  add_quad<1>(s, first, second, sum);
  add_quad<2>(s, first, second, sum);
  add_quad<3>(s, first, second, sum);
  for (int i = 0; i < kTogether; ++i) {
    total[i] = fmadd(sum[i].total(), mul(s[i].scales, broadcast(x.scales[at])), total[i]);
  }
}

LFM2_ALWAYS void add_stripes(const uint8_t* tile, int stripe, const Activations& x, int64_t at, Floats* total) {
  Stripe s[kTogether];
  Floats sums[kTogether];
  for (int i = 0; i < kTogether; ++i) {
    s[i] = unpack(tile, stripe + i);
    sums[i] = total[i];
  }
  add_group(s, x, at, sums);
  std::memcpy(total, sums, sizeof sums);
}

LFM2_ALWAYS void add_to_rows(const Stripe (&s)[kTogether], const Activations& x, int64_t at, float* rows) {
  Floats total[kTogether];
  for (int i = 0; i < kTogether; ++i) {
    total[i] = load(rows + i * kLanes);
  }
  add_group(s, x, at, total);
  for (int i = 0; i < kTogether; ++i) {
    store(rows + i * kLanes, total[i]);
  }
}

// The tokens from `first` on, one by one.
LFM2_ALWAYS void add_tokens(const uint8_t* tile, const Activations& x, int64_t group, int64_t first, float* y) {
  for (int stripe = 0; stripe < kStripes; stripe += kTogether) {
    Stripe s[kTogether];
    for (int i = 0; i < kTogether; ++i) {
      s[i] = unpack(tile, stripe + i);
    }
    for (int64_t token = first; token < x.tokens; ++token) {
      add_to_rows(s, x, group * x.tokens + token, y + token * kTileRows + stripe * kLanes);
    }
  }
}

}  // namespace
}  // namespace lfm2
