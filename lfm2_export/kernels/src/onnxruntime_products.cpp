// The operators that multiply with quantized matrices; onnxruntime_ops.cpp says what they take.

#include "float_matmul.h"
#include "onnxruntime_kernel.h"
#include "row_matmul.h"
#include "target.h"

namespace lfm2 {
namespace {

Format format_of(const OrtApi* api, const OrtKernelInfo* info, const std::string& prefix = "") {
  return {attribute(api, info, (prefix + "bits").c_str()), attribute(api, info, (prefix + "block_size").c_str())};
}

// Of a further matrix: as the first one's where the graph says nothing else.
Format format_or(const OrtApi* api, const OrtKernelInfo* info, const std::string& prefix) {
  const Format first = format_of(api, info);
  return {attribute_or(api, info, (prefix + "bits").c_str(), first.bits),
          attribute_or(api, info, (prefix + "block_size").c_str(), first.group)};
}

constexpr unsigned kNorm = 7;  // bits of the last three inputs, which may be left out

// The last three inputs of an operator: what is added to x, and the weights of the norms.
NormOperands norm_operands(const Context& context, size_t first) {
  return {context.input(first), context.input(first + 1), context.input(first + 2)};
}

// The output that holds x + delta, where there is a delta.
void make_sum(const Context& context, const Operand& x, size_t index, RowInput& in) {
  if (in.delta != nullptr) {
    in.sum = context.output(x.sizes, x.rank, index);
  }
}

class MatMulNBits {
 public:
  static constexpr const char* kName = "MatMulNBits";
  static constexpr int kInputs[] = {ort::kFloat, ort::kUint8, ort::kAnyType, ort::kUint8,
                                    ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat};
  static constexpr unsigned kOptionalInputs = 1u << 3 | 1u << 4 | kNorm << 5;
  static constexpr int kOutputs[] = {ort::kFloat, ort::kFloat};
  static constexpr unsigned kOptionalOutputs = 1u << 1;

  MatMulNBits(const OrtApi* api, const OrtKernelInfo* info)
      : attributes_{kName, {format_of(api, info)},         attribute(api, info, "K"),
                    1,     {attribute(api, info, "N")}, float_attribute_or(api, info, "epsilon", 0.0f)} {
    check(attributes_);
  }

  void compute(const Context& context) const {
    ProductOperands operands;
    operands.x = context.input(0);
    operands.w[0] = context.matrix(1);
    operands.bias = context.input(4);
    operands.norm = norm_operands(context, 5);
    MatMulProblem problem = prepare(attributes_, operands)[0];
    make_sum(context, operands.x, 1, problem.in);
    problem.out = context.output_like(operands.x, problem.w.rows);
    if (problem.tokens > 0) {
      run_matmul(problem, best_target().rows, context.pool(), scratch_of(matmuls_scratch_bytes(&problem, 1)));
    }
  }

 private:
  ProductAttributes attributes_;
};

class MatMul {
 public:
  static constexpr const char* kName = "MatMul";
  static constexpr int kInputs[] = {ort::kFloat, ort::kFloat};
  static constexpr unsigned kOptionalInputs = 0;
  static constexpr int kOutputs[] = {ort::kFloat};

  MatMul(const OrtApi*, const OrtKernelInfo*) {}

  void compute(const Context& context) const {
    const Operand x = context.input(0);
    FloatMatMulProblem problem = prepare(x, context.input(1));
    problem.out = context.output_like(x, problem.outputs);
    run_float_matmul(problem, best_target().floats, context.pool());
  }
};

// A layer's q, k and v.
class Projections {
 public:
  static constexpr const char* kName = "Projections";
  static constexpr int kInputs[] = {ort::kFloat, ort::kUint8,   ort::kAnyType, ort::kUint8, ort::kUint8,
                                    ort::kAnyType, ort::kUint8, ort::kUint8,   ort::kAnyType, ort::kUint8,
                                    ort::kFloat,   ort::kFloat,  ort::kFloat};
  static constexpr unsigned kOptionalInputs = 1u << 3 | 1u << 6 | 1u << 9 | kNorm << 10;
  static constexpr int kOutputs[] = {ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat};
  static constexpr unsigned kOptionalOutputs = 1u << 3;

  Projections(const OrtApi* api, const OrtKernelInfo* info)
      : attributes_{kName,
                    {format_of(api, info), format_or(api, info, "N1_"), format_or(api, info, "N2_")},
                    attribute(api, info, "K"),
                    kCount,
                    {attribute(api, info, "N0"), attribute(api, info, "N1"), attribute(api, info, "N2")},
                    float_attribute_or(api, info, "epsilon", 0.0f)} {
    check(attributes_);
  }

