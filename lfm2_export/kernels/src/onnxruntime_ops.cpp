// Operators for ONNX Runtime, domain "lfm2", version 1; a session gets them by registering this library.
//
//   MatMulNBits(x, codes, scales, zero_points?, bias?) -> x times the transposed matrix, plus bias
//       K, N, bits, block_size
//   Projections(x, three times codes, scales, zero_points?) -> x times each; K, N0, N1, N2, bits, block_size
//   FeedForward(x, w1 codes, scales, zero_points?, w3 codes, scales, zero_points?, w2 codes, scales, zero_points?)
//       -> (silu(x w1') * x w3') w2'; inner, bits, block_size (of w1 and w3), down_bits, down_block_size
//   GatedConv(projected, weight, bias?, state, attended, rows) -> C * conv(B * x), new state
//   Attention(q, k, v, q_norm, k_norm, past_key, past_value, seqlens_k, attention_mask, cos, sin, position_ids)
//       -> attended values, present_key, present_value; num_heads, kv_num_heads, epsilon. Where the past and the present
//       are one buffer, only new positions are written
//   AttentionInt8: the same with a cache of uint8, [..., head_dim + 4] (attention.h)
//   SparseMoe(x, router_logits, expert_bias?, gate_up codes, scales, zero_points?, down codes, scales, zero_points?)
//       top_k, normalize, routed_scaling_factor, bits, block_size
//
// Weights are the initializers of com.microsoft's MatMulNBits and QMoE, read where the runtime has mapped the data file
// (see row_matrix.h). Everything that a graph could get wrong is checked here, so that the kernels need not look.

#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "attention.h"
#include "gated_conv.h"
#include "onnxruntime_abi.h"
#include "row_matmul.h"

namespace lfm2 {
namespace {

class Failure : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

__attribute__((format(printf, 1, 2), noreturn)) void fail(const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Failure(text);
}

class OwnStatus : public std::exception {
 public:
  explicit OwnStatus(OrtStatus* status) : status(status) {}
  OrtStatus* status;
};

void check(OrtStatus* status) {
  if (status != nullptr) {
    throw OwnStatus(status);
  }
}

// Turns what `body` throws into a status: no exception may cross the C interface.
template <typename Body>
OrtStatus* guarded(const OrtApi* api, const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const OwnStatus& error) {
    return error.status;
  } catch (const Failure& error) {
    return ort::CreateStatus::of(api)(ort::kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return ort::CreateStatus::of(api)(ort::kFail, error.what());
  }
}

struct Tensor {
  void* data = nullptr;  // null: an optional input that is not there
  int type = ort::kAnyType;
  std::vector<int64_t> shape;

  int64_t count() const {
    int64_t product = 1;
    for (const int64_t size : shape) {
      product *= size;
    }
    return product;
  }
  int64_t last() const { return shape.empty() ? 1 : shape.back(); }

  template <typename Element>
  const Element* as() const {
    return static_cast<const Element*>(data);
  }
};

class Context {
 public:
  Context(const OrtApi* api, OrtKernelContext* context) : api_(api), context_(context) {
    check(ort::KernelContextGetInputCount::of(api_)(context_, &inputs_));
  }

  Tensor input(size_t index) const {
    const OrtValue* value = nullptr;
    if (index < inputs_) {
      check(ort::KernelContextGetInput::of(api_)(context_, index, &value));
    }
    return value == nullptr ? Tensor() : described(value);
  }

  template <typename Element = float>
  Element* output(const std::vector<int64_t>& shape, size_t index = 0) const {
    OrtValue* value = nullptr;
    check(ort::KernelContextGetOutput::of(api_)(context_, index, shape.data(), shape.size(), &value));
    void* data = nullptr;
    check(ort::GetTensorMutableData::of(api_)(value, &data));
    return static_cast<Element*>(data);
  }

  // The session's own threads; how many it has nobody says, and more workers than threads do no harm.
  ThreadPool pool() const {
    static const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    return {cores, run, this};
  }

 private:
  Tensor described(const OrtValue* value) const {
    Tensor found;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(ort::GetTensorTypeAndShape::of(api_)(value, &info));
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> owner(
        info, ort::ReleaseTensorTypeAndShapeInfo::of(api_));
    size_t rank = 0;
    check(ort::GetDimensionsCount::of(api_)(info, &rank));
    found.shape.resize(rank);
    check(ort::GetDimensions::of(api_)(info, found.shape.data(), rank));
    check(ort::GetTensorElementType::of(api_)(info, &found.type));
    check(ort::GetTensorMutableData::of(api_)(const_cast<OrtValue*>(value), &found.data));
    return found;
  }

