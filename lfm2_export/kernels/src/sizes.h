// Sizes out of a stranger's graph: products and sums that say when they do not fit, instead of wrapping to one that does.

#pragma once

#include <cstdint>
#include <limits>

namespace lfm2 {

// Sizes are counted in files that are compiled for several instruction sets: no copy may be linked into another's code.
#define LFM2_SIZE inline __attribute__((always_inline))

// The longest axis, and the most that an attribute may ask for: far above any model, and a product of two still fits.
constexpr int64_t kMostSize = std::numeric_limits<int32_t>::max();

// Of a layer: what moe_pass.h counts in 32 bits (1024 tokens, each with all of them) fits.
constexpr int64_t kMostExperts = 65536;

// What a size becomes that does not fit. No tensor has so many elements, no machine so much memory.
constexpr int64_t kTooMany = std::numeric_limits<int64_t>::max();

// a * b; a negative size does not fit either.
LFM2_SIZE int64_t times(int64_t a, int64_t b) {
  int64_t product = 0;
  return a < 0 || b < 0 || __builtin_mul_overflow(a, b, &product) ? kTooMany : product;
}

template <typename... Sizes>
LFM2_SIZE int64_t times(int64_t a, int64_t b, Sizes... others) {
  return times(times(a, b), others...);
}

LFM2_SIZE int64_t plus(int64_t a, int64_t b) {
  int64_t sum = 0;
  return a < 0 || b < 0 || __builtin_add_overflow(a, b, &sum) ? kTooMany : sum;
}

// The next multiple of `step`.
LFM2_SIZE int64_t round_up(int64_t size, int64_t step) {
  const int64_t end = plus(size, step - 1);
  return end == kTooMany ? kTooMany : end / step * step;
}

}  // namespace lfm2
