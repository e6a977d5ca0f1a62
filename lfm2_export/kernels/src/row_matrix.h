// Weights as the ONNX contrib operators (MatMulNBits, QMoE) store them, row by row, and what multiplies with them.
//
// Nothing is packed anew: kernels read the initializers where the runtime has mapped them, so a program is loaded as soon
// as its graph is read, and its weights are in memory once. With few tokens a row is one dot product, read front to
// back; with many, 32 rows at a time are rearranged into a buffer in the second-level cache, which all tokens then use.
//
// Activations are int8 in groups of 32, or of 16 where the weights are: value = codes * scale.

#pragma once

#include <cstdint>

// What is inline here is compiled for every instruction set: none of those copies may be linked into the others' code.
#define LFM2_INLINE __attribute__((always_inline))

namespace lfm2 {

constexpr int kGroupInputs = 32;  // widths are multiples; inputs that share a scale in the activations, unless
constexpr int kLeastGroup = 16;   // the weights' groups are so small
constexpr int kSmallShares = kGroupInputs / kLeastGroup;
constexpr int kBlockRows = 32;    // rows that are rearranged together
constexpr int kPadding = 512;     // rows of activations are that far apart, or a multiple; what lies between is not read
constexpr int kShift = 128;       // what `shifted` activations have on top

// value = (code - zero_point) * scale. 4-bit codes: two in a byte, the earlier one in its lower half.
struct RowMatrix {
  const uint8_t* codes;        // [rows, columns * bits / 8]
  const void* scales;          // [rows, columns / group]: float, or IEEE half
  const uint8_t* zero_points;  // [rows, ceil(columns / group / 2)], two in a byte; null: 8 or 128. Only of 4-bit codes
  int64_t rows;
  int64_t columns;  // a multiple of 32
  int64_t group;    // 16, 32, 64, 128 or 256
  int bits;         // 4 or 8
  bool half_scales;

  LFM2_INLINE int64_t groups() const { return columns / group; }
  LFM2_INLINE bool has_small_groups() const { return group < kGroupInputs; }
  LFM2_INLINE int64_t row_bytes() const { return columns * bits / 8; }
  LFM2_INLINE int64_t point_bytes() const { return (groups() + 1) / 2; }
  LFM2_INLINE int64_t scale_bytes() const { return groups() * (half_scales ? 2 : 4); }
  LFM2_INLINE const uint8_t* row(int64_t index) const { return codes + index * row_bytes(); }
  LFM2_INLINE const uint8_t* scales_of(int64_t index) const {
    return static_cast<const uint8_t*>(scales) + index * scale_bytes();
  }
  LFM2_INLINE const uint8_t* points_of(int64_t index) const {
    return zero_points == nullptr ? nullptr : zero_points + index * point_bytes();
  }

  // `count` rows from `first` on.
  LFM2_INLINE RowMatrix part(int64_t first, int64_t count) const {
    RowMatrix found = *this;
    found.codes = row(first);
    found.scales = scales_of(first);
    found.zero_points = points_of(first);
    found.rows = count;
    return found;
  }
};

// `tokens` quantized rows. The codes' order is the one in which 4-bit weights come apart: of 128 inputs the 64 even ones,
// then the 64 odd ones. For 8-bit weights they are in their own order.
struct RowActivations {
  int8_t* codes;  // [tokens][padded]; + 128 where `shifted`, as uint8
  float* scales;  // [tokens][groups]; NaN where the group held a NaN or an infinity
  float* sums;    // [tokens][groups]: the sum of the group's codes, a whole number
  int64_t tokens;
  int64_t padded;
  int64_t groups;     // of `padded` inputs
  int bits;           // the weights'
  bool small_groups;  // of 16 inputs, not of 32
  bool shifted;

  LFM2_INLINE int8_t* codes_of(int64_t token) const { return codes + token * padded; }
  LFM2_INLINE float* scales_of(int64_t token) const { return scales + token * groups; }
  LFM2_INLINE float* sums_of(int64_t token) const { return sums + token * groups; }

  LFM2_INLINE RowActivations part(int64_t first, int64_t count) const {
    RowActivations found = *this;
    found.codes = codes_of(first);
    found.scales = scales_of(first);
    found.sums = sums_of(first);
    found.tokens = count;
    return found;
  }
};

// What a product reads: rows of floats as they are, or the RMS norm of them, or of their sum with others.
struct RowInput {
  const float* x;            // [tokens, columns]
  const float* delta;        // [tokens, columns] or null: what is added to x before the norm
  const float* gamma;        // [columns] or null: the norm's weights; without them there is no norm, and no delta
  const float* delta_gamma;  // [columns] or null: of a norm of delta, before it is added
  float epsilon;             // of the norms
  float* sum;                // [tokens, columns]: x + delta, where there is a delta

  LFM2_INLINE RowInput from(int64_t token, int64_t columns) const {
    RowInput found = *this;
    found.x += token * columns;
    if (delta != nullptr) {
      found.delta += token * columns;
      found.sum += token * columns;
    }
    return found;
  }
};

// Bytes that `RowKernels::block` needs for a matrix of so many columns, 64-byte aligned.
constexpr int64_t block_scratch_bytes(int64_t columns, bool small_groups) {  // columns: kMostSize at most
  return kBlockRows * (columns + columns / (small_groups ? kLeastGroup : kGroupInputs) * 8);
}

struct RowKernels {
  const char* name;

  // to[columns]: the norm of one token of `in`, whose sum is written too.
  void (*normalize)(const RowInput& in, int64_t columns, int64_t token, float* to);

  // One token: `columns` floats.
  void (*quantize)(const float* x, int64_t columns, const RowActivations& to, int64_t token);

  // silu(gate) * up of 32 neighbouring inputs, `step` (1 or 2) floats apart: inputs 32 * `group` and so on of the token.
  void (*swiglu)(const float* gate, const float* up, int step, const RowActivations& to, int64_t group, int64_t token);

  // y[token * stride + row] for all rows of w and all tokens of x, which is not `shifted`.
  void (*dot)(const RowMatrix& w, const RowActivations& x, float* y, int64_t stride);

  // The same for up to 32 rows of what `takes_block` says; null where `dot` serves any number of tokens.
  void (*block)(const RowMatrix& w, const RowActivations& x, float* y, int64_t stride, void* scratch);

  // out[count] += weight * y[count]
  void (*accumulate)(float weight, const float* y, float* out, int64_t count);

  int64_t few_tokens;  // more are worth `block`
  bool shifts;         // whether it takes x `shifted`
  bool small_groups;   // whether it takes weights in groups of 16

  LFM2_INLINE bool has_block(bool of_small_groups) const { return block != nullptr && (small_groups || !of_small_groups); }
  LFM2_INLINE bool takes_block(int64_t tokens, bool of_small_groups) const {
    return has_block(of_small_groups) && tokens > few_tokens;
  }
  LFM2_INLINE bool takes_shifted(int64_t tokens, bool of_small_groups) const {
    return shifts && takes_block(tokens, of_small_groups);
  }
};

}  // namespace lfm2