  static void run(const void* host, int workers, void (*task)(void*, int), void* context) {
    struct Call {
      void (*task)(void*, int);
      void* context;
    } call = {task, context};
    const auto one = [](void* data, size_t worker) {
      const auto& its = *static_cast<Call*>(data);
      its.task(its.context, static_cast<int>(worker));
    };
    const auto* self = static_cast<const Context*>(host);
    check(ort::KernelContextParallelFor::of(self->api_)(self->context_, one, workers, 0, &call));
  }

  const OrtApi* api_;
  OrtKernelContext* context_;
  size_t inputs_ = 0;
};

// Memory of a thread that runs programs, kept from call to call.
void* scratch_of(size_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t size = 0;
  if (size < bytes) {
    size = 0;
    memory.reset(std::aligned_alloc(kAlignment, bytes));
    if (memory == nullptr) {
      throw std::bad_alloc();
    }
    size = bytes;
  }
  return memory.get();
}

int64_t attribute(const OrtApi* api, const OrtKernelInfo* info, const char* name) {
  int64_t value = 0;
  check(ort::KernelInfoGetAttributeInt64::of(api)(info, name, &value));
  return value;
}

struct Format {
  int bits;
  int64_t group;
};

Format format_of(const OrtApi* api, const OrtKernelInfo* info, const std::string& prefix = "") {
  const int64_t bits = attribute(api, info, (prefix + "bits").c_str());
  const int64_t group = attribute(api, info, (prefix + "block_size").c_str());
  if (bits != 4 && bits != 8) {
    fail("bits %" PRId64 ": 4 and 8 are known", bits);
  }
  if (group != 32 && group != 64 && group != 128 && group != 256) {
    fail("block_size %" PRId64 ": 32, 64, 128 and 256 are known", group);
  }
  return {static_cast<int>(bits), group};
}

void expect_rank(const Tensor& tensor, const char* name, size_t rank) {
  if (tensor.shape.size() != rank) {
    fail("%s has %zu dimensions, not %zu", name, tensor.shape.size(), rank);
  }
}

void expect_count(const Tensor& tensor, const char* name, int64_t count) {
  if (tensor.count() != count) {
    fail("%s has %" PRId64 " elements, not %" PRId64, name, tensor.count(), count);
  }
}

// The matrix of three inputs; `of` names it in errors.
RowMatrix matrix_of(const Context& context, size_t first, const Format& format, int64_t rows, int64_t columns,
                    const char* of) {
  const Tensor codes = context.input(first), scales = context.input(first + 1), points = context.input(first + 2);
  if (rows < 1 || columns < 1 || columns % format.group != 0) {
    fail("%s: %" PRId64 " x %" PRId64 " does not fit groups of %" PRId64, of, rows, columns, format.group);
  }
  const RowMatrix w = {static_cast<const uint8_t*>(codes.data),
                       scales.data,
                       static_cast<const uint8_t*>(points.data),
                       rows,
                       columns,
                       format.group,
                       format.bits,
                       scales.type == ort::kHalf};
  expect_count(codes, of, rows * w.row_bytes());
  expect_count(scales, of, rows * w.groups());
  if (scales.type != ort::kFloat && scales.type != ort::kHalf) {
    fail("%s: scales are neither float nor float16", of);
  }
  if (points.data != nullptr) {
    if (format.bits != 4) {
      fail("%s: zero points are known of 4-bit codes only", of);
    }
    expect_count(points, of, rows * w.point_bytes());
  }
  return w;
}

class MatMulNBits {
 public:
  static constexpr const char* kName = "MatMulNBits";
  static constexpr int kInputs[] = {ort::kFloat, ort::kUint8, ort::kAnyType, ort::kUint8, ort::kFloat};
  static constexpr unsigned kOptionalInputs = 1u << 3 | 1u << 4;
  static constexpr int kOutputs[] = {ort::kFloat};

  MatMulNBits(const OrtApi* api, const OrtKernelInfo* info)
      : format_(format_of(api, info)), rows_(attribute(api, info, "N")), columns_(attribute(api, info, "K")) {}

  void compute(const Context& context) const {
    const Tensor x = context.input(0), bias = context.input(4);
    if (x.last() != columns_) {
      fail("MatMulNBits: x has %" PRId64 " columns, the matrix %" PRId64, x.last(), columns_);
    }
    MatMulProblem problem = {};
    problem.x = static_cast<const float*>(x.data);
    problem.w = matrix_of(context, 1, format_, rows_, columns_, kName);
    std::vector<int64_t> shape = x.shape;  // not of rank 0: a matrix of one column has been refused
    shape.back() = rows_;
    problem.bias = static_cast<const float*>(bias.data);
    problem.tokens = x.count() / columns_;
    problem.out = context.output(shape);
    if (bias.data != nullptr) {
      expect_count(bias, "MatMulNBits: bias", rows_);
    }
    if (problem.tokens > 0) {
      run_matmul(problem, best_row_kernels(), context.pool(), scratch_of(matmul_scratch_bytes(problem)));
    }
  }

