// attention.h with AVX-512. 64 keys at a time are turned so that a lane is a key; all queries of the tile are scored with
// them, 4 queries and 32 keys in registers. Values are used as they lie: 4 queries by 64 features in registers.
//
// Keys in int8 are turned by words of 4 codes and multiplied as integers. A query is two int8 numbers then, 128 * high +
// low: 15 bits, whose rounding is a hundred times smaller than that of the keys.

#include "attention_plain.h"
#include "lanes_avx512.h"

namespace lfm2 {
namespace {

constexpr int kVectors = kStepKeys / kLanes;
constexpr int kGroupQueries = 4;
constexpr int64_t kAheadRows = 24;  // of the cache, fetched early

// 16 codes as floats.
LFM2_ALWAYS __m512 load_codes(const uint8_t* at) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
}

LFM2_ALWAYS void fetch(const uint8_t* row, int64_t row_bytes) {
  const auto ahead = reinterpret_cast<uintptr_t>(row) + kAheadRows * row_bytes;  // may lie behind the end: harmless
  for (int64_t line = 0; line < row_bytes; line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(ahead + line), _MM_HINT_T0);
  }
}

// turned[feature][key] of `count` float keys; lanes without a key are 0.
void turn_keys(const HeadCache& key, int64_t first, int64_t count, float* turned) {
  const int64_t row_bytes = cache_row_bytes(key.head_dim, false);
  for (int vector = 0; vector < kVectors; ++vector) {
    const uint8_t* rows = key.data + (first + vector * kLanes) * row_bytes;
    const int64_t left = count - vector * kLanes;
    for (int64_t feature = 0; feature < key.head_dim; feature += kLanes) {
      __m512i m[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        m[r] = r < left ? _mm512_loadu_si512(reinterpret_cast<const float*>(rows + r * row_bytes) + feature)
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

LFM2_ALWAYS float scale_of(const HeadCache& cache, const uint8_t* row) {
  float scale;
  std::memcpy(&scale, row + cache.head_dim, sizeof scale);
  return scale;
}

// The same of int8 keys: words[word][key], a word being the codes of 4 features; and their scales.
void turn_codes(const HeadCache& key, int64_t first, int64_t count, __m512i* words, float* scales) {
  const int64_t row_bytes = cache_row_bytes(key.head_dim, true);
  for (int vector = 0; vector < kVectors; ++vector) {
    const uint8_t* rows = key.data + (first + vector * kLanes) * row_bytes;
    const int64_t left = count - vector * kLanes;
    for (int64_t feature = 0; feature < key.head_dim; feature += 64) {
      const int64_t here = key.head_dim - feature < 64 ? key.head_dim - feature : 64;
      const __mmask64 mask = here == 64 ? ~__mmask64{0} : (__mmask64{1} << here) - 1;
      __m512i m[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        m[r] = r < left ? _mm512_maskz_loadu_epi8(mask, rows + r * row_bytes + feature) : _mm512_setzero_si512();
      }
      transpose(m);
      for (int i = 0; i < here / 4; ++i) {
        words[(feature / 4 + i) * kVectors + vector] = m[i];
      }
    }
    for (int r = 0; r < kLanes; ++r) {
      scales[vector * kLanes + r] = r < left ? scale_of(key, rows + r * row_bytes) : 0.0f;
      if (r < left) {
        fetch(rows + r * row_bytes, row_bytes);
      }
    }
  }
}

// A tile's queries as integers: query = (128 * high + low) * scale.
struct IntegerQueries {
  alignas(64) int8_t high[kTileQueries][kMostHeadDim];
  alignas(64) int8_t low[kTileQueries][kMostHeadDim];
  float scale[kTileQueries];
  int32_t offset[kTileQueries];  // -128 * (128 * sum of high + sum of low): the codes' zero
};

void round_queries(const QueryTile& tile, int64_t head_dim, IntegerQueries& to) {
  constexpr float kGreatest = 127 * 128;
  for (int64_t q = 0; q < tile.count; ++q) {
    const float* x = tile.queries + q * head_dim;
    __m512 greatest = _mm512_setzero_ps();
    __mmask16 odd = 0;
    for (int64_t i = 0; i < head_dim; i += kLanes) {
      const __m512 lanes = _mm512_loadu_ps(x + i);
      odd |= _mm512_fpclass_ps_mask(lanes, 0x99);  // NaN, infinity
      greatest = _mm512_max_ps(greatest, _mm512_abs_ps(lanes));
    }
    const float most = _mm512_reduce_max_ps(greatest);
    const bool usable = odd == 0 && most > 1e-30f;
    const __m512 inverse = _mm512_set1_ps(usable ? kGreatest / most : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < head_dim; i += kLanes) {
      const __m512 scaled = usable ? _mm512_mul_ps(_mm512_loadu_ps(x + i), inverse) : _mm512_setzero_ps();
      const __m512i whole = _mm512_cvtps_epi32(scaled);
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(64)), 7);
      const __m512i low = _mm512_sub_epi32(whole, _mm512_slli_epi32(high, 7));
      _mm_store_si128(reinterpret_cast<__m128i*>(to.high[q] + i), _mm512_cvtepi32_epi8(high));
      _mm_store_si128(reinterpret_cast<__m128i*>(to.low[q] + i), _mm512_cvtepi32_epi8(low));
      sum = _mm512_add_epi32(sum, whole);
    }
    to.scale[q] = odd != 0 ? NAN : usable ? most / kGreatest : 0.0f;
    to.offset[q] = -kCodeZero * _mm512_reduce_add_epi32(sum);
  }
}

LFM2_ALWAYS __m512i four_codes(const int8_t* x) {
  int32_t bits;
  std::memcpy(&bits, x, sizeof bits);
  return _mm512_set1_epi32(bits);
}

template <int kQueries>
void score_codes(const __m512i* words, const float* scales, const IntegerQueries& queries, int64_t first,
                 int64_t head_dim, float* scores) {
  for (int vector = 0; vector < kVectors; vector += 2) {
    __m512i high[kQueries][2] = {}, low[kQueries][2] = {};
    for (int64_t word = 0; word < head_dim / 4; ++word) {
      const __m512i a = words[word * kVectors + vector], b = words[word * kVectors + vector + 1];
      for (int q = 0; q < kQueries; ++q) {
        const __m512i h = four_codes(queries.high[first + q] + word * 4);
        const __m512i l = four_codes(queries.low[first + q] + word * 4);
        high[q][0] = _mm512_dpbusd_epi32(high[q][0], a, h);
        high[q][1] = _mm512_dpbusd_epi32(high[q][1], b, h);
        low[q][0] = _mm512_dpbusd_epi32(low[q][0], a, l);
        low[q][1] = _mm512_dpbusd_epi32(low[q][1], b, l);
      }
    }
    for (int q = 0; q < kQueries; ++q) {
      for (int i = 0; i < 2; ++i) {
        const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(high[q][i], 7), low[q][i]);
        const __m512i centred = _mm512_add_epi32(whole, _mm512_set1_epi32(queries.offset[first + q]));
        const __m512 scale = _mm512_mul_ps(_mm512_load_ps(scales + (vector + i) * kLanes),
                                           _mm512_set1_ps(queries.scale[first + q]));
        _mm512_store_ps(scores + q * kStepKeys + (vector + i) * kLanes,
                        _mm512_mul_ps(_mm512_cvtepi32_ps(centred), scale));
      }
    }
  }
}

// Float values [count][head_dim] where they lie.
const float* values_of(const HeadCache& value, int64_t first, int64_t count) {
  const int64_t row_bytes = cache_row_bytes(value.head_dim, false);
  const uint8_t* rows = value.data + first * row_bytes;
  for (int64_t i = 0; i < count; ++i) {
    fetch(rows + i * row_bytes, row_bytes);
  }
  return reinterpret_cast<const float*>(rows);
}

// The codes of int8 values as floats [count][head_dim] in `room`, once for all queries of a tile.
const float* codes_of(const HeadCache& value, int64_t first, int64_t count, float* room) {
  const int64_t row_bytes = cache_row_bytes(value.head_dim, true);
  const uint8_t* rows = value.data + first * row_bytes;
  for (int64_t i = 0; i < count; ++i) {
    fetch(rows + i * row_bytes, row_bytes);
    for (int64_t feature = 0; feature < value.head_dim; feature += kLanes) {
      _mm512_store_ps(room + i * value.head_dim + feature, load_codes(rows + i * row_bytes + feature));
    }
  }
  return room;
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
  const int64_t begin = tile.begin(query);
  int any = 0;
  for (int vector = 0; vector < kVectors; ++vector) {
    const int64_t left = tile.ends[query] - first - vector * kLanes;
    const int32_t limit = static_cast<int32_t>(left > kLanes ? kLanes : left);
    seen[vector] = present[vector] & _mm512_cmplt_epi32_mask(order, _mm512_set1_epi32(limit));
    const int64_t hidden = begin - first - vector * kLanes;
    if (hidden > 0) {
      const int32_t least = static_cast<int32_t>(hidden > kLanes ? kLanes : hidden);
      seen[vector] &= _mm512_cmpge_epi32_mask(order, _mm512_set1_epi32(least));
    }
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

// Where codes of values lie, from some feature on: as bytes in the cache, or as floats that are ready.
struct ByteCodes {
  const uint8_t* at;
  int64_t stride;
  LFM2_ALWAYS __m512 load(int64_t key, int lane) const { return load_codes(at + key * stride + lane); }
  LFM2_ALWAYS ByteCodes from(int64_t feature) const { return {at + feature, stride}; }
};

struct FloatCodes {
  const float* at;
  int64_t stride;
  LFM2_ALWAYS __m512 load(int64_t key, int lane) const { return _mm512_load_ps(at + key * stride + lane); }
  LFM2_ALWAYS FloatCodes from(int64_t feature) const { return {at + feature, stride}; }
};

// The same with codes of an int8 cache; `weights` times their scales.
template <int kQueries, int kWide, typename Source>
void mix_codes(const Source& codes, int64_t count, int64_t head_dim, const float* weights, const float* shrink,
               float* sum) {
  __m512 total[kQueries][kWide];
  float whole[kQueries] = {};
  for (int q = 0; q < kQueries; ++q) {
    for (int i = 0; i < kWide; ++i) {
      total[q][i] = _mm512_setzero_ps();
    }
  }
  for (int64_t key = 0; key < count; ++key) {
    __m512 value[kWide];
    for (int i = 0; i < kWide; ++i) {
      value[i] = codes.load(key, i * kLanes);
    }
    for (int q = 0; q < kQueries; ++q) {
      const __m512 weight = _mm512_set1_ps(weights[q * kStepKeys + key]);
      whole[q] += weights[q * kStepKeys + key];
      for (int i = 0; i < kWide; ++i) {
        total[q][i] = _mm512_fmadd_ps(weight, value[i], total[q][i]);
      }
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    const __m512 zero = _mm512_set1_ps(kCodeZero * whole[q]);
    for (int i = 0; i < kWide; ++i) {
      float* to = sum + q * head_dim + i * kLanes;
      const __m512 before = _mm512_mul_ps(_mm512_loadu_ps(to), _mm512_set1_ps(shrink[q]));
      _mm512_storeu_ps(to, _mm512_add_ps(before, _mm512_sub_ps(total[q][i], zero)));
    }
  }
}

template <int kQueries, typename Source>
void mix_all_codes(const Source& codes, int64_t count, int64_t head_dim, const float* weights, const float* shrink,
                   float* sum) {
  int64_t feature = 0;
  for (; feature + 4 * kLanes <= head_dim; feature += 4 * kLanes) {
    mix_codes<kQueries, 4>(codes.from(feature), count, head_dim, weights, shrink, sum + feature);
  }
  for (; feature < head_dim; feature += kLanes) {
    mix_codes<kQueries, 1>(codes.from(feature), count, head_dim, weights, shrink, sum + feature);
  }
}

// Values of an int8 cache: taken apart already (`ready`), or as they lie, for so few queries that it does not pay.
template <int kQueries>
void mix_int8(const HeadCache& value, const float* ready, int64_t first, int64_t count, float* weights,
              const float* shrink, float* sum) {
  const int64_t row_bytes = cache_row_bytes(value.head_dim, true);
  const uint8_t* rows = value.data + first * row_bytes;
  alignas(64) float scales[kStepKeys] = {};
  for (int64_t key = 0; key < count; ++key) {
    fetch(rows + key * row_bytes, row_bytes);
    scales[key] = scale_of(value, rows + key * row_bytes);
  }
  for (int q = 0; q < kQueries; ++q) {
    for (int vector = 0; vector < kVectors; ++vector) {
      float* at = weights + q * kStepKeys + vector * kLanes;
      _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), _mm512_load_ps(scales + vector * kLanes)));
    }
  }
  if (ready != nullptr) {
    mix_all_codes<kQueries>(FloatCodes{ready, value.head_dim}, count, value.head_dim, weights, shrink, sum);
  } else {
    mix_all_codes<kQueries>(ByteCodes{rows, row_bytes}, count, value.head_dim, weights, shrink, sum);
  }
}

// One step: 64 keys and values at most, as they were made ready for all queries of the tile.
struct Step {
  const HeadCache& value;
  int64_t first, count;
  __mmask16 present[kVectors];
  const float* turned;            // keys as floats; null: as codes
  const __m512i* words;           // keys as codes
  const float* scales;            // of those
  const float* values;            // as floats, of an int8 cache the codes; null: as they lie there
  const IntegerQueries* queries;  // for keys as codes
  float* scores;
};

template <int kQueries>
void attend_group(const Step& step, const QueryTile& tile, int64_t query) {
  const int64_t head_dim = step.value.head_dim;
  float* scores = step.scores;
  if (step.turned != nullptr) {
    score<kQueries>(step.turned, tile.queries + query * head_dim, head_dim, scores);
  } else {
    score_codes<kQueries>(step.words, step.scales, *step.queries, query, head_dim, scores);
  }
  float shrink[kQueries];
  bool any = false;
  for (int q = 0; q < kQueries; ++q) {
    float* own = scores + q * kStepKeys;
    if (weigh(tile, query + q, step.first, step.present, own, shrink[q])) {
      any = true;
    } else {
      std::memset(own, 0, kStepKeys * sizeof(float));
      shrink[q] = 1.0f;
    }
  }
  float* sum = tile.sum + query * head_dim;
  if (any && step.value.is_int8) {
    mix_int8<kQueries>(step.value, step.values, step.first, step.count, scores, shrink, sum);
  } else if (any) {
    mix_all<kQueries>(step.values, step.count, head_dim, scores, shrink, sum);
  }
}

void attend_step(const Step& step, const QueryTile& tile) {
  for (int64_t query = 0; query < tile.count; query += kGroupQueries) {
    switch (tile.count - query) {
      case 1: attend_group<1>(step, tile, query); break;
      case 2: attend_group<2>(step, tile, query); break;
      case 3: attend_group<3>(step, tile, query); break;
      default: attend_group<4>(step, tile, query);
    }
  }
}

void find_present(const QueryTile& tile, Step& step) {
  for (int vector = 0; vector < kVectors; ++vector) {
    step.present[vector] = 0;
    for (int lane = 0; lane < kLanes && vector * kLanes + lane < step.count; ++lane) {
      const bool is_there = tile.mask[step.first + vector * kLanes + lane] != 0;
      step.present[vector] |= static_cast<__mmask16>(is_there << lane);
    }
  }
}

void attend(const HeadCache& key, const HeadCache& value, int64_t first, int64_t end, const QueryTile& tile,
            float* scratch) {
  const int64_t head_dim = key.head_dim;
  float *turned = scratch, *room = turned + kStepKeys * head_dim, *scores = room + kStepKeys * head_dim;
  alignas(64) float scales[kStepKeys];
  IntegerQueries queries;
  if (key.is_int8) {
    round_queries(tile, head_dim, queries);
  }
  for (int64_t at = first; at < end; at += kStepKeys) {
    Step step = {value, at, end - at < kStepKeys ? end - at : kStepKeys, {}, nullptr, nullptr, scales, nullptr,
                 &queries, scores};
    find_present(tile, step);
    if (key.is_int8) {
      step.words = reinterpret_cast<const __m512i*>(turned);
      turn_codes(key, at, step.count, reinterpret_cast<__m512i*>(turned), scales);
    } else {
      step.turned = turned;
      turn_keys(key, at, step.count, turned);
    }
    if (!value.is_int8) {
      step.values = values_of(value, at, step.count);
    } else if (tile.count > kGroupQueries) {
      step.values = codes_of(value, at, step.count, room);
    }
    attend_step(step, tile);
  }
}

}  // namespace

const AttentionKernels kAvx512AttentionKernels = {attend, store_row};

}  // namespace lfm2
