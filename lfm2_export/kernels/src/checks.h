// How faults.h's functions look at operands.

#pragma once

#include <cinttypes>
#include <initializer_list>
#include <string>

#include "faults.h"
#include "sizes.h"

namespace lfm2 {

// An operand's, put together only where it is printed.
struct Name {
  Name(const char* whole) : of(nullptr), part(whole) {}  // NOLINT: meant to be implicit
  Name(const char* of, const char* part) : of(of), part(part) {}
  std::string text() const { return of == nullptr ? part : std::string(of) + " " + part; }

  const char* of;
  const char* part;
};

// An operator's operands, one after the other. Everything throws Fault.
class Checks {
 public:
  explicit Checks(const char* op) : op_(op) {}

  // It is there, of this type, its shape says as many elements as there are, and they may be read as that type.
  void tensor(const Operand& operand, const Name& name, Kind kind) const;

  // The same, and so many elements.
  void counted(const Operand& operand, const Name& name, Kind kind, int64_t count) const;

  // The same, or left out.
  void optional(const Operand& operand, const Name& name, Kind kind, int64_t count) const;

  // The same, and exactly this shape.
  void shaped(const Operand& operand, const Name& name, Kind kind, std::initializer_list<int64_t> sizes) const;

  void ranked(const Operand& operand, const Name& name, Kind kind, int64_t rank) const;

  // Of an attribute, or of what follows from several sizes.
  void size(const char* name, int64_t value) const;

  // `prefix` is that of the attributes' names.
  void format(const char* prefix, const Format& format) const;

  void epsilon(float value) const;

  // x [tokens, width] and its norm, without room for the sum.
  RowInput input(const Operand& x, const NormOperands& norm, float epsilon, int64_t width) const;

  // How many rows x [..., width] has.
  int64_t tokens(const Operand& x, int64_t width) const;

  RowMatrix matrix(const char* name, const MatrixOperands& operands, const Format& format, int64_t rows,
                   int64_t columns) const;

 private:
  const char* op_;
};

}  // namespace lfm2
