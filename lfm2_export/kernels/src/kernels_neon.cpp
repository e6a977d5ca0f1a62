// NEON, compiled twice: with the dot-product extension (sdot, ARMv8.2; every phone since about 2018), and with the
// matrix extension beside it (smmla, ARMv8.6), which takes two tokens at once. 4 rows a register. A stripe of 4 rows by
// 32 inputs unpacks into 8 registers, which stay there while the tokens pass by.

#include <arm_neon.h>

#include "elementwise.h"
#include "target.h"

namespace lfm2 {
namespace {

constexpr int kLanes = 4;
constexpr int kStripes = kTileRows / kLanes;
constexpr int64_t kPrefetchBytes = 4 * kTileBytes;

struct Stripe {
  int8x16_t low[kQuads];   // inputs 4*quad ..
  int8x16_t high[kQuads];  // inputs 16 + 4*quad ..
  float32x4_t scales;
};

inline __attribute__((always_inline)) Stripe unpack(const uint8_t* tile, int stripe) {
  Stripe s;
  const float16x4_t halves = vreinterpret_f16_u8(vld1_u8(tile + stripe * kLanes * 2));
  s.scales = vcvt_f32_f16(halves);
  const uint8_t* codes = tile + kCodesOffset + stripe * 16;
  for (int quad = 0; quad < kQuads; ++quad) {
    const uint8x16_t pairs = vld1q_u8(codes + quad * kTileRows * 4);
    s.low[quad] = vreinterpretq_s8_u8(vandq_u8(pairs, vdupq_n_u8(15)));
    s.high[quad] = vreinterpretq_s8_u8(vshrq_n_u8(pairs, 4));
  }
  return s;
}

inline __attribute__((always_inline)) float32x4_t add_group(const Stripe& s, const Activations& x, int64_t at,
                                                            float32x4_t total) {
  const int8x16_t first = vld1q_s8(x.codes + at * kGroup);
  const int8x16_t second = vld1q_s8(x.codes + at * kGroup + 16);
  int32x4_t low = vdupq_n_s32(x.offsets[at]);
  int32x4_t high = vdupq_n_s32(0);
  low = vdotq_laneq_s32(low, s.low[0], first, 0);
  high = vdotq_laneq_s32(high, s.high[0], second, 0);
  low = vdotq_laneq_s32(low, s.low[1], first, 1);
  high = vdotq_laneq_s32(high, s.high[1], second, 1);
  low = vdotq_laneq_s32(low, s.low[2], first, 2);
  high = vdotq_laneq_s32(high, s.high[2], second, 2);
  low = vdotq_laneq_s32(low, s.low[3], first, 3);
  high = vdotq_laneq_s32(high, s.high[3], second, 3);
  const float32x4_t scales = vmulq_n_f32(s.scales, x.scales[at]);
  return vfmaq_f32(total, vcvtq_f32_s32(vaddq_s32(low, high)), scales);
}

inline void prefetch(const uint8_t* tile) {
  const auto ahead = reinterpret_cast<uintptr_t>(tile) + kPrefetchBytes;  // may lie behind the tensor's end: harmless
  for (int line = 0; line < kTileBytes; line += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + line));
  }
}

void rows_of_one(const uint8_t* tiles, int64_t groups, const Activations& x, float* y) {
  float32x4_t total[kStripes];
  for (int stripe = 0; stripe < kStripes; ++stripe) {
    total[stripe] = vdupq_n_f32(0.0f);
  }
  for (int64_t group = 0; group < groups; ++group, tiles += kTileBytes) {
    prefetch(tiles);
    for (int stripe = 0; stripe < kStripes; ++stripe) {
      total[stripe] = add_group(unpack(tiles, stripe), x, group, total[stripe]);
    }
  }
  for (int stripe = 0; stripe < kStripes; ++stripe) {
    vst1q_f32(y + stripe * kLanes, total[stripe]);
  }
}

#ifdef __ARM_FEATURE_MATMUL_INT8

// A stripe as smmla takes it: 8 neighbouring inputs of two rows in a register.
struct RowPairs {
  int8x16_t first[kQuads];   // rows 0 and 1; inputs 8*i ..
  int8x16_t second[kQuads];  // rows 2 and 3
  float32x4_t scales;
};

