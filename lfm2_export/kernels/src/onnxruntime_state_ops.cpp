// The operators that keep a state: the short convolution and attention; onnxruntime_ops.cpp says what they take.

#include <cstring>
#include <mutex>

#include "attention.h"
#include "gated_conv.h"
#include "onnxruntime_kernel.h"

namespace lfm2 {
namespace {

class GatedConv {
 public:
  static constexpr const char* kName = "GatedConv";
  static constexpr int kInputs[] = {ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kInt64};
  static constexpr unsigned kOptionalInputs = 1u << 2;
  static constexpr int kOutputs[] = {ort::kFloat, ort::kFloat};

  GatedConv(const OrtApi*, const OrtKernelInfo*) {}

  void compute(const Context& context) {
    const Tensor projected = context.input(0), weight = context.input(1), bias = context.input(2);
    const Tensor state = context.input(3), attended = context.input(4), rows = context.input(5);
    expect_rank(projected, "GatedConv: projected", 3);
    expect_rank(state, "GatedConv: state", 3);
    GatedConvProblem problem = {};
    problem.batch = projected.shape[0];
    problem.tokens = projected.shape[1];
    problem.width = projected.shape[2] / 3;
    problem.taps = state.shape[1] + 1;
    expect_count(projected, "GatedConv: projected", problem.batch * problem.tokens * 3 * problem.width);
    expect_count(weight, "GatedConv: weight", problem.width * problem.taps);
    expect_count(state, "GatedConv: state", problem.batch * (problem.taps - 1) * problem.width);
    expect_count(attended, "GatedConv: attended", problem.batch * problem.tokens);
    expect_count(rows, "GatedConv: rows", problem.batch * (problem.taps - 1));
    if (bias.data != nullptr) {
      expect_count(bias, "GatedConv: bias", problem.width);
    }
    problem.rows = rows.as<int64_t>();
    for (int64_t i = 0; i < rows.count(); ++i) {
      if (problem.rows[i] < 0 || problem.rows[i] >= problem.tokens + problem.taps - 1) {
        fail("GatedConv: row %" PRId64 " is not there", problem.rows[i]);
      }
    }
    problem.projected = projected.as<float>();
    const std::shared_ptr<const std::vector<float>> taps = turned(weight.as<float>(), problem.width, problem.taps);
    problem.weight = taps->data();
    problem.bias = bias.as<float>();
    problem.state = state.as<float>();
    problem.attended = attended.as<float>();
    problem.out = context.output({problem.batch, problem.tokens, problem.width});
    problem.present = context.output(state.shape, 1);
    run_gated_conv(problem, best_conv_kernels(), context.pool());
  }

 private:
  // weight [width, taps] as [taps, width]; made once, as it is an initializer.
  std::shared_ptr<const std::vector<float>> turned(const float* weight, int64_t width, int64_t taps) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (turned_ == nullptr || turned_from_ != weight) {
      auto made = std::make_shared<std::vector<float>>(width * taps);
      for (int64_t i = 0; i < width * taps; ++i) {
        (*made)[i % taps * width + i / taps] = weight[i];
      }
      turned_ = made;
      turned_from_ = weight;
    }
    return turned_;
  }

  std::mutex mutex_;
  std::shared_ptr<const std::vector<float>> turned_;
  const float* turned_from_ = nullptr;
};

template <bool kInt8>
class Attention {
 public:
  static constexpr const char* kName = kInt8 ? "AttentionInt8" : "Attention";
  static constexpr int kCache = kInt8 ? ort::kUint8 : ort::kFloat;
  static constexpr int kInputs[] = {ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, kCache,
                                    kCache,      ort::kInt32, ort::kInt64, ort::kFloat, ort::kFloat, ort::kInt64};
  static constexpr unsigned kOptionalInputs = 0;
  static constexpr int kOutputs[] = {ort::kFloat, kCache, kCache};

  Attention(const OrtApi* api, const OrtKernelInfo* info)
      : heads_(attribute(api, info, "num_heads")), kv_heads_(attribute(api, info, "kv_num_heads")) {
    check(ort::KernelInfoGetAttributeFloat::of(api)(info, "epsilon", &eps_));
    if (kv_heads_ < 1 || heads_ < 1 || heads_ % kv_heads_ != 0) {
      fail("%s: %" PRId64 " heads for %" PRId64 " of the cache", kName, heads_, kv_heads_);
    }
  }

