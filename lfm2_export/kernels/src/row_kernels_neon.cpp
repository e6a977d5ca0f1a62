// row_matrix.h with NEON's dot products (sdot, ARMv8.2).
//
// A tile is 4 rows by up to 8 tokens. Of every 32 inputs the rows' weights are unpacked into 8 registers, which stay
// there while the tokens pass by. sdot leaves four sums of each row; pairwise additions turn those of 4 rows into the
// lanes of one register, so that converting and scaling is done once for 4 rows. A token's result does not depend on
// the others.

#include <arm_neon.h>

#include "row_quantize.h"

namespace lfm2 {
namespace {

#define LFM2_ALWAYS inline __attribute__((always_inline))

constexpr int kLanes = 4;            // rows of a tile
constexpr int kMostTokens = 8;       // of a tile: 8 sums of floats, 4 of integers, 8 registers of weights
constexpr int64_t kNearTokens = 64;  // whose activations stay in the second-level cache while the rows pass by
constexpr int kLineBytes = 64;

// Where 4 rows are. Where fewer are left, the last one is taken again, and its results are dropped.
struct Rows {
  const uint8_t* codes[kLanes];
  const uint8_t* scales[kLanes];
  const uint8_t* points[kLanes];
};

LFM2_ALWAYS Rows rows_from(const RowMatrix& w, int64_t first) {
  Rows rows;
  for (int r = 0; r < kLanes; ++r) {
    const int64_t row = first + r < w.rows ? first + r : w.rows - 1;
    rows.codes[r] = w.row(row);
    rows.scales[r] = w.scales_of(row);
    rows.points[r] = w.points_of(row);
  }
  return rows;
}

// The scales of 4 rows.
LFM2_ALWAYS float32x4_t load_scales(const Rows& rows, int64_t group, bool half) {
  if (half) {
    alignas(8) uint16_t halves[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      std::memcpy(&halves[r], rows.scales[r] + group * 2, sizeof halves[r]);
    }
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves)));
  }
  alignas(16) float scales[kLanes];
  for (int r = 0; r < kLanes; ++r) {
    std::memcpy(&scales[r], rows.scales[r] + group * 4, sizeof scales[r]);
  }
  return vld1q_f32(scales);
}

// The zero points of 4 rows, less the 8 that unpacking has taken out.
LFM2_ALWAYS float32x4_t load_points(const Rows& rows, int64_t group) {
  const int shift = static_cast<int>(group % 2 * 4);
  alignas(16) int32_t points[kLanes];
  for (int r = 0; r < kLanes; ++r) {
    points[r] = (rows.points[r][group / 2] >> shift & 15) - 8;
  }
  return vcvtq_f32_s32(vld1q_s32(points));
}

// 32 inputs of 4 rows in the order of the activations. 8-bit weights are (code - 128), 4-bit ones 16 * (code - 8): the
// factor saves an instruction, and is taken out with the scale.
struct Weights {
  int8x16_t first[kLanes];
  int8x16_t second[kLanes];
};

template <int kBits>
LFM2_ALWAYS Weights unpack(const Rows& rows, int64_t group) {
  Weights weights;
  for (int r = 0; r < kLanes; ++r) {
    if constexpr (kBits == 4) {
      const uint8x16_t pairs = veorq_u8(vld1q_u8(rows.codes[r] + group * 16), vdupq_n_u8(0x88));
      weights.first[r] = vreinterpretq_s8_u8(vshlq_n_u8(pairs, 4));
      weights.second[r] = vreinterpretq_s8_u8(vandq_u8(pairs, vdupq_n_u8(0xf0)));
    } else {
      const uint8_t* codes = rows.codes[r] + group * kGroupInputs;
      weights.first[r] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(codes), vdupq_n_u8(0x80)));
      weights.second[r] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(codes + 16), vdupq_n_u8(0x80)));
    }
  }
  return weights;
}

// The sums of 4 rows with 32 inputs of a token.
template <int kBits>
LFM2_ALWAYS int32x4_t sums_of(const Weights& weights, const int8_t* codes, int64_t group) {
  const int8_t* at = codes + (kBits == 4 ? group / 4 * 128 + group % 4 * 16 : group * kGroupInputs);
  const int8x16_t first = vld1q_s8(at), second = vld1q_s8(at + (kBits == 4 ? 64 : 16));
  int32x4_t sums[kLanes];
  for (int r = 0; r < kLanes; ++r) {
    sums[r] = vdotq_s32(vdotq_s32(vdupq_n_s32(0), weights.first[r], first), weights.second[r], second);
  }
  return vpaddq_s32(vpaddq_s32(sums[0], sums[1]), vpaddq_s32(sums[2], sums[3]));
}

