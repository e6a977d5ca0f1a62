// What a host says of a tensor that it hands to an operator.

#pragma once

#include <cstdint>

#include "sizes.h"

namespace lfm2 {

enum class Kind : uint8_t { kFloat, kHalf, kByte, kInt32, kInt64, kOther };

constexpr int kMostAxes = 8;

struct Operand {
  const void* data = nullptr;
  int64_t count = 0;         // elements that lie at `data`
  Kind kind = Kind::kOther;
  bool is_there = false;     // false: an optional one that was left out
  int64_t rank = 0;          // where it is above kMostAxes, `sizes` says nothing
  int64_t sizes[kMostAxes];  // of the first `rank` axes: clearing the others would take longer than all of the checks

  // What the shape says; of more axes than kMostAxes it says nothing.
  int64_t elements() const {
    int64_t product = rank > kMostAxes ? kTooMany : 1;
    for (int64_t axis = 0; axis < rank && rank <= kMostAxes; ++axis) {
      product = times(product, sizes[axis]);
    }
    return product;
  }

  // What lies in a file that a graph names may begin anywhere.
  bool is_aligned(int64_t bytes) const { return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0; }

  int64_t last() const { return rank < 1 || rank > kMostAxes ? 1 : sizes[rank - 1]; }

  template <typename Element>
  const Element* as() const {
    return static_cast<const Element*>(data);
  }
};

}  // namespace lfm2
