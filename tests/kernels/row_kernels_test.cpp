// The kernels for ONNX Runtime's weights: quantizing bit for bit as the scalar ones do it, products against double
// arithmetic on the same int8 activations. Behind every buffer lies a page that cannot be touched (guarded_buffer.h).

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "c_api.h"
#include "expect.h"
#include "guarded_buffer.h"
#include "row_matrix.h"
#include "target.h"

namespace {

using lfm2::kGroupInputs;
using lfm2::RowActivations;
using lfm2::RowKernels;
using lfm2::RowMatrix;
using lfm2_test::Buffer;

std::mt19937 random_bits(7);

template <typename T>
Lfm2Array array(const Buffer<T>& buffer) {
  return {buffer.data(), static_cast<int64_t>(buffer.size())};
}

void fill_normal(const Buffer<float>& buffer, float mean = 0.0f) {
  std::normal_distribution<float> distribution(mean, 1.0f);
  for (float& value : buffer) {
    value = distribution(random_bits);
  }
}

struct Format {
  int bits;
  int64_t group;
  bool half;
  bool points;

  std::string described() const {
    return std::to_string(bits) + " bits, groups of " + std::to_string(group) + (half ? ", half" : "") +
           (points ? ", zero points" : "");
  }
};

// A random matrix, and what it means.
class Weights {
 public:
  Weights(const Format& format, int64_t rows, int64_t columns)
      : codes_(rows * columns * format.bits / 8),
        scales_(rows * (columns / format.group) * (format.half ? 2 : 4)),
        points_(format.points ? rows * ((columns / format.group + 1) / 2) : 0),
        matrix_{codes_.data(), scales_.data(), points_.or_null(), rows,
                columns,       format.group,   format.bits,       format.half},
        values_(rows * columns) {
    for (uint8_t& byte : codes_) {
      byte = static_cast<uint8_t>(random_bits());
    }
    for (uint8_t& byte : points_) {
      byte = static_cast<uint8_t>(random_bits());
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t group = 0; group < matrix_.groups(); ++group) {
        set_group(row, group);
      }
    }
  }

  const RowMatrix& matrix() const { return matrix_; }
  double value(int64_t row, int64_t column) const { return values_[row * matrix_.columns + column]; }
  Lfm2RowWeights plain() const {
    const int64_t scales = matrix_.rows * matrix_.groups();
    return {array(codes_), {scales_.data(), scales}, {points_.or_null(), static_cast<int64_t>(points_.size())}};
  }

 private:
  // Scales are k/4096 for k in 1024..2047, of either sign: halves and floats hold them exactly.
  void set_group(int64_t row, int64_t group) {
    const uint32_t mantissa = random_bits() % 1024, sign = random_bits() % 2;
    const float scale = (sign ? -1.0f : 1.0f) * static_cast<float>(1024 + mantissa) / 4096;
    const auto half = static_cast<uint16_t>(sign << 15 | 13u << 10 | mantissa);
    const int64_t at = row * matrix_.groups() + group;
    if (matrix_.half_scales) {
      std::memcpy(scales_.data() + at * 2, &half, sizeof half);
    } else {
      std::memcpy(scales_.data() + at * 4, &scale, sizeof scale);
    }
    int point = matrix_.bits == 4 ? 8 : 128;
    if (points_.size() > 0) {
      point = matrix_.points_of(row)[group / 2] >> (group % 2 * 4) & 15;
    }
    for (int64_t column = group * matrix_.group; column < (group + 1) * matrix_.group; ++column) {
      const uint8_t* codes = matrix_.row(row);
      const int code = matrix_.bits == 8 ? codes[column] : codes[column / 2] >> (column % 2 * 4) & 15;
      values_[row * matrix_.columns + column] = (code - point) * static_cast<double>(scale);
    }
  }

  Buffer<uint8_t> codes_;
  Buffer<uint8_t> scales_;
  Buffer<uint8_t> points_;
  RowMatrix matrix_;
  std::vector<double> values_;
};

