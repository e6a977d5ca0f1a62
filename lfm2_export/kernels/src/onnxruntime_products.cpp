// The operators that multiply with quantized matrices; onnxruntime_ops.cpp says what they take.

#include "onnxruntime_kernel.h"
#include "row_matmul.h"

namespace lfm2 {
namespace {

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

}  // namespace

std::vector<const OrtCustomOp*> product_ops() {
  static const OrtCustomOp ops[] = {described<MatMulNBits>(), described<Projections>(), described<FeedForward>(),
                                    described<SparseMoe>()};
  return {&ops[0], &ops[1], &ops[2], &ops[3]};
}

}  // namespace lfm2
