// What can be wrong with the operators that multiply with quantized matrices.

#include <cmath>

#include "checks.h"
#include "layout.h"

namespace lfm2 {

void check(const ProductAttributes& a) {
  static constexpr const char* kPrefixes[] = {"", "N1_", "N2_"};
  const Checks checks(a.op);
  checks.size("K", a.columns);
  checks.epsilon(a.epsilon);
  for (int i = 0; i < a.count; ++i) {
    checks.format(kPrefixes[i], a.formats[i]);
    checks.size("N", a.rows[i]);
  }
}

MatMulProblems prepare(const ProductAttributes& a, const ProductOperands& operands) {
  check(a);
  const Checks checks(a.op);
  const int64_t tokens = checks.tokens(operands.x, a.columns);
  const RowInput in = checks.input(operands.x, operands.norm, a.epsilon, a.columns);
  MatMulProblems problems = {};
  for (int i = 0; i < a.count; ++i) {
    static constexpr const char* kNames[] = {"w", "w of N1", "w of N2"};
    problems[i].in = in;
    problems[i].w = checks.matrix(kNames[i], operands.w[i], a.formats[i], a.rows[i], a.columns);
    problems[i].tokens = tokens;
  }
  checks.optional(operands.bias, "bias", Kind::kFloat, a.rows[0]);
  problems[0].bias = operands.bias.is_there ? operands.bias.as<float>() : nullptr;
  return problems;
}

void check(const FeedForwardAttributes& a) {
  const Checks checks(a.op);
  checks.format("", a.gate);
  checks.format("up_", a.up);
  checks.format("down_", a.down);
  checks.size("inner", a.inner);
  checks.epsilon(a.epsilon);
  if (a.inner % kGroupInputs != 0) {
    refuse("%s: inner width %" PRId64 " is not a multiple of %d", a.op, a.inner, kGroupInputs);
  }
}

FeedForwardProblem prepare(const FeedForwardAttributes& a, const FeedForwardOperands& operands) {
  check(a);
  const Checks checks(a.op);
  const int64_t width = operands.x.last();
  FeedForwardProblem problem = {};
  problem.tokens = checks.tokens(operands.x, width);
  problem.in = checks.input(operands.x, operands.norm, a.epsilon, width);
  problem.gate = checks.matrix("w1", operands.gate, a.gate, a.inner, width);
  problem.up = checks.matrix("w3", operands.up, a.up, a.inner, width);
  problem.down = checks.matrix("w2", operands.down, a.down, width, a.inner);
  return problem;
}

FloatMatMulProblem prepare(const Operand& x, const Operand& w) {
  const Checks checks("MatMul");
  checks.ranked(w, "w", Kind::kFloat, 2);
  FloatMatMulProblem problem = {};
  problem.inputs = w.sizes[0];
  problem.outputs = w.sizes[1];
  checks.size("inputs", problem.inputs);
  checks.size("outputs", problem.outputs);
  problem.tokens = checks.tokens(x, problem.inputs);
  problem.x = x.as<float>();
  problem.w = w.as<float>();
  return problem;
}

void check(const RoutingAttributes& a) {
  const Checks checks(a.op);
  checks.size("top_k", a.top_k);
  checks.epsilon(a.epsilon);
  if (!std::isfinite(a.scale)) {
    refuse("%s: the routed scaling factor is not finite", a.op);
  }
}

void check(const RoutingAttributes& a, const Format& format) {
  check(a);
  Checks(a.op).format("", format);
}

namespace {

Routing routing_of(const RoutingAttributes& a, const RoutingOperands& operands, int64_t tokens, int64_t width) {
  const Checks checks(a.op);
  const bool is_made = operands.matrix.is_there;
  if (is_made && operands.logits.is_there) {
    refuse("%s: router_logits and a router", a.op);
  }
  is_made ? checks.ranked(operands.matrix, "router", Kind::kFloat, 2)
          : checks.tensor(operands.logits, "router_logits", Kind::kFloat);
  const int64_t experts = is_made ? operands.matrix.last() : operands.logits.last();
  if (experts < 1 || experts > kMostExperts || a.top_k > experts) {
    refuse("%s: %" PRId64 " of %" PRId64 " experts: there may be %" PRId64, a.op, a.top_k, experts, kMostExperts);
  }
  if (is_made) {
    checks.shaped(operands.matrix, "router", Kind::kFloat, {width, experts});
  } else {
    checks.counted(operands.logits, "router_logits", Kind::kFloat, times(tokens, experts));
  }
  checks.optional(operands.expert_bias, "expert_bias", Kind::kFloat, experts);
  const float* bias = operands.expert_bias.is_there ? operands.expert_bias.as<float>() : nullptr;
  return {is_made ? nullptr : operands.logits.as<float>(), bias, experts, a.top_k, a.normalize, a.scale};
}

void check_widths(const char* op, int64_t width, int64_t inner) {
  if (width % kGroupInputs != 0 || inner < 1 || inner > kMostSize || inner % kGroupInputs != 0) {
    refuse("%s: widths %" PRId64 " and %" PRId64 " are not multiples of %d", op, width, inner, kGroupInputs);
  }
}

}  // namespace

RowMoeProblem prepare(const RoutingAttributes& a, const Format& format, const RowMoeOperands& operands) {
  check(a, format);
  const Checks checks(a.op);
  const int64_t width = operands.x.last();
  RowMoeProblem problem = {};
  problem.tokens = checks.tokens(operands.x, width);
  problem.in = checks.input(operands.x, operands.norm, a.epsilon, width);
  problem.routing = routing_of(a, operands.router, problem.tokens, width);
  problem.router = operands.router.matrix.is_there ? operands.router.matrix.as<float>() : nullptr;
  if (operands.norm.gamma.is_there && problem.router == nullptr) {
    refuse("%s: a norm without a router", a.op);
  }
  const int64_t experts = problem.routing.experts;
  // No attribute says how wide an expert is inside: what the last matrix has of codes does.
  checks.tensor(operands.down.codes, {"down", "codes"}, Kind::kByte);
  const int64_t rows = times(experts, width), inner = times(operands.down.codes.count, 8) / times(rows, format.bits);
  check_widths(a.op, width, inner);
  problem.gate_up = checks.matrix("gate_up", operands.gate_up, format, times(experts, 2, inner), width);
  problem.down = checks.matrix("down", operands.down, format, rows, inner);
  return problem;
}

MoeProblem prepare(const RoutingAttributes& a, const MoeOperands& operands) {
  check(a);
  const Checks checks(a.op);
  const Operand &x = operands.x, &logits = operands.router.logits;
  MoeProblem problem = {};
  problem.width = x.last();
  problem.tokens = checks.tokens(x, problem.width);
  problem.x = x.as<float>();
  problem.routing = routing_of(a, {logits, operands.router.expert_bias, {}}, problem.tokens, problem.width);
  for (int64_t axis = 0; axis < x.rank; ++axis) {
    if (logits.rank != x.rank || (axis + 1 < x.rank && logits.sizes[axis] != x.sizes[axis])) {
      refuse("%s: x and router_logits are of different shapes", a.op);
    }
  }
  checks.ranked(operands.down, "down", Kind::kByte, 4);
  problem.inner = times(operands.down.sizes[2], kGroup);
  check_widths(a.op, problem.width, problem.inner);
  const int64_t experts = problem.routing.experts, groups = problem.width / kGroup, inner = problem.inner / kGroup;
  checks.shaped(operands.gate_up, "gate_up", Kind::kByte, {experts, 2 * inner, groups, kTileBytes});
  checks.shaped(operands.down, "down", Kind::kByte, {experts, groups, inner, kTileBytes});
  problem.gate_up = operands.gate_up.as<uint8_t>();
  problem.down = operands.down.as<uint8_t>();
  return problem;
}

}  // namespace lfm2
