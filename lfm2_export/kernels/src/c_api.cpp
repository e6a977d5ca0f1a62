// A C interface to the same code, without ExecuTorch: for tests, benchmarks and other hosts.

#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "layout.h"
#include "moe.h"
#include "row_matrix.h"

#define LFM2_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

void run_threads(const void*, int workers, void (*task)(void*, int), void* context) {
  std::vector<std::thread> others;
  for (int worker = 1; worker < workers; ++worker) {
    others.emplace_back(task, context, worker);
  }
  task(context, 0);
  for (std::thread& other : others) {
    other.join();
  }
}

}  // namespace

// The names of the kernels that this processor runs, fastest first; the list ends with null.
LFM2_EXPORT const char* const* lfm2_runnable_kernels() {
  return lfm2::runnable_kernels();
}

// The same of the kernels for ONNX Runtime's weights.
LFM2_EXPORT const char* const* lfm2_runnable_row_kernels() {
  return lfm2::runnable_row_kernels();
}

// One sparse feed-forward on plain buffers (see moe.h for their shapes); `expert_bias` may be null. Returns 0, or 1 for
// kernels that are unknown here, 2 for sizes that do not fit the layout, 3 for no memory.
LFM2_EXPORT int lfm2_moe_ffn(const char* kernels_name, int threads, const float* x, const float* router_logits,
                             const float* expert_bias, const uint8_t* gate_up, const uint8_t* down, int64_t tokens,
                             int64_t width, int64_t inner, int64_t experts, int64_t top_k, int normalize, float scale,
                             float* out) {
  const lfm2::Kernels* kernels = lfm2::kernels_by_name(kernels_name);
  if (kernels == nullptr) {
    return 1;
  }
  if (width % lfm2::kGroup != 0 || inner % lfm2::kGroup != 0 || top_k < 1 || top_k > experts) {
    return 2;
  }
  const lfm2::MoeProblem problem = {
      x, {router_logits, expert_bias, experts, top_k, normalize != 0, scale}, gate_up, down, tokens, width, inner, out};
  const std::unique_ptr<void, void (*)(void*)> scratch(std::aligned_alloc(64, lfm2::moe_scratch_bytes(problem)),
                                                       std::free);
  if (scratch == nullptr) {
    return 3;
  }
  lfm2::run_moe(problem, *kernels, {threads, run_threads, nullptr}, scratch.get());
  return 0;
}
