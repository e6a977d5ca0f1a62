// Our operators for ONNX Runtime in a runtime of the test's own (fake_runtime.h): what fits runs the same way however often
// and on however many threads, and each kind of fault is refused in words.

#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <thread>

#include "expect.h"
#include "faults.h"
#include "operator_cases.h"
#include "sizes.h"
#include "work.h"

namespace {

namespace ort = lfm2::ort;
using lfm2_test::Case;
using lfm2_test::Kernel;
using lfm2_test::Random;
using lfm2_test::Result;

// Prompts around those at which work is cut: 8 tokens, 32 rows; at exactly 32 a wrapped size once fitted.
const std::vector<int64_t> kLengths = {1, 8, 9, 31, 32, 33, 64};

bool contains(const std::string& text, const std::string& words) {
  return text.find(words) != std::string::npos;
}

void test_sizes() {
  using lfm2::kTooMany;
  constexpr int64_t kBig = 1ll << 62;
  expect(lfm2::times(3, 5) == 15 && lfm2::plus(3, 5) == 8 && lfm2::round_up(65, 64) == 128, "sizes are counted wrong");
  expect(lfm2::times(kBig, 2) == kTooMany && lfm2::times(kBig, 32) == kTooMany, "a product wraps");
  expect(lfm2::times(kBig, kBig, 1) == kTooMany && lfm2::times(2, kBig, kBig) == kTooMany, "a product of three wraps");
  expect(lfm2::times(-1, 5) == kTooMany && lfm2::plus(-1, 5) == kTooMany, "a negative size counts");
  expect(lfm2::times(0, kBig) == 0 && lfm2::times(kBig, kBig, 0) == 0, "nothing is something");
  expect(lfm2::plus(kTooMany, 1) == kTooMany && lfm2::plus(kBig, kBig) == kTooMany, "a sum wraps");
  expect(lfm2::round_up(kTooMany - 3, 64) == kTooMany, "rounding up wraps");
}

void test_scratch() {
  const auto throws = [](int64_t first, int64_t second) {
    try {
      lfm2::Arena arena(nullptr);
      arena.take<float>(first);
      arena.take<float>(second);
    } catch (const std::bad_alloc&) {
      return true;
    }
    return false;
  };
  expect(!throws(10, 1ll << 40), "memory that could be is refused");
  expect(throws(1ll << 62, 1) && throws(1, 1ll << 61) && throws(1ll << 60, 1ll << 60), "scratch memory wraps");
  expect(throws(-1, 1), "a negative count of scratch memory is taken");
}

// Twice, and on other threads: the same bits.
void test_what_fits() {
  Random random(1);
  for (const std::string& op : lfm2_test::kOperators) {
    for (int i = 0; i < 60; ++i) {
      Case c = lfm2_test::random_case(op, random);
      const Result first = lfm2_test::run(c);
      expect(first.fault.empty(), "what fits was refused: " + first.fault + "\n" + c.described());
      expect(lfm2_test::unwritten_output(first) < 0, "an output is not whole\n" + c.described());
      c.on_threads = !c.on_threads;
      expect(lfm2_test::same_bits(lfm2_test::run(c), first), "differs from call to call\n" + c.described());
    }
  }
}

// Raised by what makes some product wrap to the size that is there.
void test_attributes_that_wrap() {
  Random random(2);
  for (const std::string& op : lfm2_test::kOperators) {
    for (const int64_t length : kLengths) {
      const Case fits = lfm2_test::random_case(op, random, length);
      for (const auto& [name, value] : fits.info.integers) {
        for (int bit = name == "normalize" ? 64 : 31; bit < 64; ++bit) {
          Case c = fits;
          c.info.integers[name] = static_cast<int64_t>(static_cast<uint64_t>(value) + (1ull << bit));
          const std::string fault = lfm2_test::run(c).fault;
          expect(contains(fault, op + ": "), name + " raised by 2^" + std::to_string(bit) + ": '" + fault + "'\n" + c.described());
        }
      }
    }
  }
}

void test_floats_that_are_none() {
  Random random(3);
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  for (const std::string op : {"Attention", "AttentionInt8", "SparseMoe"}) {
    Case c = lfm2_test::random_case(op, random);
    for (const float value : {nan, infinity, -infinity}) {
      c.info.floats.begin()->second = value;
      expect(contains(lfm2_test::run(c).fault, "finite"), op + " takes what is not finite");
    }
  }
  Case c = lfm2_test::random_case("Attention", random);
  c.info.floats["epsilon"] = -1e-5f;
  expect(contains(lfm2_test::run(c).fault, "Attention: epsilon is negative"), "a negative epsilon is taken");
}

// Every input missing, and every output, of every operator.
void test_what_is_missing() {
  Random random(4);
  for (const std::string& op : lfm2_test::kOperators) {
    const Case fits = lfm2_test::random_case(op, random, 5);
    for (size_t i = 0; i < fits.inputs.size(); ++i) {
      const std::string& name = fits.names[i];
      const bool is_norm = name == "gamma", has_delta = is_norm && fits.inputs[i - 1].has_value();
      const bool has_norms = name == "delta" && i + 2 < fits.inputs.size() && fits.inputs[i + 2].has_value();
      const bool is_optional = contains(name, "points") || name == "bias" || name == "delta_gamma" ||
                               !fits.inputs[i].has_value() || (is_norm && !has_delta) || (name == "delta" && !has_norms);
      const char* words = is_norm     ? "delta without the weights of a norm"
                          : has_norms ? "delta_gamma without delta"
                                      : "is missing";
      Case c = fits;
      c.inputs[i].reset();
      const std::string fault = lfm2_test::run(c).fault;
      expect(is_optional ? fault.empty() : contains(fault, words), op + " without " + name + ": '" + fault + "'");
    }
    const Kernel kernel(op, fits.info);
    OrtKernelContext context;
    for (const auto& value : fits.inputs) {
      context.inputs.push_back(value.has_value() ? &*value : nullptr);
    }
    context.missing[0] = true;
    expect(contains(kernel.run(context), "output 0 is missing"), op + " without its output");
  }
}

// Tensors in a file may begin anywhere.
void test_what_is_not_aligned() {
  Random random(5);
  for (const std::string& op : lfm2_test::kOperators) {
    const Case fits = lfm2_test::random_case(op, random, 5);
    for (size_t i = 0; i < fits.inputs.size(); ++i) {
      if (!fits.inputs[i].has_value() || fits.inputs[i]->type == ort::kUint8 ||
          lfm2_test::elements_of(fits.inputs[i]->shape) == 0) {
        continue;
      }
      Case c = fits;
      c.is_constant = true;
      const auto whole = lfm2_test::memory_of(
          1 + lfm2_test::elements_of(c.inputs[i]->shape) * lfm2_test::element_bytes(c.inputs[i]->type), false);
      c.inputs[i]->memory = {whole, static_cast<char*>(whole.get()) + 1};
      const std::string fault = lfm2_test::run(c).fault;
      expect(contains(fault, "does not begin at a multiple"), op + ": " + fits.names[i] + ": '" + fault + "'");
    }
  }
}

// A convolution of one row and one tap's worth of state, whose output is easily known.
Case plain_conv(int64_t width, int64_t taps, const std::shared_ptr<void>& weight) {
  Case c;
  c.op = "GatedConv";
  c.names = {"projected", "weight", "bias", "state", "attended", "rows"};
  const auto ones = [](std::vector<int64_t> shape) {
    return lfm2_test::tensor_of(ort::kFloat, shape,
                                std::vector<float>(static_cast<size_t>(lfm2_test::elements_of(shape)), 1.0f));
  };
  std::vector<int64_t> rows(static_cast<size_t>(taps - 1));
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i] = static_cast<int64_t>(i) + 1;
  }
  c.inputs = {ones({1, 1, 3 * width}), OrtValue{ort::kFloat, {width, 1, taps}, weight}, std::nullopt,
              ones({1, taps - 1, width}), ones({1, 1}), lfm2_test::tensor_of(ort::kInt64, {1, taps - 1}, rows)};
  return c;
}

