// Quantizing activations for row_matrix.h in lanes.h's words: bit for bit as row_quantize.h does it.

#pragma once

#include "lanes.h"
#include "row_quantize.h"

namespace lfm2 {
namespace {

constexpr int kVectorsOfGroup = kGroupInputs / kLanes;

LFM2_ALWAYS void quantize_registers(const Floats (&x)[kVectorsOfGroup], const RowActivations& to, int64_t group,
                                    int64_t token) {
  constexpr uint32_t kInfinity = 0x7f800000u;
  constexpr float kLeast = 1e-30f;  // as in elementwise.h
  Ints magnitudes = magnitude_bits(x[0]);  // as whole numbers NaN and infinity are above all others
  for (int i = 1; i < kVectorsOfGroup; ++i) {
    magnitudes = max_ints(magnitudes, magnitude_bits(x[i]));
  }
  const auto bits = static_cast<uint32_t>(greatest_of(magnitudes));
  const float greatest = bits_to_float(bits);
  const bool usable = bits < kInfinity && greatest > kLeast;
  const Floats inverse = broadcast(usable ? 127.0f / greatest : 0.0f);
  Ints codes[kVectorsOfGroup], sum = zero_ints();
  for (int i = 0; i < kVectorsOfGroup; ++i) {
    codes[i] = usable ? to_nearest_ints(mul(x[i], inverse)) : zero_ints();
    sum = add_ints(sum, codes[i]);
  }
  const auto flip = static_cast<int8_t>(to.shifted ? -kShift : 0);
  int8_t* at = to.codes_of(token) + place_of(group * kGroupInputs, to.bits);
  if (to.bits == 4) {
    store_apart(codes, flip, at, at + 64);
  } else {
    store_in_order(codes, flip, at);
  }
  const float scale = bits >= kInfinity ? bits_to_float(0x7fc00000u) : usable ? greatest / 127.0f : 0.0f;
  store_scale(scale, sum_of(sum), to, group, token);
}

void quantize(const float* x, int64_t columns, const RowActivations& to, int64_t token) {
  for (int64_t group = 0; group < columns / kGroupInputs; ++group, x += kGroupInputs) {
    Floats values[kVectorsOfGroup];
    for (int i = 0; i < kVectorsOfGroup; ++i) {
      values[i] = load(x + i * kLanes);
    }
    quantize_registers(values, to, group, token);
  }
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
  quantize_registers(product, to, group, token);
}

}  // namespace
}  // namespace lfm2
