// Grouped-query attention with its cache: q/k norm, RoPE, writing the cache, and the softmax over it, in one operator.
//
// The cache holds keys (after norm and RoPE) and values as floats, or as int8 with a scale per position and head that lies
// behind the codes: a quarter of the memory, and of what a decode step reads.
//
// With a window it may be a ring, which never grows. There a row's attended tokens are numbered, whatever its padding, and
// number i lies at i % capacity. A ring is made of whole steps, so that keys are summed up in the groups in which a cache
// that keeps everything has them: an answer is the same bits on either.

#pragma once

#include <cstddef>
#include <cstdint>

#include "work.h"

namespace lfm2 {

constexpr int kLaneKeys = 16;     // head_dim is a multiple of it; keys are scored so many at a time
constexpr int kMostHeadDim = 256;
constexpr int kTileQueries = 16;  // that share what is read of the cache
constexpr int kStepKeys = 64;     // between two looks at the running maximum; steps begin at multiples of it
constexpr int kPieceKeys = 1024;  // what a query sees of each piece of the cache is summed up apart: so its result depends
                                  // neither on who looks with it, nor on how many threads there are

constexpr int64_t cache_row_bytes(int64_t head_dim, bool is_int8) {
  return is_int8 ? head_dim + 4 : head_dim * 4;
}

// Keys or values of one head: [positions][row]. A row is head_dim floats, or head_dim codes (+ 128) and a float.
struct HeadCache {
  uint8_t* data;
  int64_t head_dim;
  bool is_int8;
  int64_t origin = 0;  // the position whose row comes first

  uint8_t* row(int64_t position) const { return data + (position - origin) * cache_row_bytes(head_dim, is_int8); }
};

// Some queries of one key/value head, and what they have seen so far: out = sum / weight once all keys have passed.
struct QueryTile {
  const float* queries;  // [count][head_dim], scaled by 1 / sqrt(head_dim)
  const int64_t* begins;  // [count]: the first position that each may see; null: 0
  const int64_t* ends;    // [count]: one past the last
  const int64_t* mask;   // [positions]: 0 where a position is none; null: all are
  int64_t count;         // at most kTileQueries
  float* greatest;       // [count]
  float* weight;         // [count]
  float* sum;            // [count][head_dim]

  int64_t begin(int64_t query) const { return begins == nullptr ? 0 : begins[query]; }
  bool has(int64_t position) const { return mask == nullptr || mask[position] != 0; }
};

struct AttentionKernels {
  // Positions first .. end-1 of one head; `scratch` of attention_scratch_floats(head_dim) floats.
  void (*attend)(const HeadCache& key, const HeadCache& value, int64_t first, int64_t end, const QueryTile& tile,
                 float* scratch);

  // One row into the cache.
  void (*store)(const float* x, const HeadCache& to, int64_t position);
};

constexpr int64_t attention_scratch_floats(int64_t head_dim) {
  return 2 * kStepKeys * head_dim + kTileQueries * kStepKeys;
}

struct AttentionProblem {
  const float* q;               // [batch, tokens, heads * head_dim]
  const float* k;               // [batch, tokens, kv_heads * head_dim]
  const float* v;               // likewise
  const float* q_norm;          // [head_dim]
  const float* k_norm;          // [head_dim]
  const float* cos;             // [positions, head_dim / 2]
  const float* sin;             // likewise
  const int64_t* position_ids;  // [batch, tokens]
  const int64_t* mask;          // [batch, total]
  const int32_t* last;          // [batch]: the index of each row's last attended position
  uint8_t* key;                 // [batch, kv_heads, capacity, row]
  uint8_t* value;
  float* out;  // [batch, tokens, heads * head_dim]
  int64_t batch, tokens, total, capacity, positions;
  int64_t heads, kv_heads, head_dim;
  int64_t window;  // attended positions that a token sees, its own included; 0: all before it
  float eps;
  bool is_int8;
  bool is_ring;  // capacity is a multiple of kStepKeys then, and not below the window
};

size_t attention_scratch_bytes(const AttentionProblem& problem, int workers);

void run_attention(const AttentionProblem& problem, const AttentionKernels& kernels, const ThreadPool& pool,
                   void* scratch);

}  // namespace lfm2
