// attention.h with AVX-512. 64 keys at a time are turned so that a lane is a key; all queries of the tile are scored with
// them, 4 queries and 32 keys in registers. Values are used as they lie: 4 queries by 64 features in registers.

#include "attention_plain.h"
#include "lanes_avx512.h"

namespace lfm2 {
namespace {

constexpr int kVectors = kStepKeys / kLanes;
constexpr int kGroupQueries = 4;
constexpr int64_t kAheadRows = 24;  // of the cache, fetched early

LFM2_ALWAYS __m512 load_features(const HeadCache& cache, const uint8_t* row, int64_t first) {
  if (!cache.is_int8) {
    return _mm512_loadu_ps(reinterpret_cast<const float*>(row) + first);
  }
  float scale;
  std::memcpy(&scale, row + cache.head_dim, sizeof scale);
  const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + first)));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(codes, _mm512_set1_epi32(kCodeZero))),
                       _mm512_set1_ps(scale));
}

LFM2_ALWAYS void fetch(const uint8_t* row, int64_t row_bytes) {
  const auto ahead = reinterpret_cast<uintptr_t>(row) + kAheadRows * row_bytes;  // may lie behind the end: harmless
  for (int64_t line = 0; line < row_bytes; line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(ahead + line), _MM_HINT_T0);
  }
}

// turned[feature][key] of `count` keys; lanes without a key are 0.
void turn_keys(const HeadCache& key, int64_t first, int64_t count, float* turned) {
  const int64_t row_bytes = cache_row_bytes(key.head_dim, key.is_int8);
  for (int vector = 0; vector < kVectors; ++vector) {
    const uint8_t* rows = key.data + (first + vector * kLanes) * row_bytes;
    const int64_t left = count - vector * kLanes;
    for (int64_t feature = 0; feature < key.head_dim; feature += kLanes) {
      __m512i m[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        m[r] = r < left ? _mm512_castps_si512(load_features(key, rows + r * row_bytes, feature))
                        : _mm512_setzero_si512();
      }
      transpose(m);
      for (int i = 0; i < kLanes; ++i) {
        _mm512_store_si512(turned + (feature + i) * kStepKeys + vector * kLanes, m[i]);
      }
    }
    for (int r = 0; r < kLanes && r < left; ++r) {
      fetch(rows + r * row_bytes, row_bytes);
    }
  }
}

// Values as floats [count][head_dim]: in place, or in `room`.
const float* values_of(const HeadCache& value, int64_t first, int64_t count, float* room) {
  const int64_t row_bytes = cache_row_bytes(value.head_dim, value.is_int8);
  const uint8_t* rows = value.data + first * row_bytes;
  for (int64_t i = 0; i < count; ++i) {
    fetch(rows + i * row_bytes, row_bytes);
    for (int64_t feature = 0; value.is_int8 && feature < value.head_dim; feature += kLanes) {
      _mm512_store_ps(room + i * value.head_dim + feature, load_features(value, rows + i * row_bytes, feature));
    }
  }
  return value.is_int8 ? room : reinterpret_cast<const float*>(rows);
}

// scores[query][key] of up to 4 queries; missing ones repeat the last.
template <int kQueries>
void score(const float* turned, const float* queries, int64_t head_dim, float* scores) {
  for (int vector = 0; vector < kVectors; vector += 2) {
    __m512 total[kQueries][2] = {};
    const float* keys = turned + vector * kLanes;
    for (int64_t feature = 0; feature < head_dim; ++feature, keys += kStepKeys) {
      const __m512 first = _mm512_load_ps(keys), second = _mm512_load_ps(keys + kLanes);
      for (int q = 0; q < kQueries; ++q) {
        const __m512 x = _mm512_set1_ps(queries[q * head_dim + feature]);
        total[q][0] = _mm512_fmadd_ps(x, first, total[q][0]);
        total[q][1] = _mm512_fmadd_ps(x, second, total[q][1]);
      }
    }
    for (int q = 0; q < kQueries; ++q) {
      _mm512_store_ps(scores + q * kStepKeys + vector * kLanes, total[q][0]);
      _mm512_store_ps(scores + q * kStepKeys + (vector + 1) * kLanes, total[q][1]);
    }
  }
}

