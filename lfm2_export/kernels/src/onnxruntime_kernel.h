// What an operator needs to be one for ONNX Runtime: its inputs and outputs, the session's threads, errors as statuses, and
// the description that a session registers.
//
// An operator is a class with kName, kInputs and kOutputs (element types), kOptionalInputs (bits), a constructor from
// (OrtApi, OrtKernelInfo) and compute(Context).

#pragma once

#include <algorithm>
#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "onnxruntime_abi.h"
#include "work.h"

namespace lfm2 {
namespace {

class Failure : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

__attribute__((format(printf, 1, 2), noreturn)) inline void fail(const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Failure(text);
}

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
OrtStatus* guarded(const OrtApi* api, const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const OwnStatus& error) {
    return error.status;
  } catch (const Failure& error) {
    return ort::CreateStatus::of(api)(ort::kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return ort::CreateStatus::of(api)(ort::kFail, error.what());
  }
}

struct Tensor {
  void* data = nullptr;  // null: an optional input that is not there
  int type = ort::kAnyType;
  std::vector<int64_t> shape;

  int64_t count() const {
    int64_t product = 1;
    for (const int64_t size : shape) {
      product *= size;
    }
    return product;
  }
  int64_t last() const { return shape.empty() ? 1 : shape.back(); }

  template <typename Element>
  const Element* as() const {
    return static_cast<const Element*>(data);
  }
};

class Context {
 public:
  Context(const OrtApi* api, OrtKernelContext* context) : api_(api), context_(context) {
    check(ort::KernelContextGetInputCount::of(api_)(context_, &inputs_));
  }

  Tensor input(size_t index) const {
    const OrtValue* value = nullptr;
    if (index < inputs_) {
      check(ort::KernelContextGetInput::of(api_)(context_, index, &value));
    }
    return value == nullptr ? Tensor() : described(value);
  }

  template <typename Element = float>
  Element* output(const std::vector<int64_t>& shape, size_t index = 0) const {
    OrtValue* value = nullptr;
    check(ort::KernelContextGetOutput::of(api_)(context_, index, shape.data(), shape.size(), &value));
    void* data = nullptr;
    check(ort::GetTensorMutableData::of(api_)(value, &data));
    return static_cast<Element*>(data);
  }

  // The session's own threads; how many it has nobody says, and more workers than threads do no harm.
  ThreadPool pool() const {
    static const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    return {cores, run, this};
  }

 private:
  Tensor described(const OrtValue* value) const {
    Tensor found;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(ort::GetTensorTypeAndShape::of(api_)(value, &info));
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> owner(
        info, ort::ReleaseTensorTypeAndShapeInfo::of(api_));
    size_t rank = 0;
    check(ort::GetDimensionsCount::of(api_)(info, &rank));
    found.shape.resize(rank);
    check(ort::GetDimensions::of(api_)(info, found.shape.data(), rank));
    check(ort::GetTensorElementType::of(api_)(info, &found.type));
    check(ort::GetTensorMutableData::of(api_)(const_cast<OrtValue*>(value), &found.data));
    return found;
  }

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

inline void expect_rank(const Tensor& tensor, const char* name, size_t rank) {
  if (tensor.shape.size() != rank) {
    fail("%s has %zu dimensions, not %zu", name, tensor.shape.size(), rank);
  }
}

inline void expect_count(const Tensor& tensor, const char* name, int64_t count) {
  if (tensor.count() != count) {
    fail("%s has %" PRId64 " elements, not %" PRId64, name, tensor.count(), count);
  }
}

// An operator's kernel with the table it was made with.
template <typename Op>
struct Kernel {
  Kernel(const OrtApi* api, const OrtKernelInfo* info) : api(api), op(api, info) {}
  const OrtApi* api;
  Op op;
};

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
  d.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return ort::kRequired; };
  d.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  d.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  d.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  d.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    return guarded(api, [&] { *kernel = new Kernel<Op>(api, info); });
  };
  d.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    auto& its = *static_cast<Kernel<Op>*>(kernel);
    return guarded(its.api, [&] { its.op.compute(Context(its.api, context)); });
  };
  d.KernelDestroy = [](void* kernel) { delete static_cast<Kernel<Op>*>(kernel); };
  return d;
}

}  // namespace

// All of each file's operators.
std::vector<const OrtCustomOp*> product_ops();
std::vector<const OrtCustomOp*> state_ops();

}  // namespace lfm2
