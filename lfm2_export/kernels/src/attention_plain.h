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
  uint8_t* row = to.data + position * cache_row_bytes(to.head_dim, to.is_int8);
  if (to.is_int8) {
    store_int8(x, to.head_dim, row);
  } else {
    std::memcpy(row, x, to.head_dim * sizeof(float));
  }
}

// A row as floats: in place, or taken apart into `room`.
inline const float* row_of(const HeadCache& cache, int64_t position, float* room) {
  const uint8_t* row = cache.data + position * cache_row_bytes(cache.head_dim, cache.is_int8);
  if (!cache.is_int8) {
    return reinterpret_cast<const float*>(row);
  }
  float scale;
  std::memcpy(&scale, row + cache.head_dim, sizeof scale);
  for (int64_t i = 0; i < cache.head_dim; ++i) {
    room[i] = static_cast<float>(static_cast<int32_t>(row[i]) - kCodeZero) * scale;
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

inline void see_key(const QueryTile& tile, int64_t query, float score, const float* value, int64_t head_dim) {
  float* sum = tile.sum + query * head_dim;
  if (score > tile.greatest[query]) {
    const float shrink = std::exp(tile.greatest[query] - score);  // 0 at first
    tile.weight[query] *= shrink;
    for (int64_t i = 0; i < head_dim; ++i) {
      sum[i] *= shrink;
    }
    tile.greatest[query] = score;
  }
  const float weight = std::exp(score - tile.greatest[query]);
  tile.weight[query] += weight;
  for (int64_t i = 0; i < head_dim; ++i) {
    sum[i] = __builtin_fmaf(weight, value[i], sum[i]);
  }
}

inline void attend_plain(const HeadCache& key, const HeadCache& value, int64_t first, int64_t end,
                         const QueryTile& tile, float* scratch) {
  const int64_t head_dim = key.head_dim;
  for (int64_t position = first; position < end; ++position) {
    if (tile.mask[position] == 0) {
      continue;
    }
    const float* k = row_of(key, position, scratch);
    const float* v = row_of(value, position, scratch + head_dim);
    for (int64_t query = 0; query < tile.count; ++query) {
      if (position < tile.ends[query]) {
        see_key(tile, query, dot_plain(k, tile.queries + query * head_dim, head_dim), v, head_dim);
      }
    }
  }
}

}  // namespace
}  // namespace lfm2
