#include "float_matmul.h"

#include <algorithm>


namespace lfm2 {
namespace {

constexpr int64_t kTaskTokens = 16, kTaskOutputs = 128;

}  // namespace

void run_float_matmul(const FloatMatMulProblem& p, const FloatKernels& kernels, const ThreadPool& pool) {
  const int64_t across = ceil_div(p.outputs, kTaskOutputs);
  share_out(pool, across * ceil_div(p.tokens, kTaskTokens), [&](int64_t task) {
    const int64_t token = task / across * kTaskTokens, first = task % across * kTaskOutputs;
    kernels.multiply(p, token, std::min(kTaskTokens, p.tokens - token), first,
                     std::min(kTaskOutputs, p.outputs - first));
  });
}

}  // namespace lfm2
