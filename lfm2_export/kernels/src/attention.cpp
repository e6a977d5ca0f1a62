// How the work is cut: first every token's keys, values and queries are made, then tiles of queries pass over the cache,
// piece by piece. A decode step has one tile per head only, so the pieces are tasks of their own there. A query's pieces
// are put together one after the other, first to last, in either case.
//
// In a ring, tokens are written over those that no window reaches any more. A call with more tokens than that has room
// for works on a longer ring of its own, from which the last positions come back.

#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "row_work.h"

namespace lfm2 {
namespace {

constexpr int64_t kTasksWanted = 8;  // per worker
constexpr int64_t kFewTiles = 8;     // of a head: results of so many are kept for each piece

struct Plan {
  int64_t queries;  // of one head of the cache: tokens * (heads / kv_heads)
  int64_t tiles;    // of one head
  int64_t pieces;   // of the cache that are tasks of their own; 1: a task takes all of them
  int64_t ring;     // positions of the ring that this call works on; 0: on no ring
  int64_t slots() const { return tiles * pieces; }
};

// The cache's own, if it has room for the call's tokens beside all that they see.
int64_t ring_of(const AttentionProblem& p) {
  const int64_t seen = std::min(p.total, p.tokens + p.window - 1);
  return seen <= p.capacity ? p.capacity : round_up(seen, kStepKeys);
}

Plan plan_of(const AttentionProblem& p, int workers) {
  Plan plan;
  plan.queries = p.tokens * (p.heads / p.kv_heads);
  plan.tiles = ceil_div(plan.queries, kTileQueries);
  const bool enough = plan.tiles > kFewTiles || p.batch * p.kv_heads * plan.tiles >= workers * kTasksWanted;
  plan.pieces = enough ? 1 : std::max<int64_t>(1, ceil_div(p.total, kPieceKeys));
  plan.ring = p.is_ring ? ring_of(p) : 0;
  return plan;
}

struct Scratch {
  float* queries;   // [batch, kv_heads, queries, head_dim]; of a head the token comes first, then the head of the group
  int64_t* begins;  // [batch, queries]; null without a window
  int64_t* ends;    // likewise
  float* greatest;  // [batch, kv_heads, pieces, queries]
  float* weight;    // likewise
  float* sum;       // [batch, kv_heads, pieces, queries, head_dim]
  int64_t* numbers;  // [batch, tokens + 1], of a ring: attended tokens of the row before each of this call, and after all
  uint8_t* key;      // a longer ring [batch, kv_heads, ring, row]; null: the cache itself serves
  uint8_t* value;
};

Scratch take(Arena& arena, const AttentionProblem& p, const Plan& plan) {
  const int64_t rows = times(p.batch, p.kv_heads, plan.queries);
  Scratch s;
  s.queries = arena.take<float>(times(rows, p.head_dim));
  s.begins = p.window == 0 ? nullptr : arena.take<int64_t>(times(p.batch, plan.queries));
  s.ends = arena.take<int64_t>(times(p.batch, plan.queries));
  s.greatest = arena.take<float>(times(rows, plan.pieces));
  s.weight = arena.take<float>(times(rows, plan.pieces));
  s.sum = arena.take<float>(times(rows, plan.pieces, p.head_dim));
  s.numbers = p.is_ring ? arena.take<int64_t>(times(p.batch, p.tokens + 1)) : nullptr;
  s.key = s.value = nullptr;
  if (p.is_ring && plan.ring != p.capacity) {
    const int64_t bytes = times(p.batch, p.kv_heads, plan.ring, cache_row_bytes(p.head_dim, p.is_int8));
    s.key = arena.take<uint8_t>(bytes);
    s.value = arena.take<uint8_t>(bytes);
  }
  return s;
}

// norm(x) * weight, then RoPE at a position, then times `scale`.
void normalize_and_turn(const float* x, const float* weight, float eps, const float* cos, const float* sin, float scale,
                        int64_t head_dim, float* to) {
  float squares = 0.0f;
  for (int64_t i = 0; i < head_dim; ++i) {
    squares += x[i] * x[i];
  }
  const float factor = 1.0f / std::sqrt(squares / static_cast<float>(head_dim) + eps) * scale;
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i] * factor * weight[i], b = x[half + i] * factor * weight[half + i];
    to[i] = a * cos[i] - b * sin[i];
    to[half + i] = b * cos[i] + a * sin[i];
  }
}

