// The kernels that need no intrinsics: plain loops that the compiler vectorizes for the translation unit's instruction
// set. In an anonymous namespace, so that no AVX-512 copy of them is linked into the code for older processors.

#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "layout.h"

namespace lfm2 {
namespace {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  const uint32_t wide = exponent == 31 ? 255u : exponent + 112u;
  return bits_to_float(sign | (wide << 23) | (mantissa << 13));
}

// Rounds to nearest, ties to even, for |x| < 2^22: beyond the leading 1 of 1.5 * 2^23 no fraction bits are left.
inline float round_to_even(float x) {
  constexpr float kMagic = 12582912.0f;
  return (x + kMagic) - kMagic;
}

// e^x for x in [-87, 0], relative error below 2e-7 (Cephes' expf polynomial).
inline float exp_of_negative(float x) {
  const float n = round_to_even(x * 1.44269504088896341f);
  float r = __builtin_fmaf(n, -0.693359375f, x);
  r = __builtin_fmaf(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = __builtin_fmaf(p, r, 1.3981999507e-3f);
  p = __builtin_fmaf(p, r, 8.3334519073e-3f);
  p = __builtin_fmaf(p, r, 4.1665795894e-2f);
  p = __builtin_fmaf(p, r, 1.6666665459e-1f);
  p = __builtin_fmaf(p, r, 5.0000001201e-1f);
  p = __builtin_fmaf(p, r * r, r) + 1.0f;
  return p * bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

// x * sigmoid(x); NaN stays NaN.
inline float silu(float x) {
  const float magnitude = bits_to_float(float_to_bits(x) & 0x7fffffffu);
  const float clamped = magnitude < 87.0f ? magnitude : 87.0f;
  const float e = exp_of_negative(-clamped);
  return x * ((x < 0.0f ? e : 1.0f) / (1.0f + e));
}

// The greatest |x| as bits. On bits the maximum is one of integers, which may be taken in any order, and NaN and
// infinity come out above every finite value.
inline uint32_t greatest_magnitude_bits(const float* x) {
  int32_t greatest = 0;
  for (int i = 0; i < kGroup; ++i) {
    const int32_t bits = static_cast<int32_t>(float_to_bits(x[i]) & 0x7fffffffu);
    greatest = bits > greatest ? bits : greatest;
  }
  return static_cast<uint32_t>(greatest);
}

inline void quantize_group(const float* x, const Activations& to, int64_t group, int64_t token) {
  constexpr uint32_t kInfinity = 0x7f800000u;
  constexpr float kLeast = 1e-30f;  // below it the group is zero: 127 / greatest would overflow
  const int64_t at = group * to.tokens + token;
  const uint32_t bits = greatest_magnitude_bits(x);
  const float greatest = bits_to_float(bits);
  const bool usable = bits < kInfinity && greatest > kLeast;
  const float inverse = usable ? 127.0f / greatest : 0.0f;
  int8_t* codes = to.codes + at * kGroup;
  int32_t sum = 0;
  for (int i = 0; i < kGroup; ++i) {
    const float value = usable ? x[i] : 0.0f;  // never converts a NaN to an integer
    const int32_t code = static_cast<int32_t>(round_to_even(value * inverse));
    codes[i] = static_cast<int8_t>(code);
    sum += code;
  }
  to.scales[at] = bits >= kInfinity ? bits_to_float(0x7fc00000u) : usable ? greatest / 127.0f : 0.0f;
  to.offsets[at] = -kZeroPoint * sum;
}

inline void swiglu_groups(const float* gate, const float* up, const Activations& to, int64_t group) {
  for (int64_t token = 0; token < to.tokens; ++token) {
    alignas(64) float product[kTileRows];
    for (int i = 0; i < kTileRows; ++i) {
      product[i] = silu(gate[token * kTileRows + i]) * up[token * kTileRows + i];
    }
    quantize_group(product, to, group, token);
  }
}

inline void accumulate_rows(float weight, const float* y, float* out) {
  for (int i = 0; i < kTileRows; ++i) {
    out[i] = __builtin_fmaf(weight, y[i], out[i]);
  }
}

}  // namespace
}  // namespace lfm2