 private:
  Format format_;
  int64_t rows_;
  int64_t columns_;
};

// A layer's q, k and v.
class Projections {
 public:
  static constexpr const char* kName = "Projections";
  static constexpr int kInputs[] = {ort::kFloat, ort::kUint8,   ort::kAnyType, ort::kUint8, ort::kUint8,
                                    ort::kAnyType, ort::kUint8, ort::kUint8,   ort::kAnyType, ort::kUint8};
  static constexpr unsigned kOptionalInputs = 1u << 3 | 1u << 6 | 1u << 9;
  static constexpr int kOutputs[] = {ort::kFloat, ort::kFloat, ort::kFloat};

  Projections(const OrtApi* api, const OrtKernelInfo* info)
      : format_(format_of(api, info)),
        rows_{attribute(api, info, "N0"), attribute(api, info, "N1"), attribute(api, info, "N2")},
        columns_(attribute(api, info, "K")) {}

  void compute(const Context& context) const {
    const Tensor x = context.input(0);
    if (x.last() != columns_) {
      fail("Projections: x has %" PRId64 " columns, the matrices %" PRId64, x.last(), columns_);
    }
    MatMulProblem problems[kCount] = {};
    for (size_t i = 0; i < kCount; ++i) {
      problems[i].x = x.as<float>();
      problems[i].w = matrix_of(context, 1 + 3 * i, format_, rows_[i], columns_, kName);
      std::vector<int64_t> shape = x.shape;  // not of rank 0, as above
      shape.back() = rows_[i];
      problems[i].tokens = x.count() / columns_;
      problems[i].out = context.output(shape, i);
    }
    if (problems->tokens > 0) {
      run_matmuls(problems, kCount, best_row_kernels(), context.pool(), scratch_of(matmul_scratch_bytes(*problems)));
    }
  }

 private:
  static constexpr int kCount = 3;
  Format format_;
  int64_t rows_[kCount];
  int64_t columns_;
};

class FeedForward {
 public:
  static constexpr const char* kName = "FeedForward";
  static constexpr int kInputs[] = {ort::kFloat, ort::kUint8,   ort::kAnyType, ort::kUint8, ort::kUint8,
                                    ort::kAnyType, ort::kUint8, ort::kUint8,   ort::kAnyType, ort::kUint8};
  static constexpr unsigned kOptionalInputs = 1u << 3 | 1u << 6 | 1u << 9;
  static constexpr int kOutputs[] = {ort::kFloat};

  FeedForward(const OrtApi* api, const OrtKernelInfo* info)
      : inner_(attribute(api, info, "inner")),
        format_(format_of(api, info)),
        down_format_(format_of(api, info, "down_")) {
    if (inner_ < 1 || inner_ % kGroupInputs != 0) {
      fail("FeedForward: inner width %" PRId64 " is not a multiple of %d", inner_, kGroupInputs);
    }
  }

  void compute(const Context& context) const {
    const Tensor x = context.input(0);
    FeedForwardProblem problem = {};
    problem.x = static_cast<const float*>(x.data);
    problem.gate = matrix_of(context, 1, format_, inner_, x.last(), "FeedForward: w1");
    problem.up = matrix_of(context, 4, format_, inner_, x.last(), "FeedForward: w3");
    problem.down = matrix_of(context, 7, down_format_, x.last(), inner_, "FeedForward: w2");
    problem.tokens = x.count() / x.last();
    problem.out = context.output(x.shape);
    if (problem.tokens > 0) {
      run_feed_forward(problem, best_row_kernels(), context.pool(), scratch_of(feed_forward_scratch_bytes(problem)));
    }
  }

 private:
  int64_t inner_;
  Format format_;
  Format down_format_;
};

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

class SparseMoe {
 public:
  static constexpr const char* kName = "SparseMoe";
  static constexpr int kInputs[] = {ort::kFloat,   ort::kFloat, ort::kFloat, ort::kUint8,   ort::kAnyType,
                                    ort::kUint8, ort::kUint8, ort::kAnyType, ort::kUint8};
  static constexpr unsigned kOptionalInputs = 1u << 2 | 1u << 5 | 1u << 8;
  static constexpr int kOutputs[] = {ort::kFloat};

