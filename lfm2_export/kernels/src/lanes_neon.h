// lanes.h with NEON and its dot products (sdot, ARMv8.2): 4 lanes. Bytes of weights are signed here.

#pragma once

#include <arm_neon.h>

namespace lfm2 {
namespace {

constexpr int kLanes = 4;

using Floats = float32x4_t;
using Ints = int32x4_t;
using Bytes = int8x16_t;
using Order = uint8x16_t;
using Mask = uint32x4_t;

LFM2_ALWAYS Mask first_lanes(int64_t count) {
  const auto limit = static_cast<int32_t>(count > kLanes ? kLanes : count < 0 ? 0 : count);
  const int32x4_t order = {0, 1, 2, 3};
  return vcgtq_s32(vdupq_n_s32(limit), order);
}

// Of lanes that are 0 or -1.
LFM2_ALWAYS Mask mask_of(const int32_t* at) { return vreinterpretq_u32_s32(vld1q_s32(at)); }
LFM2_ALWAYS Mask both(Mask a, Mask b) { return vandq_u32(a, b); }
LFM2_ALWAYS Mask without(Mask a, Mask b) { return vbicq_u32(a, b); }
LFM2_ALWAYS bool has_any(Mask a) { return vmaxvq_u32(a) != 0; }
LFM2_ALWAYS Floats select(Mask mask, Floats a, Floats b) { return vbslq_f32(mask, a, b); }
LFM2_ALWAYS Floats keep(Mask mask, Floats x) {
  return vreinterpretq_f32_u32(vandq_u32(mask, vreinterpretq_u32_f32(x)));
}

LFM2_ALWAYS Floats load(const float* at) { return vld1q_f32(at); }
LFM2_ALWAYS void store(float* at, Floats x) { vst1q_f32(at, x); }
LFM2_ALWAYS void store_first(float* at, Floats x, int64_t count) {
  if (count >= kLanes) {
    return store(at, x);
  }
  alignas(16) float few[kLanes];
  store(few, x);
  for (int64_t i = 0; i < count; ++i) {
    at[i] = few[i];
  }
}
LFM2_ALWAYS Floats broadcast(float x) { return vdupq_n_f32(x); }
LFM2_ALWAYS Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
LFM2_ALWAYS Floats sub(Floats a, Floats b) { return vsubq_f32(a, b); }
LFM2_ALWAYS Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
LFM2_ALWAYS Floats fmadd(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }   // a * b + c
LFM2_ALWAYS Floats fnmadd(Floats a, Floats b, Floats c) { return vfmsq_f32(c, a, b); }  // c - a * b
LFM2_ALWAYS Floats max_or_second(Floats a, Floats b) { return vmaxq_f32(a, b); }        // where one is NaN, NaN
LFM2_ALWAYS Floats round_to_whole(Floats x) { return vrndnq_f32(x); }
LFM2_ALWAYS Floats times_power_of_two(Floats x, Floats n) {
  const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
  return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
}
LFM2_ALWAYS float greatest_of(Floats x) { return vmaxvq_f32(x); }
LFM2_ALWAYS float sum_of(Floats x) {
  const float32x4_t two = vpaddq_f32(x, x);
  return vgetq_lane_f32(vpaddq_f32(two, two), 0);
}
LFM2_ALWAYS Floats bytes_to_floats(const uint8_t* at) {
  uint32_t four;
  std::memcpy(&four, at, sizeof four);
  const uint16x8_t wide = vmovl_u8(vcreate_u8(four));
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide)));
}
LFM2_ALWAYS Floats divide(Floats a, Floats b) { return vdivq_f32(a, b); }
LFM2_ALWAYS Mask is_negative(Floats x) { return vcltzq_f32(x); }  // of -0 not
LFM2_ALWAYS Ints magnitude_bits(Floats x) { return vreinterpretq_s32_f32(vabsq_f32(x)); }
LFM2_ALWAYS Ints to_nearest_ints(Floats x) { return vcvtnq_s32_f32(x); }

// x[0], x[2], ...; the float behind the last of them is not read.
LFM2_ALWAYS Floats load_every_second(const float* x) {
  const float32x4_t high = vld1q_f32(x + kLanes - 1);
  return vuzp1q_f32(vld1q_f32(x), vextq_f32(high, high, 1));
}
LFM2_ALWAYS Floats to_floats(Ints x) { return vcvtq_f32_s32(x); }

