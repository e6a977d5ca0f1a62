// The kernels of attention.h without intrinsics, compiled once per instruction set.

#pragma once

#include <cmath>
#include <cstring>

#include "attention.h"
#include "elementwise.h"

namespace lfm2 {
namespace {

constexpr int kCodeZero = 128;  // codes are unsigned

inline void store_int8(const float* x, int64_t head_dim, uint8_t* row) {
  float greatest = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < head_dim; ++i) {
    const float magnitude = bits_to_float(float_to_bits(x[i]) & 0x7fffffffu);
    greatest = magnitude > greatest ? magnitude : greatest;
    finite = finite && magnitude < INFINITY;  // false for NaN too
  }
  const bool usable = finite && greatest > 1e-30f;
  const float inverse = usable ? 127.0f / greatest : 0.0f;
  for (int64_t i = 0; i < head_dim; ++i) {
    row[i] = static_cast<uint8_t>(static_cast<int32_t>(round_to_even(usable ? x[i] * inverse : 0.0f)) + kCodeZero);
  }
  const float scale = !finite ? NAN : usable ? greatest / 127.0f : 0.0f;
  std::memcpy(row + head_dim, &scale, sizeof scale);
}

inline void store_row(const float* x, const HeadCache& to, int64_t position) {
  uint8_t* row = to.row(position);
  if (to.is_int8) {
    store_int8(x, to.head_dim, row);
  } else {
    std::memcpy(row, x, to.head_dim * sizeof(float));
  }
}

// Rows first .. first+count-1 as floats [count][head_dim]: in place, or taken apart into `room`.
inline const float* rows_of(const HeadCache& cache, int64_t first, int64_t count, float* room) {
  const int64_t row_bytes = cache_row_bytes(cache.head_dim, cache.is_int8);
  const uint8_t* rows = cache.row(first);
  if (!cache.is_int8) {
    return reinterpret_cast<const float*>(rows);
  }
  for (int64_t r = 0; r < count; ++r, rows += row_bytes) {
    float scale;
    std::memcpy(&scale, rows + cache.head_dim, sizeof scale);
    for (int64_t i = 0; i < cache.head_dim; ++i) {
      room[r * cache.head_dim + i] = static_cast<float>(static_cast<int32_t>(rows[i]) - kCodeZero) * scale;
    }
  }
  return room;
}

// Lanes of one register's worth, so that a compiler that may not reorder sums can still use registers.
inline float dot_plain(const float* a, const float* b, int64_t count) {
  float lanes[kLaneKeys] = {};
  for (int64_t i = 0; i < count; i += kLaneKeys) {
    for (int lane = 0; lane < kLaneKeys; ++lane) {
      lanes[lane] = __builtin_fmaf(a[i + lane], b[i + lane], lanes[lane]);
    }
  }
  float total = 0.0f;
  for (const float lane : lanes) {
    total += lane;
  }
  return total;
}

// One query and up to kStepKeys keys: scores, then weights against the greatest so far, then the values.
inline void see_keys(const QueryTile& tile, int64_t query, int64_t first, int64_t count, const float* keys,
                     const float* values, int64_t head_dim) {
  float weights[kStepKeys];
  float greatest = tile.greatest[query];
  const int64_t seen = tile.ends[query] - first < count ? tile.ends[query] - first : count;
  const int64_t hidden = tile.begin(query) - first;
  bool any = false;
  for (int64_t key = 0; key < seen; ++key) {
    if (key >= hidden && tile.has(first + key)) {
      weights[key] = dot_plain(keys + key * head_dim, tile.queries + query * head_dim, head_dim);
      greatest = weights[key] > greatest ? weights[key] : greatest;
      any = true;
    } else {
      weights[key] = -INFINITY;
    }
  }
  if (!any) {
    return;
  }
  const float before = tile.greatest[query], shrink = greatest > before ? std::exp(before - greatest) : 1.0f;
  float total = 0.0f;
  for (int64_t key = 0; key < seen; ++key) {
    const float below = weights[key] - greatest;  // NaN stays NaN
    const float weight = exp_of_negative(below < -87.0f ? -87.0f : below);
    weights[key] = weights[key] == -INFINITY ? 0.0f : weight;
  }
  float* sum = tile.sum + query * head_dim;
  for (int64_t i = 0; i < head_dim; ++i) {
    sum[i] *= shrink;
  }
  for (int64_t key = 0; key < seen; ++key) {
    total += weights[key];
    const float* value = values + key * head_dim;
    for (int64_t i = 0; i < head_dim; ++i) {
      sum[i] = __builtin_fmaf(weights[key], value[i], sum[i]);
    }
  }
  tile.greatest[query] = greatest;
  tile.weight[query] = tile.weight[query] * shrink + total;
}

inline void attend_plain(const HeadCache& key, const HeadCache& value, int64_t first, int64_t end,
                         const QueryTile& tile, float* scratch) {
  for (int64_t at = first; at < end; at += kStepKeys) {
    const int64_t count = end - at < kStepKeys ? end - at : kStepKeys;
    const float* keys = rows_of(key, at, count, scratch);
    const float* values = rows_of(value, at, count, scratch + kStepKeys * key.head_dim);
    for (int64_t query = 0; query < tile.count; ++query) {
      see_keys(tile, query, at, count, keys, values, key.head_dim);
    }
  }
}

}  // namespace
}  // namespace lfm2
