// What an operator needs to be one for ONNX Runtime: its inputs and outputs, the session's threads, faults as statuses, and
// the description that a session registers.
//
// An operator is a class with kName, kInputs and kOutputs (element types), kOptionalInputs (bits; kOptionalOutputs, where
// there are some), a constructor from
// (OrtApi, OrtKernelInfo) and compute(Context) const: threads may run one session at once, so a kernel that exists does
// not change.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "faults.h"
#include "onnxruntime_abi.h"
#include "work.h"

namespace lfm2 {
namespace {

class OwnStatus : public std::exception {
 public:
  explicit OwnStatus(OrtStatus* status) : status(status) {}
  OrtStatus* status;
};

inline void check(OrtStatus* status) {
  if (status != nullptr) {
    throw OwnStatus(status);
  }
}

// Turns what `body` throws into a status: no exception may cross the C interface.
template <typename Body>
OrtStatus* guarded(const OrtApi* api, const char* op, const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const OwnStatus& error) {
    return error.status;
  } catch (const Fault& fault) {
    return ort::CreateStatus::of(api)(ort::kInvalidArgument, fault.what());
  } catch (const std::bad_alloc&) {
    return ort::CreateStatus::of(api)(ort::kFail, (std::string(op) + ": not enough memory").c_str());
  } catch (const std::exception& error) {
    return ort::CreateStatus::of(api)(ort::kFail, error.what());
  }
}

inline Kind kind_of(int type) {
  switch (type) {
    case ort::kFloat: return Kind::kFloat;
    case ort::kHalf: return Kind::kHalf;
    case ort::kUint8: return Kind::kByte;
    case ort::kInt32: return Kind::kInt32;
    case ort::kInt64: return Kind::kInt64;
    default: return Kind::kOther;
  }
}

// Null: an optional input that was left out.
inline Operand operand_of(const OrtApi* api, const OrtValue* value) {
  Operand found;
  if (value == nullptr) {
    return found;
  }
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(ort::GetTensorTypeAndShape::of(api)(value, &info));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> owner(
      info, ort::ReleaseTensorTypeAndShapeInfo::of(api));
  size_t rank = 0;
  int type = 0;
  void* data = nullptr;
  check(ort::GetDimensionsCount::of(api)(info, &rank));
  check(ort::GetTensorElementType::of(api)(info, &type));
  check(ort::GetTensorMutableData::of(api)(const_cast<OrtValue*>(value), &data));
  found.is_there = true;
  found.kind = kind_of(type);
  found.data = data;
  found.rank = static_cast<int64_t>(rank);
  if (rank <= kMostAxes) {  // more are refused
    check(ort::GetDimensions::of(api)(info, found.sizes, rank));
    found.count = found.elements();
  }
  return found;
}

class Context {
 public:
  Context(const OrtApi* api, OrtKernelContext* context) : api_(api), context_(context) {
    check(ort::KernelContextGetInputCount::of(api_)(context_, &inputs_));
  }

  Operand input(size_t index) const {
    const OrtValue* value = nullptr;
    if (index < inputs_) {
      check(ort::KernelContextGetInput::of(api_)(context_, index, &value));
    }
    return operand_of(api_, value);
  }

  // The codes, scales and zero points from input `first` on.
  MatrixOperands matrix(size_t first) const { return {input(first), input(first + 1), input(first + 2)}; }

  template <typename Element = float>
  Element* output(const int64_t* sizes, int64_t rank, size_t index = 0) const {
    OrtValue* value = nullptr;
    check(ort::KernelContextGetOutput::of(api_)(context_, index, sizes, static_cast<size_t>(rank), &value));
    if (value == nullptr) {
      refuse("output %zu is missing", index);
    }
    void* data = nullptr;
    check(ort::GetTensorMutableData::of(api_)(value, &data));
    return static_cast<Element*>(data);
  }

  // Of the shape of x, with another last axis.
  float* output_like(const Operand& x, int64_t last, size_t index = 0) const {
    Operand shape = x;
    shape.sizes[x.rank - 1] = last;
    return output(shape.sizes, x.rank, index);
  }

  // The session's own threads; how many it has nobody says, and more workers than threads do no harm.
  ThreadPool pool() const {
    static const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    return {cores, run, this};
  }

