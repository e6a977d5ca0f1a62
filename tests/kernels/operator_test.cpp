// The operator through ExecuTorch's registry, as a program calls it: that it runs, and that it refuses what does not
// fit with an error instead of reading beyond a tensor.

#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/platform/runtime.h>

#include <cmath>
#include <cstdio>
#include <functional>
#include <vector>

namespace {

using executorch::aten::ScalarType;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;

int failures = 0;

struct Call {
  TensorPtr x = executorch::extension::ones({1, 3, 64});
  TensorPtr logits = executorch::extension::ones({1, 3, 4});
  TensorPtr bias = executorch::extension::zeros({4});
  TensorPtr gate_up = executorch::extension::zeros({4, 6, 2, 576}, ScalarType::Byte);
  TensorPtr down = executorch::extension::zeros({4, 2, 3, 576}, ScalarType::Byte);
  int64_t top_k = 2;
  TensorPtr out = executorch::extension::full({1, 3, 64}, 7.0);

  Error run() {
    const auto name = "lfm2::moe_ffn.out";
    const auto function = executorch::runtime::get_op_function_from_registry(name, {});
    if (!function.ok()) {
      return function.error();
    }
    std::vector<EValue> values = {EValue(*x),       EValue(*logits), bias ? EValue(*bias) : EValue(),
                                  EValue(*gate_up), EValue(*down),   EValue(top_k),
                                  EValue(true),     EValue(1.0),     EValue(*out)};
    std::vector<EValue*> stack;
    for (EValue& value : values) {
      stack.push_back(&value);
    }
    stack.push_back(&values.back());
    executorch::runtime::KernelRuntimeContext context;  // no temporary allocator: the heap serves
    (*function)(context, {stack.data(), stack.size()});
    return context.failure_state();
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
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
