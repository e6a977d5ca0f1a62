// Random calls of our operators for ONNX Runtime that fit, to be run as they are or spoilt.

#pragma once

#include <optional>
#include <random>
#include <string>
#include <vector>

#include "fake_runtime.h"

namespace lfm2_test {

class Random {
 public:
  explicit Random(uint64_t seed) : bits_(seed) {}

  int64_t between(int64_t least, int64_t most) {
    return least + static_cast<int64_t>(bits_() % static_cast<uint64_t>(most - least + 1));
  }
  bool one_in(int64_t count) { return between(1, count) == 1; }
  float normal() { return normal_(bits_); }
  uint64_t bits() { return bits_(); }

  template <typename T>
  const T& of(const std::vector<T>& values) {
    return values[static_cast<size_t>(between(0, static_cast<int64_t>(values.size()) - 1))];
  }

 private:
  std::mt19937_64 bits_;
  std::normal_distribution<float> normal_;
};

// One node and one call of it. An input that is not there was left out.
struct Case {
  std::string op;
  OrtKernelInfo info;
  std::vector<std::string> names;
  std::vector<std::optional<OrtValue>> inputs;
  bool in_place = false;  // Attention: the past's buffers are the present's
  bool on_threads = false;
  bool is_constant = false;  // GatedConv: the weight is an initializer

  OrtValue& input(const std::string& name);
  std::string described() const;
};

extern const std::vector<std::string> kOperators;

// A call that fits. `tokens`: how many of x; -1: any number.
Case random_case(const std::string& op, Random& random, int64_t tokens = -1);

struct Result {
  std::string fault;  // empty: it ran
  std::map<size_t, OrtValue> outputs;
};

// A kernel of its own, made and called once. On memory that the case keeps: in place, its past is changed.
Result run(const Case& c);

// One more call, of a kernel that is there.
Result call(const Kernel& kernel, const Case& c);

// The first output of floats of which the operator left something unwritten, or that is not finite; -1: none.
int unwritten_output(const Result& result);

bool same_bits(const Result& a, const Result& b);

}  // namespace lfm2_test