// Activations in buffers of their own; what lies behind the columns would spoil every sum that it got into.
class Inputs {
 public:
  Inputs(int64_t tokens, int64_t columns, int bits, bool small_groups, bool shifted)
      : padded_((columns + lfm2::kPadding - 1) / lfm2::kPadding * lfm2::kPadding),
        group_(small_groups ? lfm2::kLeastGroup : kGroupInputs),
        codes_(tokens * padded_, 127),
        scales_(tokens * (padded_ / group_), std::numeric_limits<float>::quiet_NaN()),
        sums_(tokens * (padded_ / group_), std::numeric_limits<float>::quiet_NaN()),
        all_{codes_.data(), scales_.data(), sums_.data(), tokens, padded_, padded_ / group_, bits, small_groups, shifted},
        columns_(columns) {}
  Inputs(int64_t tokens, const RowMatrix& w, bool shifted)
      : Inputs(tokens, w.columns, w.bits, w.has_small_groups(), shifted) {}

  const RowActivations& all() const { return all_; }

  double value(int64_t token, int64_t column) const {
    const int64_t place =
        all_.bits == 8 ? column : column / 128 * 128 + column % 2 * 64 + column % 128 / 2;
    const auto flip = static_cast<int8_t>(all_.shifted ? -lfm2::kShift : 0);
    const auto code = static_cast<int8_t>(all_.codes_of(token)[place] ^ flip);
    return code * static_cast<double>(all_.scales_of(token)[column / group_]);
  }

  bool equals(const Inputs& other) const {
    return std::memcmp(codes_.data(), other.codes_.data(), codes_.size()) == 0 &&
           std::memcmp(scales_.data(), other.scales_.data(), scales_.size() * sizeof(float)) == 0 &&
           std::memcmp(sums_.data(), other.sums_.data(), sums_.size() * sizeof(float)) == 0;
  }

  int64_t columns() const { return columns_; }

 private:
  int64_t padded_;
  int64_t group_;
  Buffer<int8_t> codes_;
  Buffer<float> scales_;
  Buffer<float> sums_;
  RowActivations all_;
  int64_t columns_;
};

void quantize(const RowKernels& kernels, const Buffer<float>& x, const Inputs& to) {
  for (int64_t token = 0; token < to.all().tokens; ++token) {
    kernels.quantize(x.data() + token * to.columns(), to.columns(), to.all(), token);
  }
}

// The error of y[token * stride + row], relative to the products' size: their sum may happen to be nearly 0.
double error_of(const Buffer<float>& y, int64_t stride, const Weights& w, const Inputs& x) {
  double error = 0, size = 0;
  for (int64_t token = 0; token < x.all().tokens; ++token) {
    for (int64_t row = 0; row < w.matrix().rows; ++row) {
      double sum = 0;
      for (int64_t column = 0; column < x.columns(); ++column) {
        const double product = w.value(row, column) * x.value(token, column);
        sum += product;
        size += product * product;
      }
      error += (y[token * stride + row] - sum) * (y[token * stride + row] - sum);
    }
  }
  return std::sqrt(error / size);
}

constexpr double kBound = 1.2e-5;  // three times the most that was seen
constexpr float kUntouched = 7.0f;

double worst = 0;

void check_product(const RowKernels& kernels, const Weights& w, const Buffer<float>& x, int64_t tokens, bool block) {
  constexpr int64_t kGap = 3;
  const RowMatrix& matrix = w.matrix();
  const int64_t stride = matrix.rows + kGap;
  const Inputs inputs(tokens, matrix, block && kernels.shifts);
  quantize(kernels, x, inputs);
  const Buffer<float> y((tokens - 1) * stride + matrix.rows, kUntouched);
  if (block) {
    const Buffer<char> scratch(lfm2::block_scratch_bytes(matrix.columns, matrix.has_small_groups()));
    kernels.block(matrix, inputs.all(), y.data(), stride, scratch.data());
  } else {
    kernels.dot(matrix, inputs.all(), y.data(), stride);
  }
  const double error = error_of(y, stride, w, inputs);
  worst = std::max(worst, error);
  const std::string what = std::string(kernels.name) + (block ? " block, " : " dot, ") + std::to_string(tokens) +
                           " tokens, " + std::to_string(matrix.rows) + " x " + std::to_string(matrix.columns);
  expect(error < kBound, what + ": is off by " + std::to_string(error));
  for (size_t i = 0; i < y.size(); ++i) {
    expect(static_cast<int64_t>(i) % stride < matrix.rows || y[i] == kUntouched, what + ": wrote between its rows");
  }
}

