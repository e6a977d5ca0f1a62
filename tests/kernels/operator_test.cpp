// The operators through ExecuTorch's registry, as a program calls them: that they run, and that they refuse what does not
// fit with an error instead of reading beyond a tensor.

#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/platform/runtime.h>

#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <vector>

namespace {

using executorch::aten::ScalarType;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;

int failures = 0;

// The last value is the output, which a program hands over twice.
Error call(const char* name, std::vector<EValue> values) {
  const auto function = executorch::runtime::get_op_function_from_registry(name, {});
  if (!function.ok()) {
    return function.error();
  }
  std::vector<EValue*> stack;
  for (EValue& value : values) {
    stack.push_back(&value);
  }
  stack.push_back(&values.back());
  executorch::runtime::KernelRuntimeContext context;  // no temporary allocator: the heap serves
  (*function)(context, {stack.data(), stack.size()});
  return context.failure_state();
}

struct Call {
  TensorPtr x = executorch::extension::ones({1, 3, 64});
  TensorPtr logits = executorch::extension::ones({1, 3, 4});
  TensorPtr bias = executorch::extension::zeros({4});
  TensorPtr gate_up = executorch::extension::zeros({4, 6, 2, 576}, ScalarType::Byte);
  TensorPtr down = executorch::extension::zeros({4, 2, 3, 576}, ScalarType::Byte);
  int64_t top_k = 2;
  double scale = 1.0;
  TensorPtr out = executorch::extension::full({1, 3, 64}, 7.0);

  Error run() {
    return call("lfm2::moe_ffn.out", {EValue(*x), EValue(*logits), bias ? EValue(*bias) : EValue(), EValue(*gate_up),
                                      EValue(*down), EValue(top_k), EValue(true), EValue(scale), EValue(*out)});
  }
};

// What runner/llama_ops.cpp has in the place of ExecuTorch's LLM operators.
struct Attention {
  TensorPtr query = executorch::extension::ones({1, 2, 4, 8});
  TensorPtr key = executorch::extension::ones({1, 6, 2, 8});
  TensorPtr value = executorch::extension::ones({1, 6, 2, 8});
  TensorPtr fresh = executorch::extension::ones({1, 2, 2, 8});
  TensorPtr out = executorch::extension::zeros({1, 2, 4, 8});

  Error update(int64_t start) {
    return call("llama::update_cache.out", {EValue(*fresh), EValue(*key), EValue(start), EValue(*out)});
  }

  Error attend(int64_t start) {
    return call("llama::custom_sdpa.out", {EValue(*query), EValue(*key), EValue(*value), EValue(start), EValue(),
                                           EValue(0.0), EValue(true), EValue(), EValue(*out)});
  }
};

void expect(const char* what, Error want, const std::function<void(Call&)>& change) {
  Call call;
  change(call);
  const Error got = call.run();
  if (got != want) {
    std::printf("FAILED: %s: error 0x%x, not 0x%x\n", what, static_cast<int>(got), static_cast<int>(want));
    ++failures;
  }
}

void expect_attention(const char* what, Error want, Error got) {
  if (got != want) {
    std::printf("FAILED: %s: error 0x%x, not 0x%x\n", what, static_cast<int>(got), static_cast<int>(want));
    ++failures;
  }
}

void test_attention() {
  constexpr int64_t kGreatest = std::numeric_limits<int64_t>::max();
  Attention a;
  for (const int64_t start : {0, 1, 4}) {
    expect_attention("tokens that fit", Error::Ok, a.update(start));
    expect_attention("attention that fits", Error::Ok, a.attend(start));
  }
  for (const int64_t start : {int64_t{-1}, int64_t{5}, kGreatest, kGreatest - 1, std::numeric_limits<int64_t>::min()}) {
    expect_attention("a start beyond the cache", Error::InvalidArgument, a.update(start));
    expect_attention("attention beyond the cache", Error::InvalidArgument, a.attend(start));
  }
  a.out = executorch::extension::zeros({1, 2, 4, 8}, ScalarType::Byte);
  expect_attention("an out of bytes", Error::InvalidArgument, a.attend(0));
}

// Shapes of any kind: refused, or run within their memory, which a sanitizer sees.
void test_any_shapes() {
  std::mt19937 random(1);
  const auto shape = [&random](std::vector<executorch::aten::SizesType> fits) {
    for (auto& size : fits) {
      size = random() % 4 == 0 ? static_cast<int>(random() % 8) : random() % 16 == 0 ? size * 2 : size;
    }
    if (random() % 8 == 0) {
      fits.insert(fits.begin(), random() % 3, 1);
    } else if (random() % 8 == 0) {
      fits.pop_back();
    }
    return fits;
  };
  int done = 0;
  for (int i = 0; i < 3000; ++i) {
    Call c;
    const auto byte = ScalarType::Byte;
    c.x = executorch::extension::ones(random() % 2 != 0 ? shape({1, 3, 64}) : std::vector{1, 3, 64});
    c.logits = executorch::extension::ones(random() % 2 != 0 ? shape({1, 3, 4}) : std::vector{1, 3, 4});
    c.bias = random() % 3 == 0 ? executorch::extension::zeros(shape({4})) : nullptr;
    c.gate_up = executorch::extension::zeros(random() % 3 == 0 ? shape({4, 6, 2, 576}) : std::vector{4, 6, 2, 576}, byte);
    c.down = executorch::extension::zeros(random() % 3 == 0 ? shape({4, 2, 3, 576}) : std::vector{4, 2, 3, 576}, byte);
    c.top_k = random() % 4 == 0 ? static_cast<int64_t>(random()) << (random() % 33) : 2;
    c.out = executorch::extension::full(random() % 4 == 0 ? shape({1, 3, 64}) : std::vector{1, 3, 64}, 7.0);
    done += c.run() == Error::Ok;
  }
  if (done == 0 || done == 3000) {
    std::printf("FAILED: %d of 3000 random calls ran\n", done);
    ++failures;
  }
}

}  // namespace

