#include "checks.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <iterator>

namespace lfm2 {
namespace {

constexpr int64_t kMostThreads = 1024;

struct KindFacts {
  const char* name;
  int64_t bytes;
};

KindFacts facts_of(Kind kind) {
  switch (kind) {
    case Kind::kFloat: return {"float", 4};
    case Kind::kHalf: return {"float16", 2};
    case Kind::kByte: return {"uint8", 1};
    case Kind::kInt32: return {"int32", 4};
    case Kind::kInt64: return {"int64", 8};
    case Kind::kOther: break;
  }
  return {"another", 1};
}

std::string listed(const int64_t* sizes, int64_t count) {
  std::string text = "[";
  for (int64_t i = 0; i < count; ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  }
  return text + "]";
}

}  // namespace

void refuse(const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Fault(text);
}

void check_threads(const char* op, int64_t threads) {
  if (threads < 1 || threads > kMostThreads) {
    refuse("%s: %" PRId64 " threads: 1 to %" PRId64 " are possible", op, threads, kMostThreads);
  }
}

void check_output(const char* op, const Operand& out, int64_t count) {
  Checks(op).counted(out, "out", Kind::kFloat, count);
}

void Checks::tensor(const Operand& operand, const Name& name, Kind kind) const {
  if (!operand.is_there) {
    refuse("%s: %s is missing", op_, name.text().c_str());
  }
  if (operand.kind != kind) {
    refuse("%s: %s is of type %s, not %s", op_, name.text().c_str(), facts_of(operand.kind).name, facts_of(kind).name);
  }
  if (operand.rank < 0 || operand.rank > kMostAxes) {
    refuse("%s: %s has %" PRId64 " dimensions, more than %d", op_, name.text().c_str(), operand.rank, kMostAxes);
  }
  for (int64_t axis = 0; axis < operand.rank; ++axis) {
    if (operand.sizes[axis] < 0 || operand.sizes[axis] > kMostSize) {
      refuse("%s: %s has a dimension of %" PRId64 ": 0 to %" PRId64 " are possible", op_, name.text().c_str(),
             operand.sizes[axis], kMostSize);
    }
  }
  const int64_t elements = operand.elements();
  if (elements != operand.count || times(elements, facts_of(kind).bytes) == kTooMany) {
    refuse("%s: %s has %" PRId64 " elements, not %" PRId64, op_, name.text().c_str(), operand.count, elements);
  }
  if (elements > 0 && operand.data == nullptr) {
    refuse("%s: %s has no memory", op_, name.text().c_str());
  }
  if (!operand.is_aligned(facts_of(kind).bytes)) {
    refuse("%s: %s does not begin at a multiple of %" PRId64 " bytes", op_, name.text().c_str(), facts_of(kind).bytes);
  }
}

void Checks::counted(const Operand& operand, const Name& name, Kind kind, int64_t count) const {
  tensor(operand, name, kind);
  if (operand.count != count) {
    refuse("%s: %s has %" PRId64 " elements, not %" PRId64, op_, name.text().c_str(), operand.count, count);
  }
}

void Checks::optional(const Operand& operand, const Name& name, Kind kind, int64_t count) const {
  if (operand.is_there) {
    counted(operand, name, kind, count);
  }
}

void Checks::ranked(const Operand& operand, const Name& name, Kind kind, int64_t rank) const {
  tensor(operand, name, kind);
  if (operand.rank != rank) {
    refuse("%s: %s has %" PRId64 " dimensions, not %" PRId64, op_, name.text().c_str(), operand.rank, rank);
  }
}

void Checks::shaped(const Operand& operand, const Name& name, Kind kind, std::initializer_list<int64_t> sizes) const {
  const auto rank = static_cast<int64_t>(sizes.size());
  ranked(operand, name, kind, rank);
  if (!std::equal(sizes.begin(), sizes.end(), operand.sizes)) {
    refuse("%s: %s is %s, not %s", op_, name.text().c_str(), listed(operand.sizes, rank).c_str(),
           listed(sizes.begin(), rank).c_str());
  }
}

void Checks::size(const char* name, int64_t value) const {
  if (value < 1 || value > kMostSize) {
    refuse("%s: %s is %" PRId64 ": 1 to %" PRId64 " are possible", op_, name, value, kMostSize);
  }
}

void Checks::format(const char* prefix, const Format& format) const {
  if (format.bits != 4 && format.bits != 8) {
    refuse("%s: %sbits %" PRId64 ": 4 and 8 are known", op_, prefix, format.bits);
  }
  constexpr int64_t kKnown[] = {kLeastGroup, 32, 64, 128, 256};
  if (std::find(std::begin(kKnown), std::end(kKnown), format.group) == std::end(kKnown)) {
    refuse("%s: %sblock_size %" PRId64 ": 16, 32, 64, 128 and 256 are known", op_, prefix, format.group);
  }
}

void Checks::epsilon(float value) const {
  if (!std::isfinite(value) || value < 0.0f) {
    refuse("%s: epsilon is negative or not finite", op_);
  }
}

RowInput Checks::input(const Operand& x, const NormOperands& norm, float epsilon, int64_t width) const {
  if (norm.delta.is_there && !norm.gamma.is_there) {
    refuse("%s: delta without the weights of a norm", op_);
  }
  if (norm.delta_gamma.is_there && !norm.delta.is_there) {
    refuse("%s: delta_gamma without delta", op_);
  }
  optional(norm.gamma, "gamma", Kind::kFloat, width);
  optional(norm.delta, "delta", Kind::kFloat, x.count);
  optional(norm.delta_gamma, "delta_gamma", Kind::kFloat, width);
  const auto floats = [](const Operand& o) { return o.is_there ? o.as<float>() : nullptr; };
  return {x.as<float>(), floats(norm.delta), floats(norm.gamma), floats(norm.delta_gamma), epsilon, nullptr};
}

int64_t Checks::tokens(const Operand& x, int64_t width) const {
  tensor(x, "x", Kind::kFloat);
  if (x.last() != width) {
    refuse("%s: x has %" PRId64 " columns, not %" PRId64, op_, x.last(), width);
  }
  size("width", width);
  const int64_t tokens = x.count / width;
  if (tokens > kMostSize) {
    refuse("%s: %" PRId64 " tokens, more than %" PRId64, op_, tokens, kMostSize);
  }
  return tokens;
}

RowMatrix Checks::matrix(const char* name, const MatrixOperands& operands, const Format& format, int64_t rows,
                         int64_t columns) const {
  const Operand &codes = operands.codes, &scales = operands.scales, &points = operands.zero_points;
  if (rows < 1 || columns < 1 || columns > kMostSize || columns % format.group != 0) {
    refuse("%s: %s: %" PRId64 " x %" PRId64 " does not fit groups of %" PRId64, op_, name, rows, columns, format.group);
  }
  if (columns % kGroupInputs != 0) {  // of groups of 16 there are pairs
    refuse("%s: %s: %" PRId64 " columns are not a multiple of %d", op_, name, columns, kGroupInputs);
  }
  RowMatrix w = {};
  w.rows = rows;
  w.columns = columns;
  w.group = format.group;
  w.bits = static_cast<int>(format.bits);
  w.half_scales = scales.kind == Kind::kHalf;
  counted(codes, {name, "codes"}, Kind::kByte, times(rows, w.row_bytes()));
  if (scales.is_there && scales.kind != Kind::kFloat && scales.kind != Kind::kHalf) {
    refuse("%s: %s scales are neither float nor float16", op_, name);
  }
  counted(scales, {name, "scales"}, w.half_scales ? Kind::kHalf : Kind::kFloat, times(rows, w.groups()));
  if (points.is_there && format.bits != 4) {
    refuse("%s: %s: zero points are known of 4-bit codes only", op_, name);
  }
  optional(points, {name, "zero points"}, Kind::kByte, times(rows, w.point_bytes()));
  w.codes = codes.as<uint8_t>();
  w.scales = scales.data;
  w.zero_points = points.is_there ? points.as<uint8_t>() : nullptr;
  return w;
}

}  // namespace lfm2