void check_products(const RowKernels& kernels, const Format& format, int64_t columns) {
  for (const int64_t tokens : {1, 2, 5, 15, 70}) {
    const Buffer<float> x(tokens * columns);
    fill_normal(x, 0.5f);
    for (const int64_t rows : {1, 3, 17, 32, 37}) {
      if (tokens * rows * columns > 150000) {
        continue;  // qemu is slow
      }
      const Weights w(format, rows, columns);
      check_product(kernels, w, x, tokens, false);
      if (kernels.has_block(w.matrix().has_small_groups()) && rows <= lfm2::kBlockRows) {
        check_product(kernels, w, x, tokens, true);
      }
    }
  }
}

// y [tokens, rows]
void multiply(const RowKernels& kernels, const Weights& w, const Buffer<float>& x, int64_t tokens, bool block,
              const Buffer<float>& y) {
  const RowMatrix& matrix = w.matrix();
  const Inputs inputs(tokens, matrix, block && kernels.shifts);
  quantize(kernels, x, inputs);
  if (block) {
    const Buffer<char> scratch(lfm2::block_scratch_bytes(matrix.columns, matrix.has_small_groups()));
    kernels.block(matrix, inputs.all(), y.data(), matrix.rows, scratch.data());
  } else {
    kernels.dot(matrix, inputs.all(), y.data(), matrix.rows);
  }
}

// A token's results are the same bits alone and among others, in `dot` and in `block`.
void check_alone(const RowKernels& kernels, const Format& format, int64_t columns) {
  constexpr int64_t kTokens = 21, kRows = 9;
  const Weights w(format, kRows, columns);
  const Buffer<float> x(kTokens * columns);
  fill_normal(x, 0.5f);
  const Buffer<float> all(kTokens * kRows), block(kTokens * kRows), alone(kRows);
  multiply(kernels, w, x, kTokens, false, all);
  for (int64_t token = 0; token < kTokens; ++token) {
    const Buffer<float> own(columns);
    std::memcpy(own.data(), x.data() + token * columns, columns * sizeof(float));
    multiply(kernels, w, own, 1, false, alone);
    expect(std::memcmp(alone.data(), all.data() + token * kRows, kRows * sizeof(float)) == 0,
           std::string(kernels.name) + ": a token depends on the others, " + format.described());
  }
  if (kernels.has_block(w.matrix().has_small_groups())) {
    multiply(kernels, w, x, kTokens, true, block);
    expect(std::memcmp(block.data(), all.data(), all.size() * sizeof(float)) == 0,
           std::string(kernels.name) + ": block and dot differ, " + format.described());
  }
}

std::vector<Format> all_formats() {
  std::vector<Format> formats;
  for (const int64_t group : {16, 32, 64, 128, 256}) {
    for (const bool half : {false, true}) {
      formats.push_back({8, group, half, false});
      formats.push_back({4, group, half, false});
      formats.push_back({4, group, half, true});
    }
  }
  return formats;
}

// Codes, scales and sums are the scalar kernels', whatever a value is.
void check_quantizing(const RowKernels& kernels, int bits, bool small_groups, bool shifted) {
  constexpr int64_t kTokens = 3, kColumns = 32 * 23;
  const float special[] = {0.0f, -0.0f, 1e-38f, 1e-31f, 1.5f, -3e38f, std::numeric_limits<float>::infinity(),
                           std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::denorm_min()};
  const Buffer<float> x(kTokens * kColumns), up(2 * kGroupInputs), gate(2 * kGroupInputs);
  fill_normal(x);
  for (const float value : special) {
    for (int i = 0; i < 3; ++i) {
      x[random_bits() % x.size()] = value;
    }
  }
  std::fill_n(x.data() + 64, kGroupInputs, 0.0f);
  std::fill_n(x.data() + 128, kGroupInputs, 2.5f);
  const Inputs got(kTokens, kColumns, bits, small_groups, shifted);
  const Inputs want(kTokens, kColumns, bits, small_groups, shifted);
  quantize(kernels, x, got);
  quantize(lfm2::scalar::kRowKernels, x, want);
  expect(got.equals(want), std::string(kernels.name) + ": quantizes differently, " + std::to_string(bits) + " bits");
  for (const int step : {1, 2}) {
    const int64_t skipped = (2 - step) * kGroupInputs;  // the values end where the buffer does
    for (int64_t group = 0; group < kColumns / kGroupInputs; ++group) {
      fill_normal(gate);
      fill_normal(up);
      gate[gate.size() - 1 - group] *= 100;
      const float* last = gate.data() + skipped;
      // Side by side a pair shares a buffer: the odd floats are those of `up`.
      const float* other = step == 1 ? up.data() + skipped : last + 1;
      kernels.swiglu(last, other, step, got.all(), group, 1);
      lfm2::scalar::kRowKernels.swiglu(last, other, step, want.all(), group, 1);
    }
    expect(got.equals(want), std::string(kernels.name) + ": swiglu differs, step " + std::to_string(step));
  }
}