// Scores to weights, against the greatest so far. Returns false where the query sees none of the keys.
bool weigh(const QueryTile& tile, int64_t query, int64_t first, const __mmask16 (&present)[kVectors], float* scores,
           float& shrink) {
  const __m512 none = _mm512_set1_ps(-INFINITY);
  const __m512i order = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512 greatest = none;
  __mmask16 seen[kVectors];
  int any = 0;
  for (int vector = 0; vector < kVectors; ++vector) {
    const int64_t left = tile.ends[query] - first - vector * kLanes;
    const int32_t limit = static_cast<int32_t>(left > kLanes ? kLanes : left);
    seen[vector] = present[vector] & _mm512_cmplt_epi32_mask(order, _mm512_set1_epi32(limit));
    any |= seen[vector];
    greatest = _mm512_mask_max_ps(greatest, seen[vector], greatest, _mm512_load_ps(scores + vector * kLanes));
  }
  if (any == 0) {
    return false;
  }
  const float before = tile.greatest[query], here = _mm512_reduce_max_ps(greatest);
  const float now = here > before ? here : before;
  shrink = now > before ? std::exp(before - now) : 1.0f;  // 0 at first
  __m512 total = _mm512_setzero_ps();
  for (int vector = 0; vector < kVectors; ++vector) {
    float* at = scores + vector * kLanes;
    const __m512 weight = exp_lanes(_mm512_sub_ps(_mm512_load_ps(at), _mm512_set1_ps(now)));
    const __m512 kept = _mm512_maskz_mov_ps(seen[vector], weight);
    _mm512_store_ps(at, kept);
    total = _mm512_add_ps(total, kept);
  }
  tile.greatest[query] = now;
  tile.weight[query] = tile.weight[query] * shrink + _mm512_reduce_add_ps(total);
  return true;
}

// sum[query][feature] = sum * shrink + weights x values, 16 * kWide features from `values` on.
template <int kQueries, int kWide>
void mix(const float* values, int64_t count, int64_t head_dim, const float* weights, const float* shrink, float* sum) {
  __m512 total[kQueries][kWide];
  for (int q = 0; q < kQueries; ++q) {
    for (int i = 0; i < kWide; ++i) {
      total[q][i] = _mm512_mul_ps(_mm512_loadu_ps(sum + q * head_dim + i * kLanes), _mm512_set1_ps(shrink[q]));
    }
  }
  for (int64_t key = 0; key < count; ++key, values += head_dim) {
    __m512 value[kWide];
    for (int i = 0; i < kWide; ++i) {
      value[i] = _mm512_loadu_ps(values + i * kLanes);
    }
    for (int q = 0; q < kQueries; ++q) {
      const __m512 weight = _mm512_set1_ps(weights[q * kStepKeys + key]);
      for (int i = 0; i < kWide; ++i) {
        total[q][i] = _mm512_fmadd_ps(weight, value[i], total[q][i]);
      }
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    for (int i = 0; i < kWide; ++i) {
      _mm512_storeu_ps(sum + q * head_dim + i * kLanes, total[q][i]);
    }
  }
}

template <int kQueries>
void mix_all(const float* values, int64_t count, int64_t head_dim, const float* weights, const float* shrink,
             float* sum) {
  int64_t feature = 0;
  for (; feature + 4 * kLanes <= head_dim; feature += 4 * kLanes) {
    mix<kQueries, 4>(values + feature, count, head_dim, weights, shrink, sum + feature);
  }
  for (; feature < head_dim; feature += kLanes) {
    mix<kQueries, 1>(values + feature, count, head_dim, weights, shrink, sum + feature);
  }
}

template <int kQueries>
void attend_group(const float* turned, const float* values, int64_t first, int64_t count, const QueryTile& tile,
                  int64_t query, int64_t head_dim, const __mmask16 (&present)[kVectors], float* scores) {
  score<kQueries>(turned, tile.queries + query * head_dim, head_dim, scores);
  float shrink[kQueries];
  bool any = false;
  for (int q = 0; q < kQueries; ++q) {
    float* own = scores + q * kStepKeys;
    if (weigh(tile, query + q, first, present, own, shrink[q])) {
      any = true;
    } else {
      std::memset(own, 0, kStepKeys * sizeof(float));
      shrink[q] = 1.0f;
    }
  }
  if (any) {
    mix_all<kQueries>(values, count, head_dim, scores, shrink, tile.sum + query * head_dim);
  }
}

void attend(const HeadCache& key, const HeadCache& value, int64_t first, int64_t end, const QueryTile& tile,
            float* scratch) {
  const int64_t head_dim = key.head_dim;
  float *turned = scratch, *room = turned + kStepKeys * head_dim, *scores = room + kStepKeys * head_dim;
  for (int64_t at = first; at < end; at += kStepKeys) {
    const int64_t count = end - at < kStepKeys ? end - at : kStepKeys;
    __mmask16 present[kVectors];
    for (int vector = 0; vector < kVectors; ++vector) {
      present[vector] = 0;
      for (int lane = 0; lane < kLanes && vector * kLanes + lane < count; ++lane) {
        present[vector] |= static_cast<__mmask16>((tile.mask[at + vector * kLanes + lane] != 0) << lane);
      }
    }
    turn_keys(key, at, count, turned);
    const float* values = values_of(value, at, count, room);
    for (int64_t query = 0; query < tile.count; query += kGroupQueries) {
      switch (tile.count - query) {
        case 1: attend_group<1>(turned, values, at, count, tile, query, head_dim, present, scores); break;
        case 2: attend_group<2>(turned, values, at, count, tile, query, head_dim, present, scores); break;
        case 3: attend_group<3>(turned, values, at, count, tile, query, head_dim, present, scores); break;
        default: attend_group<4>(turned, values, at, count, tile, query, head_dim, present, scores);
      }
    }
  }
}

}  // namespace

const AttentionKernels kAvx512AttentionKernels = {attend, store_row};

}  // namespace lfm2
