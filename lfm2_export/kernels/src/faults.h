// Everything that can be wrong with a call of an operator, in one place for the three hosts (ONNX Runtime, ExecuTorch, the
// C interface). A graph comes from a stranger: attributes may be anything, tensors of any shape and type, and what lies in
// them too. A host describes what it has as operands, gets a problem whose every size fits the memory behind it, or a
// Fault that it hands on in its own way. Only the outputs are still missing from the problem: a host makes those then.
//
// `check` sees the attributes alone, where a host has them before the tensors; `prepare` calls it too.

#pragma once

#include <array>
#include <stdexcept>

#include "attention.h"
#include "float_matmul.h"
#include "gated_conv.h"
#include "moe.h"
#include "operand.h"
#include "row_matmul.h"
#include "token_layout.h"

namespace lfm2 {

// What is wrong, in one line that begins with the operator.
class Fault : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] __attribute__((format(printf, 1, 2))) void refuse(const char* format, ...);

// Of the C interface: ONNX Runtime and ExecuTorch know how many threads they have.
void check_threads(const char* op, int64_t threads);

// An output that the host has already, of floats.
void check_output(const char* op, const Operand& out, int64_t count);

// How a matrix is stored (row_matrix.h): bits 4 or 8, groups of 16, 32, 64, 128 or 256 inputs.
struct Format {
  int64_t bits, group;
};

struct MatrixOperands {
  Operand codes, scales, zero_points;
};

// The norm of a product's input, and what is added to it before (RowInput in row_matrix.h). Left out: x as it is.
struct NormOperands {
  Operand delta, gamma, delta_gamma;
};

// MatMulNBits: one matrix. Projections: three of one input.
struct ProductAttributes {
  static constexpr int kMost = 3;
  const char* op;
  Format formats[kMost];
  int64_t columns;
  int count;
  int64_t rows[kMost];
  float epsilon = 0.0f;  // of the norm
};

struct ProductOperands {
  Operand x;
  MatrixOperands w[ProductAttributes::kMost];
  Operand bias;  // of one matrix
  NormOperands norm = {};
};

using MatMulProblems = std::array<MatMulProblem, ProductAttributes::kMost>;

void check(const ProductAttributes& attributes);
MatMulProblems prepare(const ProductAttributes& attributes, const ProductOperands& operands);

// MatMul: by a matrix of floats [inputs, outputs].
FloatMatMulProblem prepare(const Operand& x, const Operand& w);

struct FeedForwardAttributes {
  const char* op;
  int64_t inner;
  Format gate, up, down;
  float epsilon = 0.0f;  // of the norm
};

struct FeedForwardOperands {
  Operand x;
  MatrixOperands gate, up, down;
  NormOperands norm = {};
};

void check(const FeedForwardAttributes& attributes);
FeedForwardProblem prepare(const FeedForwardAttributes& attributes, const FeedForwardOperands& operands);

struct RoutingAttributes {
  const char* op;
  int64_t top_k;
  bool normalize;
  float scale;
  float epsilon = 0.0f;  // of the norm
};

// `matrix` [width, experts] in the place of logits: they are then made from x, or from its norm.
struct RoutingOperands {
  Operand logits, expert_bias, matrix;
};

void check(const RoutingAttributes& attributes);

// SparseMoe: on row_matrix.h.
struct RowMoeOperands {
  Operand x;
  RoutingOperands router;
  MatrixOperands gate_up, down;
  NormOperands norm = {};  // with a router's matrix only: logits were made of what the experts read
};

void check(const RoutingAttributes& attributes, const Format& format);
RowMoeProblem prepare(const RoutingAttributes& attributes, const Format& format, const RowMoeOperands& operands);

// lfm2::moe_ffn: on layout.h.
struct MoeOperands {
  Operand x;
  RoutingOperands router;
  Operand gate_up, down;
};

MoeProblem prepare(const RoutingAttributes& attributes, const MoeOperands& operands);

struct GatedConvOperands {
  Operand projected, weight, bias, state, attended, rows;
};

// The problem's weight is still [width, taps], as the operand has it: see turn_taps.
GatedConvProblem prepare(const GatedConvOperands& operands);

struct TokenLayoutOperands {
  Operand mask, ids;  // of the ids only the shape counts
};

// `taps`: an attribute.
TokenLayoutProblem prepare(int64_t taps, const TokenLayoutOperands& operands);

struct AttentionAttributes {
  const char* op;
  int64_t heads, kv_heads;
  float eps;
  bool is_int8;
  int64_t window;  // 0: none
  int64_t ring;  // 1: the cache is one; 0: it keeps everything
};

struct AttentionOperands {
  Operand q, k, v, q_norm, k_norm, past_key, past_value, last, mask, cos, sin, position_ids;
};

void check(const AttentionAttributes& attributes);
AttentionProblem prepare(const AttentionAttributes& attributes, const AttentionOperands& operands);

}  // namespace lfm2
