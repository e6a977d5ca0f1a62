// AVX2, compiled twice: plain (vpmaddubsw) and with AVX-VNNI (vpdpbusd on 256 bits). 8 rows a register; a stripe of 8
// rows by 32 inputs unpacks into 8 registers, which stay there while the tokens pass by.

#include <immintrin.h>

#include "elementwise.h"
#include "target.h"

namespace lfm2 {
namespace {

constexpr int kLanes = 8;
constexpr int kStripes = kTileRows / kLanes;
constexpr int64_t kPrefetchBytes = 8 * kTileBytes;

struct Stripe {
  __m256i low[kQuads];   // inputs 4*quad ..
  __m256i high[kQuads];  // inputs 16 + 4*quad ..
  __m256 scales;
};

inline __attribute__((always_inline)) Stripe unpack(const uint8_t* tile, int stripe) {
  Stripe s;
  const __m256i nibble = _mm256_set1_epi8(15);
  s.scales = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tile) + stripe));
  const auto* codes = reinterpret_cast<const __m256i*>(tile + kCodesOffset) + stripe;
  for (int quad = 0; quad < kQuads; ++quad) {
    const __m256i pairs = _mm256_loadu_si256(codes + quad * kStripes);
    s.low[quad] = _mm256_and_si256(pairs, nibble);
    s.high[quad] = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), nibble);
  }
  return s;
}

inline __attribute__((always_inline)) __m256i four_inputs(const int8_t* x) {
  int32_t bits;
  std::memcpy(&bits, x, sizeof bits);
  return _mm256_set1_epi32(bits);
}

#ifdef __AVXVNNI__

inline __attribute__((always_inline)) __m256i dot(const Stripe& s, const int8_t* codes, int32_t offset) {
  __m256i low = _mm256_set1_epi32(offset);
  __m256i high = _mm256_setzero_si256();
  for (int quad = 0; quad < kQuads; ++quad) {
    low = _mm256_dpbusd_avx_epi32(low, s.low[quad], four_inputs(codes + 4 * quad));
    high = _mm256_dpbusd_avx_epi32(high, s.high[quad], four_inputs(codes + 16 + 4 * quad));
  }
  return _mm256_add_epi32(low, high);
}

#else

// A product is at most 15 * 127 and vpmaddubsw adds two: eight of those sums are at most 30480, so 16 bits hold them.
inline __attribute__((always_inline)) __m256i dot(const Stripe& s, const int8_t* codes, int32_t offset) {
  __m256i low = _mm256_maddubs_epi16(s.low[0], four_inputs(codes));
  __m256i high = _mm256_maddubs_epi16(s.high[0], four_inputs(codes + 16));
  for (int quad = 1; quad < kQuads; ++quad) {
    low = _mm256_add_epi16(low, _mm256_maddubs_epi16(s.low[quad], four_inputs(codes + 4 * quad)));
    high = _mm256_add_epi16(high, _mm256_maddubs_epi16(s.high[quad], four_inputs(codes + 16 + 4 * quad)));
  }
  const __m256i sums = _mm256_madd_epi16(_mm256_add_epi16(low, high), _mm256_set1_epi16(1));
  return _mm256_add_epi32(sums, _mm256_set1_epi32(offset));
}

#endif

inline void prefetch(const uint8_t* tile) {
  const auto ahead = reinterpret_cast<uintptr_t>(tile) + kPrefetchBytes;  // may lie behind the tensor's end: harmless
  for (int line = 0; line < kTileBytes; line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(ahead + line), _MM_HINT_T0);
  }
}

inline __attribute__((always_inline)) __m256 add_group(const Stripe& s, const Activations& x, int64_t at,
                                                       __m256 total) {
  const __m256i sum = dot(s, x.codes + at * kGroup, x.offsets[at]);
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(s.scales, _mm256_set1_ps(x.scales[at])), total);
}

void rows_of_one(const uint8_t* tiles, int64_t groups, const Activations& x, float* y) {
  __m256 total[kStripes] = {};
  for (int64_t group = 0; group < groups; ++group, tiles += kTileBytes) {
    prefetch(tiles);
    for (int stripe = 0; stripe < kStripes; ++stripe) {
      total[stripe] = add_group(unpack(tiles, stripe), x, group, total[stripe]);
    }
  }
  for (int stripe = 0; stripe < kStripes; ++stripe) {
    _mm256_storeu_ps(y + stripe * kLanes, total[stripe]);
  }
}

void rows(const uint8_t* tiles, int64_t groups, const Activations& x, float* y) {
  if (x.tokens == 1) {
    return rows_of_one(tiles, groups, x, y);
  }
  std::memset(y, 0, x.tokens * kTileRows * sizeof(float));
  for (int64_t group = 0; group < groups; ++group, tiles += kTileBytes) {
    prefetch(tiles);
    for (int stripe = 0; stripe < kStripes; ++stripe) {
      const Stripe s = unpack(tiles, stripe);
      for (int64_t token = 0; token < x.tokens; ++token) {
        float* to = y + token * kTileRows + stripe * kLanes;
        _mm256_storeu_ps(to, add_group(s, x, group * x.tokens + token, _mm256_loadu_ps(to)));
      }
    }
  }
}

}  // namespace

namespace LFM2_TARGET {

const Kernels kKernels = {LFM2_TARGET_NAME, quantize_group, rows, swiglu_groups, accumulate_rows};

}  // namespace LFM2_TARGET
}  // namespace lfm2