  void compute(const Context& context) const {
    ProductOperands operands;
    operands.x = context.input(0);
    for (size_t i = 0; i < kCount; ++i) {
      operands.w[i] = context.matrix(1 + 3 * i);
    }
    operands.norm = norm_operands(context, 1 + 3 * kCount);
    MatMulProblems problems = prepare(attributes_, operands);
    make_sum(context, operands.x, kCount, problems[0].in);
    for (size_t i = 0; i < kCount; ++i) {
      problems[i].out = context.output_like(operands.x, problems[i].w.rows, i);
    }
    if (problems[0].tokens > 0) {
      run_matmuls(problems.data(), kCount, best_target().rows, context.pool(),
                  scratch_of(matmuls_scratch_bytes(problems.data(), kCount)));
    }
  }

 private:
  static constexpr int kCount = 3;
  ProductAttributes attributes_;
};

class FeedForward {
 public:
  static constexpr const char* kName = "FeedForward";
  static constexpr int kInputs[] = {ort::kFloat, ort::kUint8,   ort::kAnyType, ort::kUint8, ort::kUint8,
                                    ort::kAnyType, ort::kUint8, ort::kUint8,   ort::kAnyType, ort::kUint8,
                                    ort::kFloat,   ort::kFloat,  ort::kFloat};
  static constexpr unsigned kOptionalInputs = 1u << 3 | 1u << 6 | 1u << 9 | kNorm << 10;
  static constexpr int kOutputs[] = {ort::kFloat, ort::kFloat};
  static constexpr unsigned kOptionalOutputs = 1u << 1;

  FeedForward(const OrtApi* api, const OrtKernelInfo* info)
      : attributes_{kName,
                    attribute(api, info, "inner"),
                    format_of(api, info),
                    format_or(api, info, "up_"),
                    format_of(api, info, "down_"),
                    float_attribute_or(api, info, "epsilon", 0.0f)} {
    check(attributes_);
  }

  void compute(const Context& context) const {
    const Operand x = context.input(0);
    FeedForwardProblem problem = prepare(attributes_, {x, context.matrix(1), context.matrix(4), context.matrix(7),
                                                       norm_operands(context, 10)});
    make_sum(context, x, 1, problem.in);
    problem.out = context.output(x.sizes, x.rank);
    if (problem.tokens > 0) {
      run_feed_forward(problem, best_target().rows, context.pool(), scratch_of(feed_forward_scratch_bytes(problem)));
    }
  }

 private:
  FeedForwardAttributes attributes_;
};

class SparseMoe {
 public:
  static constexpr const char* kName = "SparseMoe";
  static constexpr int kInputs[] = {ort::kFloat, ort::kFloat, ort::kFloat,   ort::kUint8, ort::kAnyType, ort::kUint8,
                                    ort::kUint8, ort::kAnyType, ort::kUint8, ort::kFloat, ort::kFloat,   ort::kFloat,
                                    ort::kFloat};
  static constexpr unsigned kOptionalInputs = 1u << 1 | 1u << 2 | 1u << 5 | 1u << 8 | 1u << 9 | kNorm << 10;
  static constexpr int kOutputs[] = {ort::kFloat, ort::kFloat};
  static constexpr unsigned kOptionalOutputs = 1u << 1;

  SparseMoe(const OrtApi* api, const OrtKernelInfo* info)
      : attributes_{kName, attribute(api, info, "top_k"), attribute(api, info, "normalize") != 0,
                    float_attribute(api, info, "routed_scaling_factor"),
                    float_attribute_or(api, info, "epsilon", 0.0f)},
        format_(format_of(api, info)) {
    check(attributes_, format_);
  }

  void compute(const Context& context) const {
    const Operand x = context.input(0);
    const RoutingOperands router = {context.input(1), context.input(2), context.input(9)};
    RowMoeProblem problem = prepare(attributes_, format_, {x, router, context.matrix(3), context.matrix(6),
                                                           norm_operands(context, 10)});
    make_sum(context, x, 1, problem.in);
    problem.out = context.output(x.sizes, x.rank);
    if (problem.tokens > 0) {
      run_row_moe(problem, best_target().rows, best_target().floats, context.pool(),
                  scratch_of(row_moe_scratch_bytes(problem)));
    }
  }

 private:
  RoutingAttributes attributes_;
  Format format_;
};

}  // namespace

std::vector<const OrtCustomOp*> product_ops() {
  static const OrtCustomOp ops[] = {described<MatMulNBits>(), described<MatMul>(), described<Projections>(),
                                    described<FeedForward>(), described<SparseMoe>()};
  return {&ops[0], &ops[1], &ops[2], &ops[3], &ops[4]};
}

}  // namespace lfm2
