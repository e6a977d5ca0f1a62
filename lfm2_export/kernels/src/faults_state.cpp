// What can be wrong with the operators that keep a state. What lies in their tensors and leads to a place in memory is
// looked at too: rows of the window, the last position of each row. Position ids need no look: attention.cpp keeps them
// in the table.

#include <algorithm>

#include "checks.h"

namespace lfm2 {

GatedConvProblem prepare(const GatedConvOperands& o) {
  constexpr const char* kOp = "GatedConv";
  const Checks checks(kOp);
  checks.ranked(o.projected, "projected", Kind::kFloat, 3);
  checks.ranked(o.state, "state", Kind::kFloat, 3);
  GatedConvProblem p = {};
  p.batch = o.projected.sizes[0];
  p.tokens = o.projected.sizes[1];
  p.width = o.projected.sizes[2] / 3;
  p.taps = o.state.sizes[1] + 1;
  const int64_t held = p.taps - 1;
  checks.size("width", p.width);
  checks.size("taps", p.taps);
  checks.shaped(o.projected, "projected", Kind::kFloat, {p.batch, p.tokens, 3 * p.width});
  checks.shaped(o.state, "state", Kind::kFloat, {p.batch, held, p.width});
  checks.counted(o.weight, "weight", Kind::kFloat, times(p.width, p.taps));
  checks.optional(o.bias, "bias", Kind::kFloat, p.width);
  checks.counted(o.attended, "attended", Kind::kFloat, times(p.batch, p.tokens));
  checks.counted(o.rows, "rows", Kind::kInt64, times(p.batch, held));
  p.projected = o.projected.as<float>();
  p.weight = o.weight.as<float>();
  p.bias = o.bias.is_there ? o.bias.as<float>() : nullptr;
  p.state = o.state.as<float>();
  p.attended = o.attended.as<float>();
  p.rows = o.rows.as<int64_t>();
  for (int64_t i = 0; i < o.rows.count; ++i) {
    if (p.rows[i] < 0 || p.rows[i] >= p.tokens + held) {
      refuse("%s: row %" PRId64 " of %" PRId64 " is not there", kOp, p.rows[i], p.tokens + held);
    }
  }
  return p;
}

TokenLayoutProblem prepare(int64_t taps, const TokenLayoutOperands& o) {
  constexpr const char* kOp = "TokenLayout";
  const Checks checks(kOp);
  checks.size("taps", taps);
  checks.ranked(o.mask, "attention_mask", Kind::kInt64, 2);
  checks.ranked(o.ids, "input_ids", Kind::kInt64, 2);
  TokenLayoutProblem p = {};
  p.mask = o.mask.as<int64_t>();
  p.batch = o.mask.sizes[0];
  p.total = o.mask.sizes[1];
  p.tokens = o.ids.sizes[1];
  p.taps = taps;
  if (o.ids.sizes[0] != p.batch || p.tokens > p.total) {
    refuse("%s: the mask [%" PRId64 ", %" PRId64 "] is not that of tokens [%" PRId64 ", %" PRId64 "]", kOp, p.batch,
           p.total, o.ids.sizes[0], p.tokens);
  }
  if (times(p.batch, taps) > kMostSize) {
    refuse("%s: %" PRId64 " rows of %" PRId64 " taps", kOp, p.batch, taps);
  }
  return p;
}

void check(const AttentionAttributes& a) {
  const Checks checks(a.op);
  if (a.heads < 1 || a.heads > kMostSize || a.kv_heads < 1 || a.heads % a.kv_heads != 0) {
    refuse("%s: %" PRId64 " heads for %" PRId64 " of the cache", a.op, a.heads, a.kv_heads);
  }
  checks.epsilon(a.eps);
  if (a.window < 0 || a.window > kMostSize) {
    refuse("%s: window is %" PRId64 ": 1 to %" PRId64 " are possible", a.op, a.window, kMostSize);
  }
  if (a.ring < 0 || a.ring > 1) {
    refuse("%s: ring is %" PRId64 ": 0 and 1 are known", a.op, a.ring);
  }
}

namespace {

// Batch, tokens, positions and head size, from the tensors that say them first.
AttentionProblem sizes_of(const AttentionAttributes& a, const AttentionOperands& o) {
  const Checks checks(a.op);
  checks.ranked(o.q, "q", Kind::kFloat, 3);
  checks.ranked(o.mask, "attention_mask", Kind::kInt64, 2);
  AttentionProblem p = {};
  p.batch = o.q.sizes[0];
  p.tokens = o.q.sizes[1];
  p.total = o.mask.sizes[1];
  p.heads = a.heads;
  p.kv_heads = a.kv_heads;
  p.head_dim = o.q.sizes[2] / a.heads;
  p.window = a.window;
  p.eps = a.eps;
  p.is_int8 = a.is_int8;
  p.is_ring = a.ring == 1;
  if (p.head_dim < kLaneKeys || p.head_dim % kLaneKeys != 0 || p.head_dim > kMostHeadDim) {
    refuse("%s: head_dim %" PRId64 " is not a multiple of %d up to %d", a.op, p.head_dim, kLaneKeys, kMostHeadDim);
  }
  return p;
}

// The cache before this call. Without a ring, what neither it nor this call's tokens fill must not be seen: total <= past +
// tokens. A ring may hold the last of any number of positions.
void take_past(const AttentionAttributes& a, const AttentionOperands& o, AttentionProblem& p) {
  const Checks checks(a.op);
  const Kind kind = a.is_int8 ? Kind::kByte : Kind::kFloat;
  const int64_t row = a.is_int8 ? p.head_dim + 4 : p.head_dim;
  checks.ranked(o.past_key, "past_key", kind, 4);
  const int64_t past = o.past_key.sizes[2];
  checks.shaped(o.past_key, "past_key", kind, {p.batch, a.kv_heads, past, row});
  checks.shaped(o.past_value, "past_value", kind, {p.batch, a.kv_heads, past, row});
  if (p.is_ring && (past % kStepKeys != 0 || past < a.window)) {
    refuse("%s: a ring of %" PRId64 " positions is no multiple of %d, or below the window of %" PRId64, a.op, past,
           kStepKeys, a.window);
  }
  if (p.total < p.tokens || (!p.is_ring && p.total > past + p.tokens)) {
    refuse("%s: %" PRId64 " tokens behind %" PRId64 " positions, but a mask of %" PRId64 " positions", a.op, p.tokens,
           past, p.total);
  }
  p.capacity = p.is_ring ? past : std::max(past, p.total);
  if (times(p.batch, a.kv_heads, p.capacity, cache_row_bytes(p.head_dim, a.is_int8)) == kTooMany) {
    refuse("%s: a cache of %" PRId64 " positions is too large", a.op, p.capacity);
  }
}

void take_table(const AttentionAttributes& a, const AttentionOperands& o, AttentionProblem& p) {
  const Checks checks(a.op);
  const int64_t half = p.head_dim / 2;
  checks.tensor(o.cos, "cos", Kind::kFloat);
  p.positions = o.cos.count / half;
  if (p.positions < 1) {
    refuse("%s: cos holds no position", a.op);
  }
  checks.counted(o.cos, "cos", Kind::kFloat, times(p.positions, half));
  checks.counted(o.sin, "sin", Kind::kFloat, times(p.positions, half));
  checks.counted(o.position_ids, "position_ids", Kind::kInt64, times(p.batch, p.tokens));
  p.cos = o.cos.as<float>();
  p.sin = o.sin.as<float>();
  p.position_ids = o.position_ids.as<int64_t>();
}

void take_ends(const AttentionAttributes& a, const AttentionOperands& o, AttentionProblem& p) {
  const Checks checks(a.op);
  checks.counted(o.mask, "attention_mask", Kind::kInt64, times(p.batch, p.total));
  checks.counted(o.last, "seqlens_k", Kind::kInt32, p.batch);
  p.mask = o.mask.as<int64_t>();
  p.last = o.last.as<int32_t>();
  for (int64_t i = 0; i < p.batch; ++i) {
    if (p.last[i] < 0 || p.last[i] >= p.total) {
      refuse("%s: seqlens_k %d of %" PRId64 " positions", a.op, p.last[i], p.total);
    }
  }
}

}  // namespace

AttentionProblem prepare(const AttentionAttributes& a, const AttentionOperands& o) {
  check(a);
  const Checks checks(a.op);
  AttentionProblem p = sizes_of(a, o);
  const int64_t keys = times(p.batch, p.tokens, a.kv_heads, p.head_dim);
  checks.shaped(o.q, "q", Kind::kFloat, {p.batch, p.tokens, a.heads * p.head_dim});
  checks.counted(o.k, "k", Kind::kFloat, keys);
  checks.counted(o.v, "v", Kind::kFloat, keys);
  checks.counted(o.q_norm, "q_norm", Kind::kFloat, p.head_dim);
  checks.counted(o.k_norm, "k_norm", Kind::kFloat, p.head_dim);
  p.q = o.q.as<float>();
  p.k = o.k.as<float>();
  p.v = o.v.as<float>();
  p.q_norm = o.q_norm.as<float>();
  p.k_norm = o.k_norm.as<float>();
  take_past(a, o, p);
  take_table(a, o, p);
  take_ends(a, o, p);
  return p;
}

}  // namespace lfm2