inline __attribute__((always_inline)) RowPairs pair_rows(const Stripe& s) {
  RowPairs r;
  r.scales = s.scales;
  for (int i = 0; i < 2; ++i) {
    const auto zip = [&r](int to, int8x16_t quad, int8x16_t next) {
      const int32x4_t a = vreinterpretq_s32_s8(quad), b = vreinterpretq_s32_s8(next);
      r.first[to] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
      r.second[to] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
    };
    zip(i, s.low[2 * i], s.low[2 * i + 1]);
    zip(2 + i, s.high[2 * i], s.high[2 * i + 1]);
  }
  return r;
}

// 8 neighbouring inputs of two tokens in a register.
struct TokenPair {
  int8x16_t inputs[kQuads];
  int32x4_t offsets;
};

inline __attribute__((always_inline)) TokenPair pair_tokens(const Activations& x, int64_t at) {
  TokenPair t;
  for (int half = 0; half < 2; ++half) {
    const int64x2_t a = vreinterpretq_s64_s8(vld1q_s8(x.codes + at * kGroup + 16 * half));
    const int64x2_t b = vreinterpretq_s64_s8(vld1q_s8(x.codes + (at + 1) * kGroup + 16 * half));
    t.inputs[2 * half] = vreinterpretq_s8_s64(vzip1q_s64(a, b));
    t.inputs[2 * half + 1] = vreinterpretq_s8_s64(vzip2q_s64(a, b));
  }
  const int32x2_t both = vld1_s32(x.offsets + at);
  t.offsets = vcombine_s32(both, both);
  return t;
}

inline __attribute__((always_inline)) void add_to(int32x4_t sum, float32x4_t scales, float scale, float* rows) {
  vst1q_f32(rows, vfmaq_f32(vld1q_f32(rows), vcvtq_f32_s32(sum), vmulq_n_f32(scales, scale)));
}

inline __attribute__((always_inline)) void add_pair(const RowPairs& r, const TokenPair& t, const Activations& x,
                                                    int64_t at, float* rows) {
  int32x4_t upper = t.offsets, lower = t.offsets;  // row 0 with both tokens, row 1 with both; rows 2 and 3
  for (int i = 0; i < kQuads; ++i) {
    upper = vmmlaq_s32(upper, r.first[i], t.inputs[i]);
    lower = vmmlaq_s32(lower, r.second[i], t.inputs[i]);
  }
  add_to(vuzp1q_s32(upper, lower), r.scales, x.scales[at], rows);
  add_to(vuzp2q_s32(upper, lower), r.scales, x.scales[at + 1], rows + kTileRows);
}

inline void add_tile_of_one(const uint8_t* tile, const Activations& x, int64_t at, float* to) {
  for (int stripe = 0; stripe < kStripes; ++stripe) {
    float* rows = to + stripe * kLanes;
    vst1q_f32(rows, add_group(unpack(tile, stripe), x, at, vld1q_f32(rows)));
  }
}

inline void add_tile(const uint8_t* tile, const Activations& x, int64_t group, float* y) {
  const int64_t pairs_end = x.tokens / 2 * 2;
  for (int stripe = 0; stripe < kStripes; ++stripe) {
    const RowPairs r = pair_rows(unpack(tile, stripe));
    for (int64_t token = 0; token < pairs_end; token += 2) {
      const int64_t at = group * x.tokens + token;
      add_pair(r, pair_tokens(x, at), x, at, y + token * kTileRows + stripe * kLanes);
    }
  }
  if (pairs_end < x.tokens) {
    add_tile_of_one(tile, x, group * x.tokens + pairs_end, y + pairs_end * kTileRows);
  }
}

#else

inline void add_tile(const uint8_t* tile, const Activations& x, int64_t group, float* y) {
  for (int stripe = 0; stripe < kStripes; ++stripe) {
    const Stripe s = unpack(tile, stripe);
    for (int64_t token = 0; token < x.tokens; ++token) {
      float* to = y + token * kTileRows + stripe * kLanes;
      vst1q_f32(to, add_group(s, x, group * x.tokens + token, vld1q_f32(to)));
    }
  }
}

#endif

void rows(const uint8_t* tiles, int64_t groups, const Activations& x, float* y) {
  if (x.tokens == 1) {
    return rows_of_one(tiles, groups, x, y);
  }
  std::memset(y, 0, x.tokens * kTileRows * sizeof(float));
  for (int64_t group = 0; group < groups; ++group, tiles += kTileBytes) {
    prefetch(tiles);
    add_tile(tiles, x, group, y);
  }
}

}  // namespace

namespace LFM2_TARGET {

const Kernels kKernels = {LFM2_TARGET_NAME, quantize_group, rows, swiglu_groups, accumulate_rows};

}  // namespace LFM2_TARGET
}  // namespace lfm2