// The first `count` lanes; the others are 0, and nothing behind `count` is read.
LFM2_ALWAYS Floats load_first(const void* at, int64_t count) {
  if (count >= kLanes) {
    return vld1q_f32(static_cast<const float*>(at));
  }
  alignas(16) float few[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(&few[i], static_cast<const char*>(at) + i * 4, sizeof few[i]);
  }
  return vld1q_f32(few);
}

// The same of IEEE halves.
LFM2_ALWAYS Floats load_halves_first(const void* at, int64_t count) {
  if (count >= kLanes) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(static_cast<const uint8_t*>(at))));
  }
  uint64_t halves = 0;
  if (count == 1) {
    std::memcpy(&halves, at, 2);
  } else if (count == 2) {
    std::memcpy(&halves, at, 4);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(reinterpret_cast<char*>(&halves) + i * 2, static_cast<const char*>(at) + i * 2, 2);
    }
  }
  return vcvt_f32_f16(vreinterpret_f16_u64(vcreate_u64(halves)));
}

// The same of numbers of 4 bits, from number `first` (an even one where count > 1) on.
LFM2_ALWAYS Floats load_nibbles_first(const uint8_t* at, int64_t first, int64_t count) {
  uint32_t word = at[first / 2];
  if (count > 2) {
    word |= static_cast<uint32_t>(at[first / 2 + 1]) << 8;
  }
  const int32x4_t right = {0, -4, -8, -12};
  const uint32x4_t apart = vshlq_u32(vdupq_n_u32(word >> first % 2 * 4), right);
  return vcvtq_f32_u32(vandq_u32(apart, vdupq_n_u32(15)));
}

LFM2_ALWAYS Order load_order(const int32_t* lanes) {
  const int32x4_t bytes = vmlaq_n_s32(vdupq_n_s32(0x03020100), vld1q_s32(lanes), 0x04040404);
  return vreinterpretq_u8_s32(bytes);
}
LFM2_ALWAYS Floats permute(Floats x, Order order) {
  return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(x), order));
}

LFM2_ALWAYS Bytes load_bytes(const void* at) { return vld1q_s8(static_cast<const int8_t*>(at)); }
LFM2_ALWAYS Bytes load_bytes_first(const void* at, int64_t count) {
  if (count >= 16) {
    return load_bytes(at);
  }
  alignas(16) int8_t few[16] = {};
  for (int64_t i = 0; i < count; ++i) {
    few[i] = static_cast<const int8_t*>(at)[i];
  }
  return vld1q_s8(few);
}
LFM2_ALWAYS Bytes low_nibbles(Bytes x) { return vandq_s8(x, vdupq_n_s8(15)); }
LFM2_ALWAYS Bytes high_nibbles(Bytes x) { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(x), 4)); }
LFM2_ALWAYS Ints zero_ints() { return vdupq_n_s32(0); }
LFM2_ALWAYS Ints broadcast_int(int32_t x) { return vdupq_n_s32(x); }
LFM2_ALWAYS Ints add_ints(Ints a, Ints b) { return vaddq_s32(a, b); }
LFM2_ALWAYS Ints max_ints(Ints a, Ints b) { return vmaxq_s32(a, b); }
LFM2_ALWAYS int32_t greatest_of(Ints x) { return vmaxvq_s32(x); }
LFM2_ALWAYS int32_t sum_of(Ints x) { return vaddvq_s32(x); }

// 32 codes as bytes, exclusive or `flip`: one after the other, or the even ones and the odd ones apart.
LFM2_ALWAYS Bytes as_codes(const Ints* x, int8_t flip) {
  const int16x8_t low = vcombine_s16(vmovn_s32(x[0]), vmovn_s32(x[1]));
  const int16x8_t high = vcombine_s16(vmovn_s32(x[2]), vmovn_s32(x[3]));
  return veorq_s8(vcombine_s8(vmovn_s16(low), vmovn_s16(high)), vdupq_n_s8(flip));
}
LFM2_ALWAYS void store_in_order(const Ints (&x)[8], int8_t flip, int8_t* to) {
  vst1q_s8(to, as_codes(x, flip));
  vst1q_s8(to + 16, as_codes(x + 4, flip));
}
LFM2_ALWAYS void store_apart(const Ints (&x)[8], int8_t flip, int8_t* even, int8_t* odd) {
  const Bytes low = as_codes(x, flip), high = as_codes(x + 4, flip);
  vst1q_s8(even, vuzp1q_s8(low, high));
  vst1q_s8(odd, vuzp2q_s8(low, high));
}
LFM2_ALWAYS Ints times_128(Ints x) { return vshlq_n_s32(x, 7); }