 private:
  static void run(const void* host, int workers, void (*task)(void*, int), void* context) {
    struct Call {
      void (*task)(void*, int);
      void* context;
    } call = {task, context};
    const auto one = [](void* data, size_t worker) {
      const auto& its = *static_cast<Call*>(data);
      its.task(its.context, static_cast<int>(worker));
    };
    const auto* self = static_cast<const Context*>(host);
    check(ort::KernelContextParallelFor::of(self->api_)(self->context_, one, workers, 0, &call));
  }

  const OrtApi* api_;
  OrtKernelContext* context_;
  size_t inputs_ = 0;
};

// Memory of a thread that runs programs, kept from call to call.
inline void* scratch_of(size_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t size = 0;
  if (size < bytes) {
    size = 0;
    memory.reset(std::aligned_alloc(kAlignment, bytes));
    if (memory == nullptr) {
      throw std::bad_alloc();
    }
    size = bytes;
  }
  return memory.get();
}

inline int64_t attribute(const OrtApi* api, const OrtKernelInfo* info, const char* name) {
  int64_t value = 0;
  check(ort::KernelInfoGetAttributeInt64::of(api)(info, name, &value));
  return value;
}

// `otherwise` where the graph says nothing.
inline int64_t attribute_or(const OrtApi* api, const OrtKernelInfo* info, const char* name, int64_t otherwise) {
  int64_t value = 0;
  OrtStatus* missing = ort::KernelInfoGetAttributeInt64::of(api)(info, name, &value);
  if (missing == nullptr) {
    return value;
  }
  ort::ReleaseStatus::of(api)(missing);
  return otherwise;
}

// `otherwise` where the graph says nothing.
inline float float_attribute_or(const OrtApi* api, const OrtKernelInfo* info, const char* name, float otherwise) {
  float value = 0.0f;
  OrtStatus* missing = ort::KernelInfoGetAttributeFloat::of(api)(info, name, &value);
  if (missing == nullptr) {
    return value;
  }
  ort::ReleaseStatus::of(api)(missing);
  return otherwise;
}

inline float float_attribute(const OrtApi* api, const OrtKernelInfo* info, const char* name) {
  float value = 0.0f;
  check(ort::KernelInfoGetAttributeFloat::of(api)(info, name, &value));
  return value;
}

// An operator's kernel with the table it was made with.
template <typename Op>
struct Kernel {
  Kernel(const OrtApi* api, const OrtKernelInfo* info) : api(api), op(api, info) {}
  const OrtApi* api;
  Op op;
};

// The bits of Op::kOptionalOutputs, where it has some.
template <typename Op>
constexpr unsigned optional_outputs() {
  if constexpr (requires { Op::kOptionalOutputs; }) {
    return Op::kOptionalOutputs;
  }
  return 0;
}

template <typename Op>
OrtCustomOp described() {
  OrtCustomOp d = {};
  d.version = ort::kApiVersion;
  d.GetName = [](const OrtCustomOp*) { return Op::kName; };
  d.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return "CPUExecutionProvider"; };
  d.GetInputType = [](const OrtCustomOp*, size_t index) { return Op::kInputs[index]; };
  d.GetInputTypeCount = [](const OrtCustomOp*) { return std::size(Op::kInputs); };
  d.GetOutputType = [](const OrtCustomOp*, size_t index) -> int { return Op::kOutputs[index]; };
  d.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return std::size(Op::kOutputs); };
  d.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) -> int {
    return Op::kOptionalInputs >> index & 1 ? ort::kOptional : ort::kRequired;
  };
  d.GetOutputCharacteristic = [](const OrtCustomOp*, size_t index) -> int {
    return optional_outputs<Op>() >> index & 1 ? ort::kOptional : ort::kRequired;
  };
  d.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  d.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  d.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  d.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    return guarded(api, Op::kName, [&] { *kernel = new Kernel<Op>(api, info); });
  };
  d.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const auto& its = *static_cast<const Kernel<Op>*>(kernel);
    return guarded(its.api, Op::kName, [&] { its.op.compute(Context(its.api, context)); });
  };
  d.KernelDestroy = [](void* kernel) { delete static_cast<Kernel<Op>*>(kernel); };
  return d;
}

}  // namespace

// All of each file's operators.
std::vector<const OrtCustomOp*> product_ops();
std::vector<const OrtCustomOp*> state_ops();

}  // namespace lfm2