void expect_sums(const Case& c, const Result& result, const std::string& what) {
  const OrtValue& weight = *c.inputs[1];
  const int64_t width = weight.shape[0], taps = weight.shape[2];
  expect(result.fault.empty(), what + ": " + result.fault);
  for (int64_t i = 0; result.fault.empty() && i < width; ++i) {
    float sum = 0;
    for (int64_t tap = 0; tap < taps; ++tap) {
      sum += weight.as<float>()[i * taps + tap];
    }
    expect(std::fabs(result.outputs.at(0).as<float>()[i] - sum) < 1e-3f, what + ": wrong at " + std::to_string(i));
  }
}

void fill(const std::shared_ptr<void>& memory, int64_t count, float first) {
  for (int64_t i = 0; i < count; ++i) {
    static_cast<float*>(memory.get())[i] = first + static_cast<float>(i) / 16;
  }
}

// An address says nothing: the same one may hold another shape, or other numbers, the next time.
void test_one_buffer_under_two_shapes() {
  const auto weight = lfm2_test::memory_of(96 * 4, true);
  fill(weight, 96, 1.0f);
  const Kernel kernel("GatedConv", {});
  for (const auto& [width, taps] : std::vector<std::pair<int64_t, int64_t>>{{8, 2}, {48, 2}, {24, 4}, {32, 3}, {3, 32}}) {
    const Case c = plain_conv(width, taps, weight);
    expect_sums(c, lfm2_test::call(kernel, c), "one buffer as " + std::to_string(width) + " x " + std::to_string(taps));
  }
  fill(weight, 96, -40.0f);
  const Case c = plain_conv(32, 3, weight);
  expect_sums(c, lfm2_test::call(kernel, c), "a buffer filled anew");
}