// Head `of_head` = row * kv_heads + head of a cache of so many positions.
HeadCache head_of(uint8_t* cache, const AttentionProblem& p, int64_t positions, int64_t of_head) {
  const int64_t bytes = positions * cache_row_bytes(p.head_dim, p.is_int8);
  return {cache + of_head * bytes, p.head_dim, p.is_int8};
}

// Keys and values of one head.
struct Pair {
  HeadCache key, value;
};

Pair kept(const AttentionProblem& p, int64_t of_head) {
  return {head_of(p.key, p, p.capacity, of_head), head_of(p.value, p, p.capacity, of_head)};
}

// Those that this call works on.
Pair worked_on(const AttentionProblem& p, const Plan& plan, const Scratch& s, int64_t of_head) {
  if (s.key == nullptr) {
    return kept(p, of_head);
  }
  return {head_of(s.key, p, plan.ring, of_head), head_of(s.value, p, plan.ring, of_head)};
}

// Where a row's tokens of this call go. A first prompt begins at 0, padded or not; later tokens end at the row's last one.
int64_t first_slot(const AttentionProblem& p, int64_t row) {
  return p.tokens == p.total ? 0 : std::max<int64_t>(0, p.last[row] + 1 - p.tokens);
}

// The first position that a token sees: so many attended ones, its own included, lie from there on.
int64_t begin_of(const AttentionProblem& p, int64_t row, int64_t slot) {
  const int64_t* mask = p.mask + row * p.total;
  int64_t begin = std::min(slot, p.total - 1);
  for (int64_t left = p.window; begin > 0; --begin) {
    left -= mask[begin] != 0;
    if (left == 0) {
      break;
    }
  }
  return begin;
}

void number_tokens(const AttentionProblem& p, const Scratch& s, int64_t row) {
  const int64_t *mask = p.mask + row * p.total, first = first_slot(p, row);
  int64_t* numbers = s.numbers + row * (p.tokens + 1);
  numbers[0] = first - std::count(mask, mask + first, 0);
  for (int64_t token = 0; token < p.tokens; ++token) {
    numbers[token + 1] = numbers[token] + (mask[first + token] != 0);
  }
}

// Tokens first .. end-1 of a row from a ring to another.
void copy_ring(const HeadCache& from, int64_t from_size, const HeadCache& to, int64_t to_size, int64_t first,
               int64_t end) {
  for (int64_t number = first; number < end; ++number) {
    std::memcpy(to.row(number % to_size), from.row(number % from_size), cache_row_bytes(to.head_dim, to.is_int8));
  }
}

// What the call's first token sees, from the beginning of its step on: what lies before it there weighs nothing, but must
// be a number.
void lengthen(const AttentionProblem& p, const Plan& plan, const Scratch& s, int64_t of_head) {
  const int64_t held = s.numbers[of_head / p.kv_heads * (p.tokens + 1)];
  const int64_t first = std::max<int64_t>(0, held + 1 - p.window) / kStepKeys * kStepKeys;
  const Pair from = kept(p, of_head), to = worked_on(p, plan, s, of_head);
  copy_ring(from.key, p.capacity, to.key, plan.ring, first, held);
  copy_ring(from.value, p.capacity, to.value, plan.ring, first, held);
}

// The last of the call's tokens back into the cache.
void shorten(const AttentionProblem& p, const Plan& plan, const Scratch& s, int64_t of_head) {
  const int64_t* numbers = s.numbers + of_head / p.kv_heads * (p.tokens + 1);
  const int64_t end = numbers[p.tokens], first = std::max(numbers[0], end - p.capacity);
  const Pair from = worked_on(p, plan, s, of_head), to = kept(p, of_head);
  copy_ring(from.key, plan.ring, to.key, p.capacity, first, end);
  copy_ring(from.value, plan.ring, to.value, p.capacity, first, end);
}

// Where a token's key and value go, and which positions it sees.
struct Place {
  int64_t row;  // of a head's cache; -1: nowhere
  int64_t begin, end;
};

Place place_of(const AttentionProblem& p, const Plan& plan, const Scratch& s, int64_t row, int64_t token) {
  if (plan.ring == 0) {
    const int64_t slot = first_slot(p, row) + token;
    return {slot, p.window == 0 ? 0 : begin_of(p, row, slot), slot + 1};
  }
  const int64_t* number = s.numbers + row * (p.tokens + 1) + token;
  if (number[1] == number[0]) {
    return {-1, number[0], number[0]};  // padding
  }
  return {number[0] % plan.ring, std::max<int64_t>(0, number[1] - p.window), number[1]};
}