// The norm of a token, alone and of a sum, is the scalar kernels' to the last bit.
void check_norm(const RowKernels& kernels) {
  constexpr int64_t kTokens = 2;
  for (const int64_t columns : {32, 96, 1024, 1792}) {
    const Buffer<float> x(kTokens * columns), delta(kTokens * columns), gamma(columns), own(columns);
    for (const Buffer<float>* values : {&x, &delta, &gamma, &own}) {
      fill_normal(*values);
    }
    for (const bool is_sum : {false, true}) {
      Buffer<float> sums[] = {Buffer<float>(kTokens * columns), Buffer<float>(kTokens * columns)};
      Buffer<float> norms[] = {Buffer<float>(columns), Buffer<float>(columns)};
      const RowKernels* both[] = {&kernels, &lfm2::scalar::kRowKernels};
      for (int i = 0; i < 2; ++i) {
        std::fill_n(sums[i].data(), sums[i].size(), 7.0f);
        const lfm2::RowInput in = {x.data(), is_sum ? delta.data() : nullptr, gamma.data(),
                                   columns == 96 ? own.data() : nullptr, 1e-5f, is_sum ? sums[i].data() : nullptr};
        both[i]->normalize(in, columns, 1, norms[i].data());
      }
      expect(std::memcmp(norms[0].data(), norms[1].data(), columns * sizeof(float)) == 0 &&
                 std::memcmp(sums[0].data(), sums[1].data(), kTokens * columns * sizeof(float)) == 0,
             std::string(kernels.name) + ": normalizes differently");
      expect(!is_sum || (sums[0][0] == 7.0f && sums[0][columns - 1] == 7.0f), "another token's sum is written");
    }
  }
}

void check_accumulate(const RowKernels& kernels) {
  for (const int64_t count : {1, 7, 16, 32, 45}) {
    const Buffer<float> y(count), got(count), want(count);
    fill_normal(y);
    fill_normal(got);
    std::memcpy(want.data(), got.data(), count * sizeof(float));
    kernels.accumulate(0.3f, y.data(), got.data(), count);
    lfm2::scalar::kRowKernels.accumulate(0.3f, y.data(), want.data(), count);
    expect(std::memcmp(got.data(), want.data(), count * sizeof(float)) == 0,
           std::string(kernels.name) + ": accumulates differently");
  }
}

double difference(const Buffer<float>& got, const Buffer<float>& want) {
  double error = 0, size = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    size += want[i] * want[i];
  }
  return std::sqrt(error / size);
}

constexpr double kRoundedBound = 5e-3;  // where a value between two matrices may go to the next int8 code

