// AVX-512 with VNNI: 16 rows a register. A tile's 32 rows by 32 inputs unpack into 16 registers, which stay there while
// the tokens pass by.

#include <immintrin.h>

#include "elementwise.h"
#include "target.h"

namespace lfm2 {
namespace {

constexpr int kHalves = kTileRows / 16;
constexpr int64_t kPrefetchBytes = 12 * kTileBytes;  // far enough to cover DRAM latency, across page boundaries too

struct Tile {
  __m512i low[kQuads][kHalves];   // inputs 4*quad ..
  __m512i high[kQuads][kHalves];  // inputs 16 + 4*quad ..
  __m512 scales[kHalves];
};

inline __attribute__((always_inline)) Tile unpack(const uint8_t* tile) {
  Tile t;
  const __m512i nibble = _mm512_set1_epi8(15);
  for (int half = 0; half < kHalves; ++half) {
    t.scales[half] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile) + half));
  }
  for (int quad = 0; quad < kQuads; ++quad) {
    for (int half = 0; half < kHalves; ++half) {
      const __m512i pairs = _mm512_loadu_si512(tile + kCodesOffset + (quad * kHalves + half) * 64);
      t.low[quad][half] = _mm512_and_si512(pairs, nibble);
      t.high[quad][half] = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), nibble);
    }
  }
  return t;
}

inline __attribute__((always_inline)) __m512i four_inputs(const int8_t* x) {
  int32_t bits;
  std::memcpy(&bits, x, sizeof bits);
  return _mm512_set1_epi32(bits);
}

// total += one group of one token.
inline __attribute__((always_inline)) void add_group(const Tile& t, const int8_t* codes, float scale, int32_t offset,
                                                     __m512 (&total)[kHalves]) {
  __m512i sum[kHalves];
  for (int half = 0; half < kHalves; ++half) {
    sum[half] = _mm512_set1_epi32(offset);
  }
  for (int quad = 0; quad < kQuads; ++quad) {
    const __m512i low = four_inputs(codes + 4 * quad);
    const __m512i high = four_inputs(codes + 16 + 4 * quad);
    for (int half = 0; half < kHalves; ++half) {
      sum[half] = _mm512_dpbusd_epi32(sum[half], t.low[quad][half], low);
      sum[half] = _mm512_dpbusd_epi32(sum[half], t.high[quad][half], high);
    }
  }
  for (int half = 0; half < kHalves; ++half) {
    const __m512 scales = _mm512_mul_ps(t.scales[half], _mm512_set1_ps(scale));
    total[half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[half]), scales, total[half]);
  }
}

inline void prefetch(const uint8_t* tile) {
  const auto ahead = reinterpret_cast<uintptr_t>(tile) + kPrefetchBytes;  // may lie behind the tensor's end: harmless
  for (int line = 0; line < kTileBytes; line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(ahead + line), _MM_HINT_T0);
  }
}

void rows_of_one(const uint8_t* tiles, int64_t groups, const Activations& x, float* y) {
  __m512 total[kHalves] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t group = 0; group < groups; ++group, tiles += kTileBytes) {
    prefetch(tiles);
    add_group(unpack(tiles), x.codes + group * kGroup, x.scales[group], x.offsets[group], total);
  }
  _mm512_storeu_ps(y, total[0]);
  _mm512_storeu_ps(y + 16, total[1]);
}

void rows(const uint8_t* tiles, int64_t groups, const Activations& x, float* y) {
  if (x.tokens == 1) {
    return rows_of_one(tiles, groups, x, y);
  }
  std::memset(y, 0, x.tokens * kTileRows * sizeof(float));
  for (int64_t group = 0; group < groups; ++group, tiles += kTileBytes) {
    prefetch(tiles);
    const Tile t = unpack(tiles);
    for (int64_t token = 0; token < x.tokens; ++token) {
      const int64_t at = group * x.tokens + token;
      float* to = y + token * kTileRows;
      __m512 total[kHalves] = {_mm512_loadu_ps(to), _mm512_loadu_ps(to + 16)};
      add_group(t, x.codes + at * kGroup, x.scales[at], x.offsets[at], total);
      _mm512_storeu_ps(to, total[0]);
      _mm512_storeu_ps(to + 16, total[1]);
    }
  }
}

}  // namespace

namespace LFM2_TARGET {

const Kernels kKernels = {LFM2_TARGET_NAME, quantize_group, rows, swiglu_groups, accumulate_rows};

}  // namespace LFM2_TARGET
}  // namespace lfm2