void prepare_token(const AttentionProblem& p, const AttentionKernels& kernels, const Plan& plan, const Scratch& s,
                   int64_t row, int64_t token) {
  const int64_t at = row * p.tokens + token, half = p.head_dim / 2, group = p.heads / p.kv_heads;
  const int64_t position = std::clamp<int64_t>(p.position_ids[at], 0, p.positions - 1);
  const float *cos = p.cos + position * half, *sin = p.sin + position * half;
  const Place place = place_of(p, plan, s, row, token);
  alignas(kAlignment) float turned[kMostHeadDim];
  for (int64_t head = 0; head < p.kv_heads && place.row >= 0; ++head) {
    const int64_t from = (at * p.kv_heads + head) * p.head_dim;
    normalize_and_turn(p.k + from, p.k_norm, p.eps, cos, sin, 1.0f, p.head_dim, turned);
    const Pair to = worked_on(p, plan, s, row * p.kv_heads + head);
    kernels.store(turned, to.key, place.row);
    kernels.store(p.v + from, to.value, place.row);
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(p.head_dim));
  for (int64_t head = 0; head < p.heads; ++head) {
    const int64_t query = ((row * p.kv_heads + head / group) * plan.queries + token * group + head % group);
    normalize_and_turn(p.q + (at * p.heads + head) * p.head_dim, p.q_norm, p.eps, cos, sin, scale, p.head_dim,
                       s.queries + query * p.head_dim);
    const int64_t own = row * plan.queries + token * group + head % group;
    s.ends[own] = place.end;
    if (s.begins != nullptr) {
      s.begins[own] = place.begin;
    }
  }
}

// What queries have seen of some pieces: out = sum / weight.
struct Seen {
  float* greatest;  // [count]
  float* weight;    // [count]
  float* sum;       // [count][head_dim]
};

Seen seen_of(const AttentionProblem& p, const Plan& plan, const Scratch& s, int64_t of_head, int64_t piece,
             int64_t query) {
  const int64_t at = (of_head * plan.pieces + piece) * plan.queries + query;
  return {s.greatest + at, s.weight + at, s.sum + at * p.head_dim};
}

void forget(const Seen& seen, int64_t count, int64_t head_dim) {
  std::fill_n(seen.greatest, count, -std::numeric_limits<float>::infinity());
  std::fill_n(seen.weight, count, 0.0f);
  std::fill_n(seen.sum, count * head_dim, 0.0f);
}

// The next piece to those before it.
void add_piece(const Seen& piece, int64_t count, int64_t head_dim, const Seen& to) {
  for (int64_t query = 0; query < count; ++query) {
    if (piece.weight[query] == 0.0f) {
      continue;  // nothing to see: greatest is minus infinity, or so far below that nothing is left
    }
    const float greatest = std::max(to.greatest[query], piece.greatest[query]);
    const float before = to.weight[query] == 0.0f ? 0.0f : std::exp(to.greatest[query] - greatest);
    const float now = std::exp(piece.greatest[query] - greatest);
    float* sum = to.sum + query * head_dim;
    const float* more = piece.sum + query * head_dim;
    for (int64_t i = 0; i < head_dim; ++i) {
      sum[i] = __builtin_fmaf(now, more[i], before * sum[i]);
    }
    to.weight[query] = __builtin_fmaf(now, piece.weight[query], before * to.weight[query]);
    to.greatest[query] = greatest;
  }
}

// Positions first .. end-1 of a head; of a ring as they lie, from one of its ends to the other.
void look_at(const AttentionKernels& kernels, const Plan& plan, Pair head, int64_t first, int64_t end,
             const QueryTile& tile, float* scratch) {
  while (first < end) {
    int64_t stop = end;
    if (plan.ring > 0) {
      head.key.origin = head.value.origin = first / plan.ring * plan.ring;
      stop = std::min(end, head.key.origin + plan.ring);
    }
    kernels.attend(head.key, head.value, first, stop, tile, scratch);
    first = stop;
  }
}