  SparseMoe(const OrtApi* api, const OrtKernelInfo* info)
      : format_(format_of(api, info)),
        top_k_(attribute(api, info, "top_k")),
        normalize_(attribute(api, info, "normalize") != 0) {
    check(ort::KernelInfoGetAttributeFloat::of(api)(info, "routed_scaling_factor", &scale_));
  }

  void compute(const Context& context) const {
    const Tensor x = context.input(0), logits = context.input(1), bias = context.input(2), down = context.input(6);
    const int64_t width = x.last(), experts = logits.last(), per_expert = experts * width * format_.bits / 8;
    if (width < 1 || per_expert < 1 || top_k_ < 1 || top_k_ > experts) {
      fail("SparseMoe: width %" PRId64 ", %" PRId64 " of %" PRId64 " experts", width, top_k_, experts);
    }
    const int64_t tokens = x.count() / width, inner = down.count() / per_expert;
    expect_count(logits, "SparseMoe: router_logits", tokens * experts);
    if (bias.data != nullptr) {
      expect_count(bias, "SparseMoe: expert_bias", experts);
    }
    if (width % kGroupInputs != 0 || inner % kGroupInputs != 0) {
      fail("SparseMoe: widths %" PRId64 " and %" PRId64 " are not multiples of 32", width, inner);
    }
    RowMoeProblem problem = {};
    problem.x = static_cast<const float*>(x.data);
    problem.routing = {static_cast<const float*>(logits.data), static_cast<const float*>(bias.data), experts, top_k_,
                       normalize_, scale_};
    problem.gate_up = matrix_of(context, 3, format_, experts * 2 * inner, width, "SparseMoe: gate_up");
    problem.down = matrix_of(context, 6, format_, experts * width, inner, "SparseMoe: down");
    problem.tokens = tokens;
    problem.out = context.output(x.shape);
    if (tokens > 0) {
      run_row_moe(problem, best_row_kernels(), context.pool(), scratch_of(row_moe_scratch_bytes(problem)));
    }
  }

 private:
  Format format_;
  int64_t top_k_;
  bool normalize_;
  float scale_ = 1.0f;
};

// An operator's kernel with the table it was made with.
template <typename Op>
struct Kernel {
  Kernel(const OrtApi* api, const OrtKernelInfo* info) : api(api), op(api, info) {}
  const OrtApi* api;
  Op op;
};

template <typename Op>
OrtCustomOp described() {
  OrtCustomOp d = {};
  d.version = ort::kApiVersion;
  d.GetName = [](const OrtCustomOp*) { return Op::kName; };
  d.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return "CPUExecutionProvider"; };
  d.GetInputType = [](const OrtCustomOp*, size_t index) { return Op::kInputs[index]; };
  d.GetInputTypeCount = [](const OrtCustomOp*) { return std::size(Op::kInputs); };
  d.GetOutputType = [](const OrtCustomOp*, size_t index) -> int { return Op::kOutputs[index]; };
  d.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return std::size(Op::kOutputs); };
  d.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) -> int {
    return Op::kOptionalInputs >> index & 1 ? ort::kOptional : ort::kRequired;
  };
  d.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return ort::kRequired; };
  d.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  d.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  d.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  d.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    return guarded(api, [&] { *kernel = new Kernel<Op>(api, info); });
  };
  d.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    auto& its = *static_cast<Kernel<Op>*>(kernel);
    return guarded(its.api, [&] { its.op.compute(Context(its.api, context)); });
  };
  d.KernelDestroy = [](void* kernel) { delete static_cast<Kernel<Op>*>(kernel); };
  return d;
}

}  // namespace
}  // namespace lfm2

#define LFM2_EXPORT extern "C" __attribute__((visibility("default")))

// What SessionOptions.register_custom_ops_library looks for.
LFM2_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace lfm2;
  static const OrtCustomOp ops[] = {described<MatMulNBits>(), described<Projections>(), described<FeedForward>(),     described<SparseMoe>(),
                                    described<GatedConv>(),        described<Attention<false>>(), described<Attention<true>>()};
  const OrtApi* api = base->GetApi(ort::kApiVersion);
  if (api == nullptr) {  // there is no table to make a status with
    return nullptr;      // the session then says that it does not know the operators
  }
  return guarded(api, [&] {
    OrtCustomOpDomain* domain = nullptr;  // lives as long as the process, as every session may use it
    check(ort::CreateCustomOpDomain::of(api)("lfm2", &domain));
    for (const OrtCustomOp& op : ops) {
      check(ort::CustomOpDomainAdd::of(api)(domain, &op));
    }
    check(ort::AddCustomOpDomain::of(api)(options, domain));
  });
}