int main() {
  using executorch::extension::zeros;
  executorch::runtime::runtime_init();
  constexpr Error kRefused = Error::InvalidArgument;
  expect("as it should be", Error::Ok, [](Call&) {});
  expect("without a bias", Error::Ok, [](Call& c) { c.bias = nullptr; });
  expect("zero weights give zeros", Error::Ok, [](Call& c) {
    c.run();
    for (int i = 0; i < 3 * 64; ++i) {
      failures += c.out->const_data_ptr<float>()[i] != 0.0f;
    }
  });
  expect("x of another width", kRefused, [](Call& c) { c.x = zeros({1, 3, 96}); });
  expect("a width that is no multiple of 32", kRefused, [](Call& c) { c.x = zeros({1, 3, 48}); });
  expect("x that is not float", kRefused, [](Call& c) { c.x = zeros({1, 3, 64}, ScalarType::Int); });
  expect("logits of another length", kRefused, [](Call& c) { c.logits = zeros({1, 4, 4}); });
  expect("logits of another rank", kRefused, [](Call& c) { c.logits = zeros({3, 4}); });
  expect("logits of more experts than there are", kRefused, [](Call& c) { c.logits = zeros({1, 3, 5}); });
  expect("a bias of another length", kRefused, [](Call& c) { c.bias = zeros({3}); });
  expect("a bias of another dtype", kRefused, [](Call& c) { c.bias = zeros({4}, ScalarType::Double); });
  expect("weights that are not bytes", kRefused, [](Call& c) { c.down = zeros({4, 2, 3, 576}); });
  expect("tiles of another size", kRefused, [](Call& c) { c.down = zeros({4, 2, 3, 512}, ScalarType::Byte); });
  expect("fewer down blocks", kRefused, [](Call& c) { c.down = zeros({4, 1, 3, 576}, ScalarType::Byte); });
  expect("fewer gate blocks", kRefused, [](Call& c) { c.gate_up = zeros({4, 4, 2, 576}, ScalarType::Byte); });
  expect("weights of another rank", kRefused, [](Call& c) { c.down = zeros({8, 3, 576}, ScalarType::Byte); });
  expect("no expert chosen", kRefused, [](Call& c) { c.top_k = 0; });
  expect("more chosen than there are", kRefused, [](Call& c) { c.top_k = 5; });
  expect("a static out of another shape", kRefused,
         [](Call& c) { c.out = zeros({1, 9, 64}, ScalarType::Float, executorch::aten::TensorShapeDynamism::STATIC); });
  expect("a top_k that wraps", kRefused, [](Call& c) { c.top_k += int64_t{1} << 62; });
  expect("a scale that is no number", kRefused, [](Call& c) { c.scale = std::nan(""); });
  expect("a scale that no float holds", kRefused, [](Call& c) { c.scale = 1e300; });
  expect("an out that is not float", kRefused, [](Call& c) { c.out = zeros({1, 3, 64}, ScalarType::Byte); });
  expect("x of many dimensions", kRefused, [](Call& c) {
    c.x = zeros({1, 1, 1, 1, 1, 1, 1, 3, 64});
    c.logits = zeros({1, 1, 1, 1, 1, 1, 1, 3, 4});
  });
  test_attention();
  test_any_shapes();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