void test_constant_weights() {
  const auto weight = lfm2_test::memory_of(96 * 4, true), other = lfm2_test::memory_of(96 * 4, true);
  fill(weight, 96, 1.0f);
  fill(other, 96, 7.0f);
  const Case first = plain_conv(32, 3, weight), second = plain_conv(32, 3, other);
  const Kernel a("GatedConv", {{}, {}, {{1, &*first.inputs[1]}}}), b("GatedConv", {{}, {}, {{1, &*second.inputs[1]}}});
  for (int i = 0; i < 2; ++i) {
    expect_sums(first, lfm2_test::call(a, first), "a session's own weight");
    expect_sums(second, lfm2_test::call(b, second), "another session's weight");
  }
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{96}, {3, 32}, {1, 96}, {32, 3}}) {
    Case c = plain_conv(32, 3, weight);
    c.inputs[1]->shape = shape;  // any shape of so many elements was always taken
    c.is_constant = true;
    const Result result = lfm2_test::run(c);
    expect(lfm2_test::same_bits(result, lfm2_test::run(first)), "a constant weight of another shape: " + result.fault);
  }
  Case c = plain_conv(32, 3, weight);
  c.inputs[1]->shape = {0, 5};
  c.is_constant = true;
  expect(contains(lfm2_test::run(c).fault, "weight has 0 elements, not 96"), "a constant without elements is taken");
}

