// Quantizing activations for row_matrix.h in lanes.h's words: bit for bit as row_quantize.h does it.

#pragma once

#include "lanes.h"
#include "row_quantize.h"

namespace lfm2 {
namespace {

constexpr int kVectorsOfGroup = kGroupInputs / kLanes;

// The codes of one group, whose scale and sum are stored.
template <int kVectors>
LFM2_ALWAYS void quantize_vectors(const Floats* x, Ints* codes, const RowActivations& to, int64_t group,
                                  int64_t token) {
  constexpr uint32_t kInfinity = 0x7f800000u;
  constexpr float kLeast = 1e-30f;  // as in elementwise.h
  Ints magnitudes = magnitude_bits(x[0]);  // as whole numbers NaN and infinity are above all others
  for (int i = 1; i < kVectors; ++i) {
    magnitudes = max_ints(magnitudes, magnitude_bits(x[i]));
  }
  const auto bits = static_cast<uint32_t>(greatest_of(magnitudes));
  const float greatest = bits_to_float(bits);
  const bool usable = bits < kInfinity && greatest > kLeast;
  const Floats inverse = broadcast(usable ? 127.0f / greatest : 0.0f);
  Ints sum = zero_ints();
  for (int i = 0; i < kVectors; ++i) {
    codes[i] = usable ? to_nearest_ints(mul(x[i], inverse)) : zero_ints();
    sum = add_ints(sum, codes[i]);
  }
  const float scale = bits >= kInfinity ? bits_to_float(0x7fc00000u) : usable ? greatest / 127.0f : 0.0f;
  store_scale(scale, sum_of(sum), to, group, token);
}

// 32 inputs, `group` times 32 behind the token's first one: one group, or `kShares` of them.
template <int kShares>
LFM2_ALWAYS void quantize_registers(const Floats (&x)[kVectorsOfGroup], const RowActivations& to, int64_t group,
                                    int64_t token) {
  constexpr int kVectors = kVectorsOfGroup / kShares;
  Ints codes[kVectorsOfGroup];
  for (int i = 0; i < kShares; ++i) {
    quantize_vectors<kVectors>(x + i * kVectors, codes + i * kVectors, to, group * kShares + i, token);
  }
  const auto flip = static_cast<int8_t>(to.shifted ? -kShift : 0);
  int8_t* at = to.codes_of(token) + place_of(group * kGroupInputs, to.bits);
  if (to.bits == 4) {
    store_apart(codes, flip, at, at + 64);
  } else {
    store_in_order(codes, flip, at);
  }
}

LFM2_ALWAYS Floats inverse_norm_lanes(const float* x, int64_t columns, float epsilon) {
  constexpr int kVectors = kNormChains / kLanes;
  Floats squares[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    squares[v] = broadcast(0.0f);
  }
  for (int64_t i = 0; i < columns; i += kNormChains) {
    for (int v = 0; v < kVectors; ++v) {
      const Floats value = load(x + i + v * kLanes);
      squares[v] = fmadd(value, value, squares[v]);
    }
  }
  alignas(64) float chains[kNormChains];
  for (int v = 0; v < kVectors; ++v) {
    store(chains + v * kLanes, squares[v]);
  }
  return broadcast(inverse_norm(chains, columns, epsilon));
}

// The first-level cache keeps the row between the passes over it.
void normalize(const RowInput& all, int64_t columns, int64_t token, float* to) {
  const RowInput in = all.from(token, columns);
  const float* row = in.x;
  if (in.delta != nullptr) {
    const bool is_normed = in.delta_gamma != nullptr;
    const Floats scale = is_normed ? inverse_norm_lanes(in.delta, columns, in.epsilon) : broadcast(1.0f);
    for (int64_t i = 0; i < columns; i += kLanes) {
      const Floats delta = load(in.delta + i);
      store(in.sum + i, add(load(in.x + i), is_normed ? mul(mul(delta, scale), load(in.delta_gamma + i)) : delta));
    }
    row = in.sum;
  }
  const Floats scale = inverse_norm_lanes(row, columns, in.epsilon);
  for (int64_t i = 0; i < columns; i += kLanes) {
    store(to + i, mul(mul(load(row + i), scale), load(in.gamma + i)));
  }
}

template <int kShares>
LFM2_ALWAYS void quantize_groups(const float* x, int64_t columns, const RowActivations& to, int64_t token) {
  for (int64_t group = 0; group < columns / kGroupInputs; ++group, x += kGroupInputs) {
    Floats values[kVectorsOfGroup];
    for (int i = 0; i < kVectorsOfGroup; ++i) {
      values[i] = load(x + i * kLanes);
    }
    quantize_registers<kShares>(values, to, group, token);
  }
}

void quantize(const float* x, int64_t columns, const RowActivations& to, int64_t token) {
  to.small_groups ? quantize_groups<kSmallShares>(x, columns, to, token) : quantize_groups<1>(x, columns, to, token);
}

// silu of elementwise.h.
LFM2_ALWAYS Floats silu_lanes(Floats x) {
  const Floats one = broadcast(1.0f), e = exp_lanes(sub(broadcast(0.0f), as_floats(magnitude_bits(x))));
  return mul(x, divide(select(is_negative(x), e, one), add(one, e)));
}

void swiglu(const float* gate, const float* up, int step, const RowActivations& to, int64_t group, int64_t token) {
  Floats product[kVectorsOfGroup];
  for (int i = 0; i < kVectorsOfGroup; ++i) {
    const int64_t at = static_cast<int64_t>(i) * kLanes * step;
    const Floats g = step == 1 ? load(gate + at) : load_every_second(gate + at);
    const Floats u = step == 1 ? load(up + at) : load_every_second(up + at);
    product[i] = mul(silu_lanes(g), u);
  }
  to.small_groups ? quantize_registers<kSmallShares>(product, to, group, token)
                  : quantize_registers<1>(product, to, group, token);
}

}  // namespace
}  // namespace lfm2
