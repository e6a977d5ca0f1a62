#include "gated_conv.h"

#include <algorithm>
#include <cstring>

#include "row_work.h"

namespace lfm2 {
namespace {

constexpr int64_t kChunkTokens = 16;  // whose gated inputs stay in the second-level cache

void copy_row(const float* from, int64_t width, float* to) {
  std::memcpy(to, from, width * sizeof(float));
}

// Entry `index` of (state, gated inputs).
void window_entry(const GatedConvProblem& p, const ConvKernels& kernels, int64_t row, int64_t index, float* to) {
  const int64_t held = p.taps - 1;
  if (index < held) {
    copy_row(p.state + (row * held + index) * p.width, p.width, to);
  } else {
    kernels.gate(p, row, index - held, to);
  }
}

void chunk(const GatedConvProblem& p, const ConvKernels& kernels, int64_t row, int64_t first) {
  const int64_t count = std::min(kChunkTokens, p.tokens - first), entries = count + p.taps - 1;
  auto* window = static_cast<float*>(thread_scratch(Use::kWindow, times(entries, p.width, sizeof(float))));
  for (int64_t i = 0; i < entries; ++i) {
    window_entry(p, kernels, row, first + i, window + i * p.width);
  }
  for (int64_t i = 0; i < count; ++i) {
    kernels.convolve(p, row, first + i, window + i * p.width);
  }
}

}  // namespace

void turn_taps(const float* weight, int64_t width, int64_t taps, float* to) {
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t i = 0; i < width; ++i) {
      to[tap * width + i] = weight[i * taps + tap];
    }
  }
}

void run_gated_conv(const GatedConvProblem& p, const ConvKernels& kernels, const ThreadPool& pool) {
  const int64_t chunks = ceil_div(p.tokens, kChunkTokens);
  share_out(pool, p.batch * chunks,
            [&](int64_t task) { chunk(p, kernels, task / chunks, task % chunks * kChunkTokens); });
  const int64_t held = p.taps - 1;
  for (int64_t i = 0; i < p.batch * held; ++i) {
    window_entry(p, kernels, i / held, p.rows[i], p.present + i * p.width);
  }
  const int64_t entries = p.window == nullptr ? 0 : held + p.tokens;
  for (int64_t i = 0; i < p.batch * entries; ++i) {
    window_entry(p, kernels, i / entries, i % entries, p.window + i * p.width);
  }
}

}  // namespace lfm2