// Two threads that run one session.
void test_a_kernel_on_two_threads() {
  Random random(6);
  for (const std::string& op : lfm2_test::kOperators) {
    std::vector<Case> cases;
    Case first = lfm2_test::random_case(op, random, 9);
    first.in_place = first.is_constant = first.on_threads = false;
    const Kernel kernel(op, first.info);
    const Result want = lfm2_test::call(kernel, first);
    std::atomic<int> wrong = 0;
    std::vector<std::thread> threads;
    for (int thread = 0; thread < 2; ++thread) {
      threads.emplace_back([&] {
        for (int i = 0; i < 30; ++i) {
          wrong += !lfm2_test::same_bits(lfm2_test::call(kernel, first), want);
        }
      });
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
    expect(wrong == 0, op + ": wrong on two threads");
  }
}

void test_two_weights_on_two_threads() {
  const Kernel kernel("GatedConv", {});
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 2; ++thread) {
    threads.emplace_back([&, thread] {
      const auto weight = lfm2_test::memory_of(96 * 4, true);
      const Case c = thread == 0 ? plain_conv(32, 3, weight) : plain_conv(24, 4, weight);
      for (int i = 0; i < 200; ++i) {
        fill(weight, 96, static_cast<float>(i % 7));
        float sum = 0;
        for (int64_t tap = 0; tap < c.inputs[1]->shape[2]; ++tap) {
          sum += static_cast<float*>(weight.get())[tap];
        }
        const Result result = lfm2_test::call(kernel, c);
        wrong += !result.fault.empty() || std::fabs(result.outputs.at(0).as<float>()[0] - sum) > 1e-3f;
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  expect(wrong == 0, "GatedConv mixes up two threads' weights");
}

void test_values_that_lead_astray() {
  Random random(7);
  for (const int64_t value : {int64_t{-1}, int64_t{1} << 40, std::numeric_limits<int64_t>::min()}) {
    Case conv = lfm2_test::random_case("GatedConv", random, 6);
    while (lfm2_test::elements_of(conv.input("rows").shape) == 0) {
      conv = lfm2_test::random_case("GatedConv", random, 6);
    }
    conv.input("rows").as<int64_t>()[0] = value;
    expect(contains(lfm2_test::run(conv).fault, "is not there"), "a row of the window that is not there is taken");
    Case attention = lfm2_test::random_case("Attention", random, 6);
    attention.input("position_ids").as<int64_t>()[0] = value;
    expect(lfm2_test::run(attention).fault.empty(), "a position that is not in the table is refused");
  }
  for (const int32_t value : {-1, 1000, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()}) {
    Case attention = lfm2_test::random_case("AttentionInt8", random, 6);
    attention.input("seqlens_k").as<int32_t>()[0] = value;
    expect(contains(lfm2_test::run(attention).fault, "seqlens_k"), "a last position that is not there is taken");
  }
}

// Positions that neither the past nor this call's tokens fill hold whatever the memory held before.
void test_a_mask_beyond_the_cache() {
  Random random(8);
  Case c = lfm2_test::random_case("Attention", random, 2);
  const int64_t batch = c.input("attention_mask").shape[0], past = c.input("past_key").shape[2];
  c.in_place = false;
  c.input("attention_mask") = lfm2_test::tensor_of(ort::kInt64, {batch, past + 3});
  expect(contains(lfm2_test::run(c).fault, "2 tokens behind " + std::to_string(past) + " positions, but a mask of " +
                                               std::to_string(past + 3)),
         "positions that nothing fills may be seen");
}

// A ring of a size that steps, or the window, do not fit.
void test_rings_that_do_not_fit() {
  Random random(9);
  for (const std::string op : {"SlidingAttention", "SlidingAttentionInt8"}) {
    Case c = lfm2_test::random_case(op, random, 2);
    while (c.info.integers["ring"] == 0) {
      c = lfm2_test::random_case(op, random, 2);
    }
    c.in_place = false;
    const int64_t size = c.input("past_key").shape[2];
    c.info.integers["window"] = size;
    expect(lfm2_test::run(c).fault.empty(), "a window as long as the ring is refused");
    c.info.integers["window"] = size + 1;
    expect(contains(lfm2_test::run(c).fault, "a ring of " + std::to_string(size) + " positions"),
           "a ring below the window is taken");
    c.info.integers["window"] = 1;
    auto shape = c.input("past_key").shape;
    shape[2] -= 1;
    for (const std::string name : {"past_key", "past_value"}) {
      c.input(name) = lfm2_test::tensor_of(op == "SlidingAttention" ? ort::kFloat : ort::kUint8, shape);
    }
    expect(contains(lfm2_test::run(c).fault, "is no multiple of 64"), "a ring of parts of steps is taken");
  }
}

}  // namespace

int main() {
  test_sizes();
  test_scratch();
  test_what_fits();
  test_attributes_that_wrap();
  test_floats_that_are_none();
  test_what_is_missing();
  test_what_is_not_aligned();
  test_one_buffer_under_two_shapes();
  test_constant_weights();
  test_a_kernel_on_two_threads();
  test_two_weights_on_two_threads();
  test_values_that_lead_astray();
  test_a_mask_beyond_the_cache();
  test_rings_that_do_not_fit();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
