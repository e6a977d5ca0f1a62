// The reference of row_matrix.h: no intrinsics, one weight at a time.

#include "row_quantize.h"
#include "target.h"

namespace lfm2 {
namespace {

float scale_at(const RowMatrix& w, int64_t row, int64_t group) {
  if (w.half_scales) {
    uint16_t half;
    std::memcpy(&half, w.scales_of(row) + 2 * group, sizeof half);
    return half_to_float(half);
  }
  float scale;
  std::memcpy(&scale, w.scales_of(row) + 4 * group, sizeof scale);
  return scale;
}

int32_t nibble_at(const uint8_t* pairs, int64_t index) {
  return pairs[index / 2] >> (index % 2 * 4) & 15;
}

int32_t point_at(const RowMatrix& w, int64_t row, int64_t group) {
  if (w.zero_points == nullptr) {
    return w.bits == 4 ? 8 : 128;
  }
  return nibble_at(w.points_of(row), group);
}

// The integers of `count` inputs from `first` on, which are in one group, zero point taken out.
int32_t sum_of(const RowMatrix& w, int64_t row, int64_t first, int64_t count, const int8_t* x) {
  const int32_t point = point_at(w, row, first / w.group);
  int32_t sum = 0;
  for (int64_t index = first; index < first + count; ++index) {
    const int32_t code = w.bits == 4 ? nibble_at(w.row(row), index) : w.row(row)[index];
    sum += (code - point) * x[place_of(index, w.bits)];
  }
  return sum;
}

void dot(const RowMatrix& w, const RowActivations& x, float* y, int64_t stride) {
  const int64_t inputs = x.small_groups ? kLeastGroup : kGroupInputs;  // of a group of the activations
  for (int64_t token = 0; token < x.tokens; ++token) {
    for (int64_t row = 0; row < w.rows; ++row) {
      float total = 0.0f;
      for (int64_t first = 0; first < w.columns; first += inputs) {
        const float scale = scale_at(w, row, first / w.group) * x.scales_of(token)[first / inputs];
        total = __builtin_fmaf(static_cast<float>(sum_of(w, row, first, inputs, x.codes_of(token))), scale, total);
      }
      y[token * stride + row] = total;
    }
  }
}

}  // namespace

namespace scalar {

const RowKernels kRowKernels = {"scalar", normalize_row, quantize_row, swiglu_row, dot, nullptr, accumulate_row, 0,
                                false, false};

}  // namespace scalar
}  // namespace lfm2