// The same share of the next 4 rows, which follow in memory. May lie behind the tensor's end: harmless.
template <int kBits>
LFM2_ALWAYS void prefetch_next(const RowMatrix& w, const Rows& rows, int64_t group) {
  constexpr int kBytes = kLanes * kGroupInputs * kBits / 8;
  const int64_t inputs = kLanes * (w.columns + group * kGroupInputs);
  const auto next = reinterpret_cast<uintptr_t>(rows.codes[0]) + inputs * kBits / 8;
  for (int line = 0; line < kBytes; line += kLineBytes) {
    __builtin_prefetch(reinterpret_cast<const void*>(next + line));
  }
}

LFM2_ALWAYS void store_rows(float32x4_t total, int64_t count, float* y) {
  if (count >= kLanes) {
    return vst1q_f32(y, total);
  }
  alignas(16) float all[kLanes];
  vst1q_f32(all, total);
  std::memcpy(y, all, count * sizeof(float));
}

// `count` rows, `kTokens` tokens.
template <int kBits, int kTokens>
void tile(const RowMatrix& w, const Rows& rows, int64_t count, const RowActivations& x, float* y, int64_t stride) {
  float32x4_t total[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    total[t] = vdupq_n_f32(0.0f);
  }
  const int64_t groups_per_scale = w.group / kGroupInputs, scale_groups = w.groups(), scale_count = x.scale_count();
  const bool has_points = w.zero_points != nullptr;
  int64_t group = 0;
  for (int64_t at = 0; at < scale_groups; ++at) {
    const float32x4_t scale = load_scales(rows, at, w.half_scales);
    const float32x4_t of_sums = kBits == 4 ? vmulq_n_f32(scale, 1.0f / 16) : scale;
    const float32x4_t points = has_points ? vmulq_n_f32(load_points(rows, at), 16) : vdupq_n_f32(0.0f);
    for (const int64_t end = group + groups_per_scale; group < end; ++group) {
      prefetch_next<kBits>(w, rows, group);
      const Weights weights = unpack<kBits>(rows, group);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        float32x4_t sums = vcvtq_f32_s32(sums_of<kBits>(weights, x.codes + t * x.padded, group));
        const int64_t own = t * scale_count + group;
        if (has_points) {  // whole numbers below 2^24: exact
          sums = vfmsq_f32(sums, points, vdupq_n_f32(x.sums[own]));
        }
        total[t] = vfmaq_f32(total[t], sums, vmulq_n_f32(of_sums, x.scales[own]));
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    store_rows(total[t], count, y + t * stride);
  }
}

template <int kBits>
void rows_of_tile(const RowMatrix& w, int64_t row, const RowActivations& x, float* y, int64_t stride) {
  const Rows rows = rows_from(w, row);
  const int64_t count = w.rows - row;
  for (int64_t done = 0; done < x.tokens;) {
    const int64_t left = x.tokens - done;
    const RowActivations some = x.part(done, left);
    float* to = y + done * stride + row;
    if (left >= kMostTokens) {
      tile<kBits, kMostTokens>(w, rows, count, some, to, stride);
      done += kMostTokens;
    } else if (left >= 4) {
      tile<kBits, 4>(w, rows, count, some, to, stride);
      done += 4;
    } else if (left >= 2) {
      tile<kBits, 2>(w, rows, count, some, to, stride);
      done += 2;
    } else {
      tile<kBits, 1>(w, rows, count, some, to, stride);
      done += 1;
    }
  }
}

void dot(const RowMatrix& w, const RowActivations& x, float* y, int64_t stride) {
  for (int64_t first = 0; first < x.tokens; first += kNearTokens) {
    const int64_t left = x.tokens - first;
    const RowActivations near = x.part(first, left < kNearTokens ? left : kNearTokens);
    for (int64_t row = 0; row < w.rows; row += kLanes) {
      w.bits == 4 ? rows_of_tile<4>(w, row, near, y + first * stride, stride)
                  : rows_of_tile<8>(w, row, near, y + first * stride, stride);
    }
  }
}

}  // namespace

const RowKernels kNeonDotRowKernels = {"neondot", quantize_row, swiglu_row, dot, nullptr, accumulate_row};

}  // namespace lfm2