LFM2_ALWAYS Ints as_ints(Floats x) { return vreinterpretq_s32_f32(x); }
LFM2_ALWAYS Ints as_ints(Bytes x) { return vreinterpretq_s32_s8(x); }
LFM2_ALWAYS Bytes as_bytes(Ints x) { return vreinterpretq_s8_s32(x); }
LFM2_ALWAYS Floats as_floats(Ints x) { return vreinterpretq_f32_s32(x); }

// 4 x 4 words of four registers: word i of row r becomes word r of row i.
LFM2_ALWAYS void turn_blocks(Ints& a, Ints& b, Ints& c, Ints& d) {
  const int64x2_t t0 = vreinterpretq_s64_s32(vzip1q_s32(a, b)), t1 = vreinterpretq_s64_s32(vzip2q_s32(a, b));
  const int64x2_t t2 = vreinterpretq_s64_s32(vzip1q_s32(c, d)), t3 = vreinterpretq_s64_s32(vzip2q_s32(c, d));
  a = vreinterpretq_s32_s64(vzip1q_s64(t0, t2));
  b = vreinterpretq_s32_s64(vzip2q_s64(t0, t2));
  c = vreinterpretq_s32_s64(vzip1q_s64(t1, t3));
  d = vreinterpretq_s32_s64(vzip2q_s64(t1, t3));
}
LFM2_ALWAYS void transpose(Ints (&m)[kLanes]) { turn_blocks(m[0], m[1], m[2], m[3]); }

// Bytes of weights at 8 bits as `byte_products` wants them; kByteZero is what is left of their zero point.
constexpr int kByteZero = 0;
using ByteWeights = Bytes;
LFM2_ALWAYS ByteWeights byte_weights(Bytes codes) { return veorq_s8(codes, vdupq_n_s8(-128)); }

// Of each 4 bytes of two registers of weights the sum of their products with a's and b's.
LFM2_ALWAYS Ints nibble_products(Bytes first, Bytes second, Bytes a, Bytes b) {
  return vdotq_s32(vdotq_s32(vdupq_n_s32(0), first, a), second, b);
}
LFM2_ALWAYS Ints byte_products(ByteWeights first, ByteWeights second, Bytes a, Bytes b) {
  return nibble_products(first, second, a, b);
}
LFM2_ALWAYS Ints add_byte_products(Ints sum, ByteWeights weights, Bytes x) { return vdotq_s32(sum, weights, x); }

// 16 inputs of a token; 4 of them at a time are multiplied with the 4 bytes of each lane.
using SixteenInputs = Bytes;
LFM2_ALWAYS SixteenInputs load_sixteen(const int8_t* at) { return vld1q_s8(at); }

// Products of 32 inputs with a lane's weights of 4 bits, 4 times 8 of them; `offset` takes the zero point out.
struct NibbleSum {
  int32x4_t low_sum, high_sum;

  LFM2_ALWAYS void start(int32_t offset) {
    low_sum = vdupq_n_s32(offset);
    high_sum = vdupq_n_s32(0);
  }
  template <int kQuad>
  LFM2_ALWAYS void add(Bytes low, Bytes high, SixteenInputs first, SixteenInputs second) {
    low_sum = vdotq_laneq_s32(low_sum, low, first, kQuad);
    high_sum = vdotq_laneq_s32(high_sum, high, second, kQuad);
  }
  LFM2_ALWAYS Floats total() const { return vcvtq_f32_s32(vaddq_s32(low_sum, high_sum)); }
};

// Lane r: the sum of row r.
LFM2_ALWAYS Ints sums_of_rows(const Ints (&m)[4]) {
  return vpaddq_s32(vpaddq_s32(m[0], m[1]), vpaddq_s32(m[2], m[3]));
}

// The same apart for the first and the second half of each row.
LFM2_ALWAYS void halves_of_rows(const Ints (&m)[4], Ints (&to)[2]) {
  const Ints a = vpaddq_s32(m[0], m[1]), b = vpaddq_s32(m[2], m[3]);
  to[0] = vuzp1q_s32(a, b);
  to[1] = vuzp2q_s32(a, b);
}

// Of two registers' blocks the even ones, and the odd ones.
LFM2_ALWAYS void every_second_block(Ints a, Ints b, Ints (&to)[2]) {
  to[0] = a;
  to[1] = b;
}

LFM2_ALWAYS void store_sum_of_blocks(float* at, Floats x) { vst1q_f32(at, x); }

LFM2_ALWAYS Bytes broadcast_word(const int8_t* x) {
  int32_t bits;
  std::memcpy(&bits, x, sizeof bits);
  return as_bytes(vdupq_n_s32(bits));
}

}  // namespace
}  // namespace lfm2
