// llama::update_cache.out and llama::custom_sdpa.out for hosts without Python: the executorch wheel has them only in a
// library that needs libtorch. An app that links ExecuTorch's LLM custom operators leaves this file out. Only what
// LFM2's programs use: float32, contiguous, causal, no mask.

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

namespace lfm2 {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

bool is_float_of_rank_4(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float && tensor.dim() == 4 &&
         executorch::runtime::tensor_is_default_dim_order(tensor);
}

// `start` comes from the program, or from who runs it: a sum with it may wrap.
bool fits_behind(int64_t start, int64_t count, int64_t capacity) {
  return start >= 0 && count <= capacity && start <= capacity - count;
}

// Several sums side by side, which the compiler turns into vectors; one sum it must not reorder.
float dot(const float* a, const float* b, int64_t count) {
  constexpr int kLanes = 16;
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      sums[lane] += a[i + lane] * b[i + lane];
    }
  }
  float sum = 0;
  for (; i < count; ++i) {
    sum += a[i] * b[i];
  }
  for (float lane : sums) {
    sum += lane;
  }
  return sum;
}

// [batch, position, head, 0 .. width - 1] of a [B, S, H, D] tensor.
struct Rows {
  const float* data;
  int64_t positions, heads, width;

  explicit Rows(const Tensor& tensor)
      : data(tensor.const_data_ptr<float>()), positions(tensor.size(1)), heads(tensor.size(2)), width(tensor.size(3)) {}

  const float* at(int64_t batch, int64_t position, int64_t head) const {
    return data + ((batch * positions + position) * heads + head) * width;
  }
};

// Softmax of q k / sqrt(D) over the first `visible` positions, times v.
void attend(const float* q, const Rows& key, const Rows& value, int64_t batch, int64_t head, int64_t visible,
            float scale, float* scores, float* out) {
  float greatest = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < visible; ++i) {
    scores[i] = dot(q, key.at(batch, i, head), key.width) * scale;
    greatest = std::max(greatest, scores[i]);
  }
  float sum = 0;
  for (int64_t i = 0; i < visible; ++i) {
    scores[i] = std::exp(scores[i] - greatest);
    sum += scores[i];
  }
  std::fill(out, out + value.width, 0.0f);
  for (int64_t i = 0; i < visible; ++i) {
    const float weight = scores[i] / sum;
    const float* v = value.at(batch, i, head);
    for (int64_t d = 0; d < value.width; ++d) {
      out[d] += weight * v[d];
    }
  }
}

}  // namespace

Tensor& update_cache_out(KernelRuntimeContext& context, const Tensor& value, Tensor& cache, int64_t start,
                         Tensor& out) {
  ET_KERNEL_CHECK(context, is_float_of_rank_4(value) && is_float_of_rank_4(cache), InvalidArgument, out);
  ET_KERNEL_CHECK(context,
                  value.size(0) == cache.size(0) && value.size(2) == cache.size(2) && value.size(3) == cache.size(3) &&
                      fits_behind(start, value.size(1), cache.size(1)),
                  InvalidArgument, out);
  const int64_t position = value.size(2) * value.size(3);
  for (int64_t batch = 0; batch < value.size(0); ++batch) {
    std::memcpy(cache.mutable_data_ptr<float>() + (batch * cache.size(1) + start) * position,
                value.const_data_ptr<float>() + batch * value.size(1) * position,
                value.size(1) * position * sizeof(float));
  }
  return out;
}

Tensor& custom_sdpa_out(KernelRuntimeContext& context, const Tensor& query, const Tensor& key, const Tensor& value,
                        int64_t start, const std::optional<Tensor>& mask, double dropout, bool is_causal,
                        std::optional<double> scale, Tensor& out) {
  ET_KERNEL_CHECK_MSG(context, is_causal && !mask.has_value() && dropout == 0.0, NotSupported, out,
                      "llama::custom_sdpa: only causal attention without a mask is built into this program");
  ET_KERNEL_CHECK(context, is_float_of_rank_4(query) && is_float_of_rank_4(key) && is_float_of_rank_4(value),
                  InvalidArgument, out);
  const int64_t batches = query.size(0), tokens = query.size(1), heads = query.size(2), width = query.size(3);
  ET_KERNEL_CHECK(context,
                  key.size(0) == batches && value.size(0) == batches && key.size(1) == value.size(1) &&
                      key.size(2) > 0 && key.size(2) == value.size(2) && heads % key.size(2) == 0 &&
                      key.size(3) == width && value.size(3) == width && fits_behind(start, tokens, key.size(1)) &&
                      out.scalar_type() == ScalarType::Float,
                  InvalidArgument, out);
  ET_KERNEL_CHECK(context, executorch::runtime::resize_tensor(out, query.sizes()) == Error::Ok, InvalidArgument, out);
  const Rows q(query), k(key), v(value);
  const float factor = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(width))));
  float* to = out.mutable_data_ptr<float>();
  executorch::extension::parallel_for(0, batches * tokens * heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(start + tokens);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / tokens % heads, token = i % tokens, batch = i / tokens / heads;
      const int64_t row = (batch * tokens + token) * heads + head;
      attend(q.at(batch, token, head), k, v, batch, head / (heads / k.heads), start + token + 1, factor, scores.data(),
             to + row * width);
    }
  });
  return out;
}

}  // namespace lfm2

EXECUTORCH_LIBRARY(llama, "update_cache.out", lfm2::update_cache_out);
EXECUTORCH_LIBRARY(llama, "custom_sdpa.out", lfm2::custom_sdpa_out);