// Some pieces of the cache for one tile of queries, into the first of them.
void attend(const AttentionProblem& p, const AttentionKernels& kernels, const Plan& plan, const Scratch& s, int64_t row,
            int64_t head, int64_t tile, int64_t own_piece) {
  const int64_t first = tile * kTileQueries, count = std::min<int64_t>(kTileQueries, plan.queries - first);
  const int64_t of_head = row * p.kv_heads + head;
  const int64_t* ends = s.ends + row * plan.queries + first;
  const int64_t* begins = s.begins == nullptr ? nullptr : s.begins + row * plan.queries + first;
  const int64_t seen = std::min(*std::max_element(ends, ends + count), p.total);
  // What lies before the first query's window is left out.
  const int64_t least = begins == nullptr ? 0 : *std::min_element(begins, begins + count);
  const bool all = plan.pieces == 1;
  const int64_t from = all ? least / kPieceKeys : own_piece, end = all ? ceil_div(seen, kPieceKeys) : own_piece + 1;
  auto* scratch = static_cast<float*>(
      thread_scratch(Use::kAttention, times(attention_scratch_floats(p.head_dim), sizeof(float))));
  const Seen to = seen_of(p, plan, s, of_head, own_piece, first);
  forget(to, count, p.head_dim);
  alignas(kAlignment) float greatest[kTileQueries], weight[kTileQueries], sum[kTileQueries * kMostHeadDim];
  for (int64_t piece = from; piece < end; ++piece) {
    const Seen here = piece == from ? to : Seen{greatest, weight, sum};
    if (piece != from) {
      forget(here, count, p.head_dim);
    }
    const QueryTile queries = {s.queries + (of_head * plan.queries + first) * p.head_dim,
                               begins,
                               ends,
                               plan.ring > 0 ? nullptr : p.mask + row * p.total,
                               count,
                               here.greatest,
                               here.weight,
                               here.sum};
    const int64_t start = std::max(piece * kPieceKeys, least / kStepKeys * kStepKeys);
    const int64_t border = std::min(seen, (piece + 1) * kPieceKeys);
    look_at(kernels, plan, worked_on(p, plan, s, of_head), start, border, queries, scratch);
    if (piece != from) {
      add_piece(here, count, p.head_dim, to);
    }
  }
}

// The pieces of one query together.
void combine(const AttentionProblem& p, const Plan& plan, const Scratch& s, int64_t row, int64_t head, int64_t query) {
  const int64_t group = p.heads / p.kv_heads, of_head = row * p.kv_heads + head;
  const Seen all = seen_of(p, plan, s, of_head, 0, query);
  for (int64_t piece = 1; piece < plan.pieces; ++piece) {
    add_piece(seen_of(p, plan, s, of_head, piece, query), 1, p.head_dim, all);
  }
  const int64_t token = query / group, own = head * group + query % group;
  float* out = p.out + ((row * p.tokens + token) * p.heads + own) * p.head_dim;
  const float weight = *all.weight;
  const float inverse = weight > 0.0f ? 1.0f / weight : weight == 0.0f ? 0.0f : weight;  // NaN stays NaN
  for (int64_t i = 0; i < p.head_dim; ++i) {
    out[i] = all.sum[i] * inverse;
  }
}

}  // namespace

size_t attention_scratch_bytes(const AttentionProblem& problem, int workers) {
  Arena arena(nullptr);
  take(arena, problem, plan_of(problem, workers));
  return arena.used();
}

void run_attention(const AttentionProblem& p, const AttentionKernels& kernels, const ThreadPool& pool, void* scratch) {
  Arena arena(scratch);
  const Plan plan = plan_of(p, pool.workers);
  const Scratch s = take(arena, p, plan);
  const int64_t heads = p.batch * p.kv_heads;
  for (int64_t row = 0; row < p.batch && p.is_ring; ++row) {
    number_tokens(p, s, row);
  }
  if (s.key != nullptr) {
    share_out(pool, heads, [&](int64_t of_head) { lengthen(p, plan, s, of_head); });
  }
  share_out(pool, p.batch * p.tokens,
            [&](int64_t task) { prepare_token(p, kernels, plan, s, task / p.tokens, task % p.tokens); });
  share_out(pool, heads * plan.slots(), [&](int64_t task) {
    const int64_t of_head = task / plan.slots(), slot = task % plan.slots();
    attend(p, kernels, plan, s, of_head / p.kv_heads, of_head % p.kv_heads, slot / plan.pieces, slot % plan.pieces);
  });
  share_out(p.tokens > 1 ? pool : kNoPool, heads, [&](int64_t of_head) {
    for (int64_t query = 0; query < plan.queries; ++query) {
      combine(p, plan, s, of_head / p.kv_heads, of_head % p.kv_heads, query);
    }
    if (s.key != nullptr) {
      shorten(p, plan, s, of_head);
    }
  });
}

}  // namespace lfm2
