// The ExecuTorch operator lfm2::moe_ffn.out: checks everything that a program could get wrong, then runs on
// ExecuTorch's thread pool. The weights are read where the runtime has them, which is the program's memory map.

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <cinttypes>
#include <limits>
#include <optional>

#include "layout.h"
#include "moe.h"

namespace lfm2 {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

void run_on_pool(const void*, int workers, void (*task)(void*, int), void* context) {
  executorch::extension::parallel_for(0, workers, 1, [task, context](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      task(context, static_cast<int>(worker));
    }
  });
}

bool is_plain(const Tensor& tensor, const char* name, ScalarType dtype) {
  ET_CHECK_OR_RETURN_FALSE(tensor.scalar_type() == dtype, "lfm2::moe_ffn: %s has dtype %hhd, not %hhd", name,
                           static_cast<int8_t>(tensor.scalar_type()), static_cast<int8_t>(dtype));
  ET_CHECK_OR_RETURN_FALSE(executorch::runtime::tensor_is_default_dim_order(tensor),
                           "lfm2::moe_ffn: %s is not contiguous", name);
  return true;
}

bool has_packed_shape(const Tensor& packed, const char* name, int64_t experts, int64_t blocks, int64_t groups) {
  ET_CHECK_OR_RETURN_FALSE(packed.dim() == 4 && packed.size(0) == experts && packed.size(1) == blocks &&
                               packed.size(2) == groups && packed.size(3) == kTileBytes,
                           "lfm2::moe_ffn: %s is not uint8 [%" PRId64 ", %" PRId64 ", %" PRId64 ", %d]", name, experts,
                           blocks, groups, kTileBytes);
  return true;
}

// The whole of what can be wrong with the arguments, so that the kernels need not look.
bool are_usable(const Tensor& x, const Tensor& logits, const std::optional<Tensor>& bias, const Tensor& gate_up,
                const Tensor& down, int64_t top_k, const Tensor& out) {
  if (!is_plain(x, "x", ScalarType::Float) || !is_plain(logits, "router_logits", ScalarType::Float) ||
      !is_plain(out, "out", ScalarType::Float) || !is_plain(gate_up, "gate_up", ScalarType::Byte) ||
      !is_plain(down, "down", ScalarType::Byte) ||
      (bias.has_value() && !is_plain(*bias, "expert_bias", ScalarType::Float))) {
    return false;
  }
  ET_CHECK_OR_RETURN_FALSE(x.dim() >= 1 && logits.dim() == x.dim(),
                           "lfm2::moe_ffn: x has %zd dimensions, router_logits %zd", static_cast<ssize_t>(x.dim()),
                           static_cast<ssize_t>(logits.dim()));
  for (ssize_t i = 0; i + 1 < static_cast<ssize_t>(x.dim()); ++i) {
    ET_CHECK_OR_RETURN_FALSE(x.size(i) == logits.size(i), "lfm2::moe_ffn: x and router_logits differ in dimension %zd",
                             i);
  }
  const int64_t width = x.size(x.dim() - 1);
  const int64_t experts = logits.size(logits.dim() - 1);
  ET_CHECK_OR_RETURN_FALSE(width > 0 && width % kGroup == 0, "lfm2::moe_ffn: width %" PRId64 " is not a multiple of %d",
                           width, kGroup);
  ET_CHECK_OR_RETURN_FALSE(top_k >= 1 && top_k <= experts, "lfm2::moe_ffn: top_k %" PRId64 " of %" PRId64 " experts",
                           top_k, experts);
  ET_CHECK_OR_RETURN_FALSE(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == experts),
                           "lfm2::moe_ffn: expert_bias is not [%" PRId64 "]", experts);
  const int64_t inner_blocks = down.dim() == 4 ? down.size(2) : 0;
  ET_CHECK_OR_RETURN_FALSE(inner_blocks > 0, "lfm2::moe_ffn: down has no inner groups");
  return has_packed_shape(gate_up, "gate_up", experts, 2 * inner_blocks, width / kGroup) &&
         has_packed_shape(down, "down", experts, width / kGroup, inner_blocks);
}

// Scratch memory of the runtime's temporary allocator, or where the host gave none, of the heap.
class Scratch {
 public:
  Scratch(KernelRuntimeContext& context, size_t bytes) {
    const auto lent = context.allocate_temp(bytes, 64);
    data_ = lent.ok() ? lent.get() : owned_ = std::aligned_alloc(64, bytes);
  }
  ~Scratch() { std::free(owned_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* data() const { return data_; }

 private:
  void* data_;
  void* owned_ = nullptr;
};

}  // namespace

Tensor& moe_ffn_out(KernelRuntimeContext& context, const Tensor& x, const Tensor& router_logits,
                    const std::optional<Tensor>& expert_bias, const Tensor& gate_up, const Tensor& down, int64_t top_k,
                    bool normalize, double scale, Tensor& out) {
  ET_KERNEL_CHECK(context, are_usable(x, router_logits, expert_bias, gate_up, down, top_k, out), InvalidArgument, out);
  ET_KERNEL_CHECK_MSG(context, executorch::runtime::resize_tensor(out, x.sizes()) == Error::Ok, InvalidArgument, out,
                      "lfm2::moe_ffn: out cannot take the shape of x");
  const int64_t width = x.size(x.dim() - 1);
  const int64_t experts = router_logits.size(router_logits.dim() - 1);
  const MoeProblem problem = {
      .x = x.const_data_ptr<float>(),
      .routing = {router_logits.const_data_ptr<float>(),
                  expert_bias.has_value() ? expert_bias->const_data_ptr<float>() : nullptr, experts, top_k, normalize,
                  static_cast<float>(scale)},
      .gate_up = gate_up.const_data_ptr<uint8_t>(),
      .down = down.const_data_ptr<uint8_t>(),
      .tokens = static_cast<int64_t>(x.numel()) / width,
      .width = width,
      .inner = down.size(2) * kGroup,
      .out = out.mutable_data_ptr<float>(),
  };
  const Scratch scratch(context, moe_scratch_bytes(problem));
  ET_KERNEL_CHECK_MSG(context, scratch.data() != nullptr, MemoryAllocationFailed, out,
                      "lfm2::moe_ffn: no memory for %zu bytes", moe_scratch_bytes(problem));
  const int workers = static_cast<int>(executorch::extension::get_thread_count());
  run_moe(problem, best_kernels(), {workers, run_on_pool, nullptr}, scratch.data());
  return out;
}

}  // namespace lfm2

EXECUTORCH_LIBRARY(lfm2, "moe_ffn.out", lfm2::moe_ffn_out);
