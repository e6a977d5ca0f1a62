#include "fake_runtime.h"

#include <array>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <thread>

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base);

struct OrtCustomOpDomain {
  std::map<std::string, const OrtCustomOp*> ops;
};

namespace lfm2_test {
namespace {

namespace ort = lfm2::ort;

constexpr int64_t kMostElements = 1 << 24;
constexpr int kThreads = 3;

OrtCustomOpDomain* the_domain = nullptr;  // lives as long as the process, as in a session

OrtStatus* failed(const std::string& why) {
  return new OrtStatus{ort::kFail, why};
}

std::string taken(OrtStatus* status) {
  const std::unique_ptr<OrtStatus> owner(status);
  return status == nullptr ? "" : status->text;
}

OrtStatus* create_status(int code, const char* message) {
  return new OrtStatus{code, message};
}

int error_code(const OrtStatus* status) {
  return status->code;
}

const char* build_info() {
  return "ORT Build Info: a fake";
}

void release_status(OrtStatus* status) {
  delete status;
}

OrtStatus* create_domain(const char*, OrtCustomOpDomain** domain) {
  *domain = the_domain = new OrtCustomOpDomain;
  return nullptr;
}

OrtStatus* add_op(OrtCustomOpDomain* domain, const OrtCustomOp* op) {
  domain->ops[op->GetName(op)] = op;
  return nullptr;
}

OrtStatus* add_domain(OrtSessionOptions*, OrtCustomOpDomain*) {
  return nullptr;
}

OrtStatus* mutable_data(OrtValue* value, void** data) {
  *data = value->memory.get();
  return nullptr;
}

OrtStatus* element_type(const OrtTensorTypeAndShapeInfo* info, int* type) {
  *type = info->of->type;
  return nullptr;
}

OrtStatus* dimensions_count(const OrtTensorTypeAndShapeInfo* info, size_t* count) {
  *count = info->of->shape.size();
  return nullptr;
}

OrtStatus* dimensions(const OrtTensorTypeAndShapeInfo* info, int64_t* sizes, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    sizes[i] = info->of->shape[i];
  }
  return nullptr;
}

OrtStatus* type_and_shape(const OrtValue* value, OrtTensorTypeAndShapeInfo** info) {
  *info = new OrtTensorTypeAndShapeInfo{value};
  return nullptr;
}

void release_info(OrtTensorTypeAndShapeInfo* info) {
  delete info;
}

OrtStatus* float_attribute(const OrtKernelInfo* info, const char* name, float* value) {
  const auto found = info->floats.find(name);
  if (found == info->floats.end()) {
    return failed(std::string("no attribute ") + name);
  }
  *value = found->second;
  return nullptr;
}

OrtStatus* integer_attribute(const OrtKernelInfo* info, const char* name, int64_t* value) {
  const auto found = info->integers.find(name);
  if (found == info->integers.end()) {
    return failed(std::string("no attribute ") + name);
  }
  *value = found->second;
  return nullptr;
}

OrtStatus* constant_input(const OrtKernelInfo* info, size_t index, int* is_constant, const OrtValue** value) {
  const auto found = info->constants.find(index);
  *is_constant = found != info->constants.end();
  *value = *is_constant != 0 ? found->second : nullptr;
  return nullptr;
}

OrtStatus* input_count(const OrtKernelContext* context, size_t* count) {
  *count = context->inputs.size();
  return nullptr;
}

OrtStatus* input(const OrtKernelContext* context, size_t index, const OrtValue** value) {
  *value = context->inputs[index];
  return nullptr;
}

OrtStatus* output(OrtKernelContext* context, size_t index, const int64_t* sizes, size_t rank, OrtValue** value) {
  *value = nullptr;
  if (context->missing.count(index) != 0) {
    return nullptr;
  }
  const std::vector<int64_t> shape(sizes, sizes + rank);
  const auto found = context->outputs.find(index);
  if (found != context->outputs.end()) {
    if (found->second.shape != shape) {
      return failed("an output of another shape is bound");
    }
    *value = &found->second;
    return nullptr;
  }
  if (elements_of(shape) < 0) {
    return failed("no memory for an output");
  }
  *value = &(context->outputs[index] = tensor_of(context->op->GetOutputType(context->op, index), shape));
  std::memset((*value)->memory.get(), kUnwritten,
              static_cast<size_t>(elements_of(shape) * element_bytes((*value)->type)));
  return nullptr;
}

OrtStatus* parallel_for(const OrtKernelContext* context, void (*task)(void*, size_t), size_t total, size_t, void* data) {
  if (!context->on_threads) {
    for (size_t i = 0; i < total; ++i) {
      task(data, i);
    }
    return nullptr;
  }
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([=] {
      for (size_t i = static_cast<size_t>(thread); i < total; i += kThreads) {
        task(data, i);
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  return nullptr;
}

using Table = std::array<const void*, 300>;

template <typename EntryOf, typename Function>
void put(Table& table, Function* function) {
  // The signatures are those of the header, or this does not compile.
  static_assert(std::is_same_v<decltype(EntryOf::of(nullptr)), Function*>);
  table[EntryOf::kAt] = reinterpret_cast<const void*>(function);
}

const Table& the_table() {
  static const Table table = [] {
    Table made = {};
    put<ort::CreateStatus>(made, create_status);
    put<ort::GetErrorCode>(made, error_code);
    put<ort::CreateCustomOpDomain>(made, create_domain);
    put<ort::CustomOpDomainAdd>(made, add_op);
    put<ort::AddCustomOpDomain>(made, add_domain);
    put<ort::GetTensorMutableData>(made, mutable_data);
    put<ort::GetTensorElementType>(made, element_type);
    put<ort::GetDimensionsCount>(made, dimensions_count);
    put<ort::GetDimensions>(made, dimensions);
    put<ort::GetTensorTypeAndShape>(made, type_and_shape);
    put<ort::KernelInfoGetAttributeFloat>(made, float_attribute);
    put<ort::KernelInfoGetAttributeInt64>(made, integer_attribute);
    put<ort::KernelContextGetInputCount>(made, input_count);
    put<ort::KernelContextGetInput>(made, input);
    put<ort::KernelContextGetOutput>(made, output);
    put<ort::KernelInfoGetConstantInputTensor>(made, constant_input);
    put<ort::ReleaseStatus>(made, release_status);
    put<ort::ReleaseTensorTypeAndShapeInfo>(made, release_info);
    put<ort::GetBuildInfoString>(made, build_info);
    put<ort::KernelContextParallelFor>(made, parallel_for);
    return made;
  }();
  return table;
}

const OrtApi* api() {
  return reinterpret_cast<const OrtApi*>(the_table().data());
}

const OrtCustomOp* registered(const std::string& op) {
  static const std::string fault = [] {
    const OrtApiBase base = {[](uint32_t) { return api(); }, [] { return "1.31.0"; }};
    return taken(RegisterCustomOps(nullptr, &base));
  }();
  if (!fault.empty() || the_domain->ops.count(op) == 0) {
    std::abort();
  }
  return the_domain->ops[op];
}

}  // namespace

int64_t element_bytes(int type) {
  switch (type) {
    case ort::kFloat: case ort::kInt32: return 4;
    case ort::kUint8: return 1;
    case ort::kInt64: return 8;
    case ort::kHalf: return 2;
    default: return 16;  // a string, a complex number
  }
}

int64_t elements_of(const std::vector<int64_t>& shape) {
  int64_t elements = 1;
  for (const int64_t size : shape) {
    if (size == 0) {
      return 0;
    }
    elements = size < 0 || size > kMostElements || elements > kMostElements ? kMostElements + 1 : elements * size;
  }
  return elements > kMostElements ? -1 : elements;
}

std::shared_ptr<void> memory_of(int64_t bytes, bool guarded) {
  if (guarded) {
    const auto buffer = std::make_shared<Buffer<uint8_t>>(static_cast<size_t>(bytes));
    return {buffer, buffer->data()};
  }
  return {std::malloc(static_cast<size_t>(bytes)), std::free};
}

OrtValue tensor_of(int type, const std::vector<int64_t>& shape, bool guarded) {
  const int64_t bytes = elements_of(shape) * element_bytes(type);
  OrtValue made = {type, shape, memory_of(bytes, guarded)};
  if (bytes > 0) {
    std::memset(made.memory.get(), 0, static_cast<size_t>(bytes));
  }
  return made;
}

Kernel::Kernel(const std::string& op, const OrtKernelInfo& info) : op_(registered(op)) {
  fault_ = taken(op_->CreateKernelV2(op_, api(), &info, &kernel_));
}

Kernel::~Kernel() {
  if (kernel_ != nullptr) {
    op_->KernelDestroy(kernel_);
  }
}

std::string Kernel::run(OrtKernelContext& context) const {
  context.op = op_;
  return taken(op_->KernelComputeV2(kernel_, &context));
}

}  // namespace lfm2_test
