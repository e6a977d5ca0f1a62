// attention.h in lanes.h's words, compiled for every instruction set. 64 keys at a time are turned so that a lane is a key;
// all queries of the tile are scored with them, 4 queries and two registers of keys. Values are used as they lie: 4 queries
// by kWide registers of features.
//
// Keys in int8 are turned by words of 4 codes and multiplied as integers. A query is two int8 numbers then, 128 * high +
// low: 15 bits, whose rounding is a hundred times smaller than that of the keys.

#include <algorithm>

#include "attention_plain.h"
#include "lanes.h"
#include "target.h"

namespace lfm2 {
namespace {

constexpr int kVectors = kStepKeys / kLanes;
constexpr int kGroupQueries = 4;
constexpr bool kManyRegisters = kLanes != 8;       // 32 of them, not 16
constexpr int kWide = kManyRegisters ? 4 : 2;      // registers of values in flight
constexpr int kCodeVectors = kManyRegisters ? 2 : 1;  // of keys in int8, for which a query has two sums
constexpr int64_t kAheadRows = 24;  // of the cache, fetched early

LFM2_ALWAYS void fetch(const uint8_t* row, int64_t row_bytes) {
  for (int64_t line = 0; line < row_bytes; line += 64) {
    fetch_ahead(row, kAheadRows * row_bytes + line);
  }
}

// turned[feature][key] of `count` float keys; lanes without a key are 0.
void turn_keys(const HeadCache& key, int64_t first, int64_t count, float* turned) {
  const int64_t row_bytes = cache_row_bytes(key.head_dim, false);
  for (int vector = 0; vector < kVectors; ++vector) {
    const uint8_t* rows = key.row(first + vector * kLanes);
    const int64_t left = count - vector * kLanes;
    for (int64_t feature = 0; feature < key.head_dim; feature += kLanes) {
      Ints m[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        m[r] = r < left ? as_ints(load(reinterpret_cast<const float*>(rows + r * row_bytes) + feature)) : zero_ints();
      }
      transpose(m);
      for (int i = 0; i < kLanes; ++i) {
        store(turned + (feature + i) * kStepKeys + vector * kLanes, as_floats(m[i]));
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
void turn_codes(const HeadCache& key, int64_t first, int64_t count, Ints* words, float* scales) {
  const int64_t row_bytes = cache_row_bytes(key.head_dim, true);
  for (int vector = 0; vector < kVectors; ++vector) {
    const uint8_t* rows = key.row(first + vector * kLanes);
    const int64_t left = count - vector * kLanes;
    for (int64_t feature = 0; feature < key.head_dim; feature += kBytes) {
      const int64_t here = key.head_dim - feature < kBytes ? key.head_dim - feature : kBytes;
      Ints m[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        m[r] = r < left ? as_ints(load_bytes_first(rows + r * row_bytes + feature, here)) : zero_ints();
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
  int32_t offset[kTileQueries];  // what is left of the codes' zero, times 128 * sum of high + sum of low; negative
};

void round_queries(const QueryTile& tile, int64_t head_dim, IntegerQueries& to) {
  constexpr float kGreatest = 127 * 128;
  for (int64_t q = 0; q < tile.count; ++q) {
    const float* x = tile.queries + q * head_dim;
    int32_t bits = 0;
    for (int64_t i = 0; i < head_dim; ++i) {
      bits = std::max(bits, static_cast<int32_t>(float_to_bits(x[i]) & 0x7fffffffu));
    }
    const float most = bits_to_float(static_cast<uint32_t>(bits));
    const bool finite = most < INFINITY;  // false for NaN too
    const bool usable = finite && most > 1e-30f;
    const float inverse = usable ? kGreatest / most : 0.0f;
    int32_t sum = 0;
    for (int64_t i = 0; i < head_dim; ++i) {
      const auto whole = static_cast<int32_t>(round_to_even((usable ? x[i] : 0.0f) * inverse));
      const int32_t high = (whole + 64) >> 7;
      to.high[q][i] = static_cast<int8_t>(high);
      to.low[q][i] = static_cast<int8_t>(whole - high * 128);
      sum += whole;
    }
    to.scale[q] = !finite ? NAN : usable ? most / kGreatest : 0.0f;
    to.offset[q] = -kByteZero * sum;
  }
}

template <int kQueries>
void score_codes(const Ints* words, const float* scales, const IntegerQueries& queries, int64_t first, int64_t head_dim,
                 float* scores) {
  for (int vector = 0; vector < kVectors; vector += kCodeVectors) {
    Ints high[kQueries][kCodeVectors], low[kQueries][kCodeVectors];
    for (int q = 0; q < kQueries; ++q) {
      for (int i = 0; i < kCodeVectors; ++i) {
        high[q][i] = low[q][i] = zero_ints();
      }
    }
    for (int64_t word = 0; word < head_dim / 4; ++word) {
      ByteWeights codes[kCodeVectors];
      for (int i = 0; i < kCodeVectors; ++i) {
        codes[i] = byte_weights(as_bytes(words[word * kVectors + vector + i]));
      }
      for (int q = 0; q < kQueries; ++q) {
        const Bytes h = broadcast_word(queries.high[first + q] + word * 4);
        const Bytes l = broadcast_word(queries.low[first + q] + word * 4);
        for (int i = 0; i < kCodeVectors; ++i) {
          high[q][i] = add_byte_products(high[q][i], codes[i], h);
          low[q][i] = add_byte_products(low[q][i], codes[i], l);
        }
      }
    }
    for (int q = 0; q < kQueries; ++q) {
      for (int i = 0; i < kCodeVectors; ++i) {
        const int at = (vector + i) * kLanes;
        const Ints whole = add_ints(times_128(high[q][i]), low[q][i]);
        const Ints centred = add_ints(whole, broadcast_int(queries.offset[first + q]));
        const Floats scale = mul(load(scales + at), broadcast(queries.scale[first + q]));
        store(scores + q * kStepKeys + at, mul(to_floats(centred), scale));
      }
    }
  }
}

// Float values [count][head_dim] where they lie.
const float* values_of(const HeadCache& value, int64_t first, int64_t count) {
  const int64_t row_bytes = cache_row_bytes(value.head_dim, false);
  const uint8_t* rows = value.row(first);
  for (int64_t i = 0; i < count; ++i) {
    fetch(rows + i * row_bytes, row_bytes);
  }
  return reinterpret_cast<const float*>(rows);
}

// The codes of int8 values as floats [count][head_dim] in `room`, once for all queries of a tile.
const float* codes_of(const HeadCache& value, int64_t first, int64_t count, float* room) {
  const int64_t row_bytes = cache_row_bytes(value.head_dim, true);
  const uint8_t* rows = value.row(first);
  for (int64_t i = 0; i < count; ++i) {
    fetch(rows + i * row_bytes, row_bytes);
    for (int64_t feature = 0; feature < value.head_dim; feature += kLanes) {
      store(room + i * value.head_dim + feature, bytes_to_floats(rows + i * row_bytes + feature));
    }
  }
  return room;
}

// scores[query][key] of up to 4 queries; missing ones repeat the last.
template <int kQueries>
void score(const float* turned, const float* queries, int64_t head_dim, float* scores) {
  for (int vector = 0; vector < kVectors; vector += 2) {
    Floats total[kQueries][2];
    for (int q = 0; q < kQueries; ++q) {
      total[q][0] = total[q][1] = broadcast(0.0f);
    }
    const float* keys = turned + vector * kLanes;
    for (int64_t feature = 0; feature < head_dim; ++feature, keys += kStepKeys) {
      const Floats first = load(keys), second = load(keys + kLanes);
      for (int q = 0; q < kQueries; ++q) {
        const Floats x = broadcast(queries[q * head_dim + feature]);
        total[q][0] = fmadd(x, first, total[q][0]);
        total[q][1] = fmadd(x, second, total[q][1]);
      }
    }
    for (int q = 0; q < kQueries; ++q) {
      store(scores + q * kStepKeys + vector * kLanes, total[q][0]);
      store(scores + q * kStepKeys + (vector + 1) * kLanes, total[q][1]);
    }
  }
}

// Scores to weights, against the greatest so far. Returns false where the query sees none of the keys.
bool weigh(const QueryTile& tile, int64_t query, int64_t first, const Mask (&present)[kVectors], float* scores,
           float& shrink) {
  const Floats none = broadcast(-INFINITY);
  Floats greatest = none;
  Mask seen[kVectors];
  bool any = false;
  for (int vector = 0; vector < kVectors; ++vector) {
    const int64_t from = first + vector * kLanes;
    seen[vector] = both(present[vector], first_lanes(tile.ends[query] - from));
    if (tile.begin(query) > from) {
      seen[vector] = without(seen[vector], first_lanes(tile.begin(query) - from));
    }
    any = any || has_any(seen[vector]);
    greatest = max_or_second(greatest, select(seen[vector], load(scores + vector * kLanes), none));
  }
  if (!any) {
    return false;
  }
  const float before = tile.greatest[query], here = greatest_of(greatest);
  const float now = here > before ? here : before;
  shrink = now > before ? std::exp(before - now) : 1.0f;  // 0 at first
  Floats total = broadcast(0.0f);
  for (int vector = 0; vector < kVectors; ++vector) {
    float* at = scores + vector * kLanes;
    const Floats kept = keep(seen[vector], exp_lanes(sub(load(at), broadcast(now))));
    store(at, kept);
    total = add(total, kept);
  }
  tile.greatest[query] = now;
  tile.weight[query] = tile.weight[query] * shrink + sum_of(total);
  return true;
}

// sum[query][feature] = sum * shrink + weights x values, kWide registers of features from `values` on.
template <int kQueries, int kAcross>
void mix(const float* values, int64_t count, int64_t head_dim, const float* weights, const float* shrink, float* sum) {
  Floats total[kQueries][kAcross];
  for (int q = 0; q < kQueries; ++q) {
    for (int i = 0; i < kAcross; ++i) {
      total[q][i] = mul(load(sum + q * head_dim + i * kLanes), broadcast(shrink[q]));
    }
  }
  for (int64_t key = 0; key < count; ++key, values += head_dim) {
    Floats value[kAcross];
    for (int i = 0; i < kAcross; ++i) {
      value[i] = load(values + i * kLanes);
    }
    for (int q = 0; q < kQueries; ++q) {
      const Floats weight = broadcast(weights[q * kStepKeys + key]);
      for (int i = 0; i < kAcross; ++i) {
        total[q][i] = fmadd(weight, value[i], total[q][i]);
      }
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    for (int i = 0; i < kAcross; ++i) {
      store(sum + q * head_dim + i * kLanes, total[q][i]);
    }
  }
}

template <int kQueries>
void mix_all(const float* values, int64_t count, int64_t head_dim, const float* weights, const float* shrink,
             float* sum) {
  int64_t feature = 0;
  for (; feature + kWide * kLanes <= head_dim; feature += kWide * kLanes) {
    mix<kQueries, kWide>(values + feature, count, head_dim, weights, shrink, sum + feature);
  }
  for (; feature < head_dim; feature += kLanes) {
    mix<kQueries, 1>(values + feature, count, head_dim, weights, shrink, sum + feature);
  }
}

// Where codes of values lie, from some feature on: as bytes in the cache, or as floats that are ready.
struct ByteCodes {
  const uint8_t* at;
  int64_t stride;
  LFM2_ALWAYS Floats at_lane(int64_t key, int lane) const { return bytes_to_floats(at + key * stride + lane); }
  LFM2_ALWAYS ByteCodes from(int64_t feature) const { return {at + feature, stride}; }
};

struct FloatCodes {
  const float* at;
  int64_t stride;
  LFM2_ALWAYS Floats at_lane(int64_t key, int lane) const { return load(at + key * stride + lane); }
  LFM2_ALWAYS FloatCodes from(int64_t feature) const { return {at + feature, stride}; }
};

// The same with codes of an int8 cache; `weights` times their scales.
template <int kQueries, int kAcross, typename Source>
void mix_codes(const Source& codes, int64_t count, int64_t head_dim, const float* weights, const float* shrink,
               float* sum) {
  Floats total[kQueries][kAcross];
  float whole[kQueries] = {};
  for (int q = 0; q < kQueries; ++q) {
    for (int i = 0; i < kAcross; ++i) {
      total[q][i] = broadcast(0.0f);
    }
  }
  for (int64_t key = 0; key < count; ++key) {
    Floats value[kAcross];
    for (int i = 0; i < kAcross; ++i) {
      value[i] = codes.at_lane(key, i * kLanes);
    }
    for (int q = 0; q < kQueries; ++q) {
      const Floats weight = broadcast(weights[q * kStepKeys + key]);
      whole[q] += weights[q * kStepKeys + key];
      for (int i = 0; i < kAcross; ++i) {
        total[q][i] = fmadd(weight, value[i], total[q][i]);
      }
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    const Floats zero = broadcast(kCodeZero * whole[q]);
    for (int i = 0; i < kAcross; ++i) {
      float* to = sum + q * head_dim + i * kLanes;
      const Floats before = mul(load(to), broadcast(shrink[q]));
      store(to, add(before, sub(total[q][i], zero)));
    }
  }
}

template <int kQueries, typename Source>
void mix_all_codes(const Source& codes, int64_t count, int64_t head_dim, const float* weights, const float* shrink,
                   float* sum) {
  int64_t feature = 0;
  for (; feature + kWide * kLanes <= head_dim; feature += kWide * kLanes) {
    mix_codes<kQueries, kWide>(codes.from(feature), count, head_dim, weights, shrink, sum + feature);
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
  const uint8_t* rows = value.row(first);
  alignas(64) float scales[kStepKeys] = {};
  for (int64_t key = 0; key < count; ++key) {
    fetch(rows + key * row_bytes, row_bytes);
    scales[key] = scale_of(value, rows + key * row_bytes);
  }
  for (int q = 0; q < kQueries; ++q) {
    for (int vector = 0; vector < kVectors; ++vector) {
      float* at = weights + q * kStepKeys + vector * kLanes;
      store(at, mul(load(at), load(scales + vector * kLanes)));
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
  Mask present[kVectors];
  const float* turned;            // keys as floats; null: as codes
  const Ints* words;           // keys as codes
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
  alignas(64) int32_t there[kStepKeys] = {};
  for (int64_t key = 0; key < step.count; ++key) {
    there[key] = tile.has(step.first + key) ? -1 : 0;
  }
  for (int vector = 0; vector < kVectors; ++vector) {
    step.present[vector] = mask_of(there + vector * kLanes);
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
      step.words = reinterpret_cast<const Ints*>(turned);
      turn_codes(key, at, step.count, reinterpret_cast<Ints*>(turned), scales);
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

// store_row's int8, which compilers do not vectorize here for its greatest magnitude: as a whole number NaN and infinity are
// above all others.
#if defined(__ARM_NEON)
void store_lanes(const float* x, const HeadCache& to, int64_t position) {
  constexpr uint32_t kInfinity = 0x7f800000u;
  if (!to.is_int8) {
    return store_row(x, to, position);
  }
  uint8_t* row = to.row(position);
  Ints magnitudes = zero_ints();
  for (int64_t i = 0; i < to.head_dim; i += kLanes) {
    magnitudes = max_ints(magnitudes, magnitude_bits(load(x + i)));
  }
  const auto bits = static_cast<uint32_t>(greatest_of(magnitudes));
  const float greatest = bits_to_float(bits);
  const bool finite = bits < kInfinity, usable = finite && greatest > 1e-30f;
  const Floats inverse = broadcast(usable ? 127.0f / greatest : 0.0f);
  for (int64_t i = 0; i < to.head_dim; i += kBytes) {
    Ints codes[kLanes];
    for (int v = 0; v < kLanes; ++v) {
      codes[v] = usable ? to_nearest_ints(mul(load(x + i + v * kLanes), inverse)) : zero_ints();
    }
    vst1q_s8(reinterpret_cast<int8_t*>(row + i), as_codes(codes, -kCodeZero));
  }
  const float scale = !finite ? NAN : usable ? greatest / 127.0f : 0.0f;
  std::memcpy(row + to.head_dim, &scale, sizeof scale);
}
#else
constexpr auto store_lanes = store_row;
#endif

}  // namespace

namespace LFM2_TARGET {

const AttentionKernels kAttentionKernels = {attend, store_lanes};

}  // namespace LFM2_TARGET
}  // namespace lfm2