  void compute(const Context& context) const {
    const Tensor q = context.input(0), k = context.input(1), v = context.input(2), q_norm = context.input(3);
    const Tensor k_norm = context.input(4), past_key = context.input(5), past_value = context.input(6);
    const Tensor last = context.input(7), mask = context.input(8), cos = context.input(9), sin = context.input(10);
    const Tensor position_ids = context.input(11);
    expect_rank(q, "Attention: q", 3);
    expect_rank(mask, "Attention: attention_mask", 2);
    expect_rank(past_key, "Attention: past_key", 4);
    AttentionProblem p = {};
    p.batch = q.shape[0];
    p.tokens = q.shape[1];
    p.total = mask.shape[1];
    p.heads = heads_;
    p.kv_heads = kv_heads_;
    p.head_dim = q.shape[2] / heads_;
    p.eps = eps_;
    p.is_int8 = kInt8;
    if (p.head_dim < kLaneKeys || p.head_dim % kLaneKeys != 0 || p.head_dim > kMostHeadDim) {
      fail("Attention: head_dim %" PRId64 " is not a multiple of %d up to %d", p.head_dim, kLaneKeys, kMostHeadDim);
    }
    const int64_t past = past_key.shape[2], row = kInt8 ? p.head_dim + 4 : p.head_dim;
    p.capacity = std::max(past, p.total);
    if (p.total < p.tokens) {
      fail("Attention: %" PRId64 " tokens, but a mask of %" PRId64 " positions", p.tokens, p.total);
    }
    expect_count(q, "Attention: q", p.batch * p.tokens * heads_ * p.head_dim);
    expect_count(k, "Attention: k", p.batch * p.tokens * kv_heads_ * p.head_dim);
    expect_count(v, "Attention: v", p.batch * p.tokens * kv_heads_ * p.head_dim);
    expect_count(q_norm, "Attention: q_norm", p.head_dim);
    expect_count(k_norm, "Attention: k_norm", p.head_dim);
    expect_count(past_key, "Attention: past_key", p.batch * kv_heads_ * past * row);
    expect_count(past_value, "Attention: past_value", p.batch * kv_heads_ * past * row);
    expect_count(last, "Attention: seqlens_k", p.batch);
    expect_count(mask, "Attention: attention_mask", p.batch * p.total);
    expect_count(position_ids, "Attention: position_ids", p.batch * p.tokens);
    p.positions = cos.count() / (p.head_dim / 2);
    if (p.positions < 1) {
      fail("Attention: cos holds no position");
    }
    expect_count(cos, "Attention: cos", p.positions * (p.head_dim / 2));
    expect_count(sin, "Attention: sin", p.positions * (p.head_dim / 2));
    p.last = last.as<int32_t>();
    for (int64_t i = 0; i < p.batch; ++i) {
      if (p.last[i] < 0 || p.last[i] >= p.total) {
        fail("Attention: seqlens_k %d of %" PRId64 " positions", p.last[i], p.total);
      }
    }
    p.q = q.as<float>();
    p.k = k.as<float>();
    p.v = v.as<float>();
    p.q_norm = q_norm.as<float>();
    p.k_norm = k_norm.as<float>();
    p.cos = cos.as<float>();
    p.sin = sin.as<float>();
    p.position_ids = position_ids.as<int64_t>();
    p.mask = mask.as<int64_t>();
    p.out = context.output(q.shape);
    const std::vector<int64_t> present = {p.batch, kv_heads_, p.capacity, row};
    p.key = context.output<uint8_t>(present, 1);
    p.value = context.output<uint8_t>(present, 2);
    const int64_t bytes = cache_row_bytes(p.head_dim, kInt8);
    carry_over(past_key, p.batch * kv_heads_, past * bytes, p.capacity * bytes, p.key);
    carry_over(past_value, p.batch * kv_heads_, past * bytes, p.capacity * bytes, p.value);
    if (p.batch * p.tokens > 0) {
      const ThreadPool pool = context.pool();
      run_attention(p, best_attention_kernels(), pool, scratch_of(attention_scratch_bytes(p, pool.workers)));
    }
  }

 private:
  static void carry_over(const Tensor& past, int64_t heads, int64_t held, int64_t room, uint8_t* present) {
    if (past.data == present) {
      return;
    }
    for (int64_t head = 0; head < heads && held > 0; ++head) {
      std::memcpy(present + head * room, past.as<uint8_t>() + head * held, held);
    }
  }

  int64_t heads_;
  int64_t kv_heads_;
  float eps_ = 0.0f;
};

}  // namespace

std::vector<const OrtCustomOp*> state_ops() {
  static const OrtCustomOp ops[] = {described<GatedConv>(), described<Attention<false>>(), described<Attention<true>>()};
  return {&ops[0], &ops[1], &ops[2]};
}

}  // namespace lfm2
