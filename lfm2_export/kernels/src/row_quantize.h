// Quantizing activations for row_matrix.h: plain loops, compiled once per instruction set.

#pragma once

#include <algorithm>
#include <cstring>

#include "elementwise.h"
#include "row_matrix.h"

namespace lfm2 {
namespace {

static_assert(kGroupInputs == kGroup);

// Where input `index` of a token goes.
inline int64_t place_of(int64_t index, int bits) {
  return bits == 8 ? index : index / 128 * 128 + (index % 2) * 64 + index % 128 / 2;
}

inline void store_codes(const int8_t* codes, const RowActivations& to, int64_t group, int64_t token) {
  const auto flip = static_cast<int8_t>(to.shifted ? -kShift : 0);
  int8_t* row = to.codes_of(token);
  if (to.bits == 8) {
    for (int i = 0; i < kGroupInputs; ++i) {
      row[group * kGroupInputs + i] = static_cast<int8_t>(codes[i] ^ flip);
    }
    return;
  }
  int8_t* even = row + place_of(group * kGroupInputs, 4);
  int8_t* odd = row + place_of(group * kGroupInputs + 1, 4);
  for (int i = 0; i < kGroupInputs / 2; ++i) {
    even[i] = static_cast<int8_t>(codes[2 * i] ^ flip);
    odd[i] = static_cast<int8_t>(codes[2 * i + 1] ^ flip);
  }
}

inline void store_scale(float scale, int32_t sum, const RowActivations& to, int64_t group, int64_t token) {
  to.scales_of(token)[group] = scale;
  to.sums_of(token)[group] = static_cast<float>(sum);
}

// 32 inputs of a token, `group` times 32 behind the first one: one group, or two of 16. They come in any order, and several
// at once: nothing is shared between them.
inline void quantize_row_group(const float* x, const RowActivations& to, int64_t group, int64_t token) {
  alignas(64) int8_t codes[kGroupInputs];
  float scale;
  int32_t offset;
  if (to.small_groups) {
    for (int half = 0; half < 2; ++half) {
      const float* from = x + half * kLeastGroup;
      alignas(64) float padded[kGroupInputs] = {};
      std::copy_n(from, kLeastGroup, padded);
      alignas(64) int8_t its[kGroupInputs];
      quantize_group(padded, {its, &scale, &offset, 1}, 0, 0);
      std::copy_n(its, kLeastGroup, codes + half * kLeastGroup);
      store_scale(scale, offset / -kZeroPoint, to, 2 * group + half, token);
    }
  } else {
    quantize_group(x, {codes, &scale, &offset, 1}, 0, 0);
    store_scale(scale, offset / -kZeroPoint, to, group, token);
  }
  store_codes(codes, to, group, token);
}

// Squares are summed in that many chains, whatever the lanes: the norm's bits are the same on every instruction set.
constexpr int kNormChains = 16;

inline float inverse_norm(float (&chains)[kNormChains], int64_t columns, float epsilon) {
  for (int apart = kNormChains / 2; apart > 0; apart /= 2) {
    for (int i = 0; i < apart; ++i) {
      chains[i] += chains[i + apart];
    }
  }
  return 1.0f / __builtin_sqrtf(chains[0] / static_cast<float>(columns) + epsilon);
}

inline float inverse_norm_of(const float* x, int64_t columns, float epsilon) {
  float chains[kNormChains] = {};
  for (int64_t i = 0; i < columns; ++i) {
    chains[i % kNormChains] = __builtin_fmaf(x[i], x[i], chains[i % kNormChains]);
  }
  return inverse_norm(chains, columns, epsilon);
}

inline void normalize_row(const RowInput& all, int64_t columns, int64_t token, float* to) {
  const RowInput in = all.from(token, columns);
  const float* row = in.x;
  if (in.delta != nullptr) {
    const float scale = in.delta_gamma == nullptr ? 1.0f : inverse_norm_of(in.delta, columns, in.epsilon);
    for (int64_t i = 0; i < columns; ++i) {
      in.sum[i] = in.x[i] + (in.delta_gamma == nullptr ? in.delta[i] : in.delta[i] * scale * in.delta_gamma[i]);
    }
    row = in.sum;
  }
  const float scale = inverse_norm_of(row, columns, in.epsilon);
  for (int64_t i = 0; i < columns; ++i) {
    to[i] = row[i] * scale * in.gamma[i];
  }
}

inline void quantize_row(const float* x, int64_t columns, const RowActivations& to, int64_t token) {
  for (int64_t group = 0; group < columns / kGroupInputs; ++group) {
    quantize_row_group(x + group * kGroupInputs, to, group, token);
  }
}

template <int kStep>
inline void swiglu_row_group(const float* gate, const float* up, const RowActivations& to, int64_t group,
                             int64_t token) {
  alignas(64) float product[kGroupInputs];
  for (int i = 0; i < kGroupInputs; ++i) {
    product[i] = silu(gate[kStep * i]) * up[kStep * i];
  }
  quantize_row_group(product, to, group, token);
}

inline void swiglu_row(const float* gate, const float* up, int step, const RowActivations& to, int64_t group,
                       int64_t token) {
  step == 1 ? swiglu_row_group<1>(gate, up, to, group, token) : swiglu_row_group<2>(gate, up, to, group, token);
}

inline void accumulate_row(float weight, const float* y, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = __builtin_fmaf(weight, y[i], out[i]);
  }
}

}  // namespace
}  // namespace lfm2