bool same_bits(const Buffer<float>& a, const Buffer<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Calls run(kernels, threads, out) for all kernels: they agree, and each with itself on any number of threads.
template <typename Run>
void check_run(const std::string& what, int64_t count, double bound, const Run& run) {
  const Buffer<float> scalar(count, kUntouched);
  expect(run("scalar", 1, array(scalar)) == 0, what + ": failed");
  for (auto name = lfm2::runnable_targets(); *name != nullptr; ++name) {
    const Buffer<float> one(count, kUntouched), many(count, kUntouched);
    expect(run(*name, 1, array(one)) == 0 && run(*name, 4, array(many)) == 0, what + ": failed");
    expect(difference(one, scalar) < bound, what + ": " + *name + " differs from scalar by " +
                                                std::to_string(difference(one, scalar)));
    expect(same_bits(many, one), what + ": " + *name + " differs on threads");
  }
}

void check_runs(const Format& format, int64_t tokens) {
  const int64_t least = std::max<int64_t>(format.group, kGroupInputs), width = least * 2, inner = least * 3;
  const int64_t experts = 3, rows = 77;
  const Weights one(format, rows, width), gate(format, inner, width), up(format, inner, width),
      down(format, width, inner), gate_up_all(format, experts * 2 * inner, width),
      down_all(format, experts * width, inner);
  const Buffer<float> x(tokens * width), logits(tokens * experts), bias(rows), expert_bias(experts);
  fill_normal(x);
  fill_normal(logits);
  fill_normal(bias);
  const Lfm2RowFormat plain = {format.bits, format.half, format.group};
  const std::string what = format.described() + ", " + std::to_string(tokens) + " tokens";
  const Lfm2RowWeights w = one.plain();
  check_run("matrix: " + what, tokens * rows, kBound, [&](const char* kernels, int threads, Lfm2Array out) {
    return lfm2_matmul_nbits(kernels, threads, array(x), &w, &plain, array(bias), tokens, rows, width, out);
  });
  const Lfm2RowWeights w1 = gate.plain(), w3 = up.plain(), w2 = down.plain();
  check_run("feed-forward: " + what, tokens * width, kRoundedBound, [&](const char* kernels, int threads, Lfm2Array out) {
    return lfm2_feed_forward(kernels, threads, array(x), &w1, &w3, &w2, &plain, tokens, width, inner, out);
  });
  const Lfm2RowWeights w13_all = gate_up_all.plain(), w2_all = down_all.plain();
  check_run("experts: " + what, tokens * width, kRoundedBound, [&](const char* kernels, int threads, Lfm2Array out) {
    return lfm2_sparse_moe_nbits(kernels, threads, array(x), array(logits), array(expert_bias), &w13_all, &w2_all,
                                 &plain, tokens, width, experts, 2, 1, 1.5f, out);
  });
}

void test_refusals() {
  const Weights w({4, 32, false, false}, 4, 64);
  const Lfm2RowWeights plain = w.plain();
  const Buffer<float> x(64), out(4);
  const auto result = [&](const char* kernels, int threads, int64_t tokens, int64_t columns, int bits, int64_t group) {
    const Lfm2RowFormat format = {bits, 0, group};
    return lfm2_matmul_nbits(kernels, threads, array(x), &plain, &format, {}, tokens, 4, columns, array(out));
  };
  expect(result("scalar", 1, 1, 64, 4, 32) == 0, "what fits was refused");
  expect(result(nullptr, 1, 1, 64, 4, 32) == 0, "the kernels of a program were refused");
  expect(result("no such kernels", 1, 1, 64, 4, 32) == 1, "unknown kernels were not refused");
  for (const int refused : {result("scalar", 1, -1, 64, 4, 32), result("scalar", 1, 2, 64, 4, 32),
                            result("scalar", 1, 1, 48, 4, 32), result("scalar", 1, 1, 64, 2, 32),
                            result("scalar", 1, 1, 64, 4, 16), result("scalar", 1, 1, 64, 4, 24),
                            result("scalar", 0, 1, 64, 4, 32),
                            result("scalar", 1 << 20, 1, 64, 4, 32)}) {
    expect(refused == 2, "what does not fit was not refused");
  }
  expect(std::string(lfm2_last_fault()) == "lfm2_matmul_nbits: 1048576 threads: 1 to 1024 are possible",
         std::string("the last fault is said to be ") + lfm2_last_fault());
}

}  // namespace

void test_row_kernels(bool brief) {
  for (auto name = lfm2::runnable_targets(); *name != nullptr; ++name) {
    const RowKernels& kernels = lfm2::target_by_name(*name)->rows;
    worst = 0;
    for (const Format& format : all_formats()) {
      for (const int64_t columns : {32, 96, 160, 256, 512, 768, 1344, 1792, 7168}) {
        if (columns % format.group == 0 && (!brief || columns == 96 || columns == 768)) {
          check_products(kernels, format, columns);
          check_alone(kernels, format, std::min<int64_t>(columns, 1792));
        }
      }
    }
    for (const int bits : {4, 8}) {
      for (const bool small_groups : {false, true}) {
        check_quantizing(kernels, bits, small_groups, false);
        if (kernels.shifts) {
          check_quantizing(kernels, bits, small_groups, true);
        }
      }
    }
    check_norm(kernels);
    check_accumulate(kernels);
    std::printf("%-40s off by %.1e at most\n", (std::string("row kernels ") + *name).c_str(), worst);
  }
  for (const Format& format : all_formats()) {
    for (const int64_t tokens : {1, 3, 13}) {
      if (brief && tokens != 3) {
        continue;
      }
      check_runs(format, tokens);
    }
  }
  test_refusals();
}
