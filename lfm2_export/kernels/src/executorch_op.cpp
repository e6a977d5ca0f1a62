// The ExecuTorch operator lfm2::moe_ffn.out: has everything checked that a program could get wrong (faults.h), then runs on
// ExecuTorch's thread pool. The weights are read where the runtime has them, which is the program's memory map.

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <cstdlib>
#include <new>
#include <optional>

#include "faults.h"
#include "moe.h"
#include "target.h"

namespace lfm2 {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

constexpr const char* kOp = "lfm2::moe_ffn";

void run_on_pool(const void*, int workers, void (*task)(void*, int), void* context) {
  executorch::extension::parallel_for(0, workers, 1, [task, context](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      task(context, static_cast<int>(worker));
    }
  });
}

Kind kind_of(ScalarType dtype) {
  return dtype == ScalarType::Float ? Kind::kFloat : dtype == ScalarType::Byte ? Kind::kByte : Kind::kOther;
}

Operand operand_of(const Tensor& tensor, const char* name) {
  if (!executorch::runtime::tensor_is_default_dim_order(tensor)) {
    refuse("%s: %s is not contiguous", kOp, name);
  }
  Operand found;
  found.data = tensor.const_data_ptr();
  found.count = static_cast<int64_t>(tensor.numel());
  found.kind = kind_of(tensor.scalar_type());
  found.is_there = true;
  found.rank = static_cast<int64_t>(tensor.dim());
  for (int64_t axis = 0; axis < found.rank && found.rank <= kMostAxes; ++axis) {
    found.sizes[axis] = tensor.size(axis);
  }
  return found;
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

namespace {

// Throws Fault, or std::bad_alloc.
void run_on(KernelRuntimeContext& context, const Tensor& x, const RoutingAttributes& attributes,
            const MoeOperands& operands, Tensor& out) {
  MoeProblem problem = prepare(attributes, operands);
  if (executorch::runtime::resize_tensor(out, x.sizes()) != Error::Ok) {
    refuse("%s: out cannot take the shape of x", kOp);
  }
  check_output(kOp, operand_of(out, "out"), operands.x.count);
  problem.out = out.mutable_data_ptr<float>();
  const Scratch scratch(context, moe_scratch_bytes(problem));
  if (scratch.data() == nullptr) {
    throw std::bad_alloc();
  }
  const int workers = static_cast<int>(executorch::extension::get_thread_count());
  run_moe(problem, best_target().tiles, {workers, run_on_pool, nullptr}, scratch.data());
}

}  // namespace

Tensor& moe_ffn_out(KernelRuntimeContext& context, const Tensor& x, const Tensor& router_logits,
                    const std::optional<Tensor>& expert_bias, const Tensor& gate_up, const Tensor& down, int64_t top_k,
                    bool normalize, double scale, Tensor& out) {
  try {
    const Operand bias = expert_bias.has_value() ? operand_of(*expert_bias, "expert_bias") : Operand();
    const MoeOperands operands = {operand_of(x, "x"),
                                  {operand_of(router_logits, "router_logits"), bias},
                                  operand_of(gate_up, "gate_up"),
                                  operand_of(down, "down")};
    run_on(context, x, {kOp, top_k, normalize, static_cast<float>(scale)}, operands, out);
  } catch (const Fault& fault) {
    ET_LOG(Error, "%s", fault.what());
    context.fail(Error::InvalidArgument);
  } catch (const std::bad_alloc&) {
    ET_LOG(Error, "%s: not enough memory", kOp);
    context.fail(Error::MemoryAllocationFailed);
  }
  return out;
}

}  // namespace lfm2

EXECUTORCH_LIBRARY(lfm2, "moe_ffn.out", lfm2::moe_ffn_out);
