// The part of ONNX Runtime's C interface that an operator library needs, written down by hand: the wheels carry no
// headers. The interface is a table of functions that only ever grows at its end (onnxruntime_c_api.h says so), so an
// index is as stable as a name; RegisterCustomOps asks for the version in which the last of ours appeared.
// tests/kernels/test_interface.py compares all of this with the header itself.

#pragma once

#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;

struct OrtApi {
  const void* functions[1];  // and more
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// Of version 17 (ONNX Runtime 1.17): the runtime reads no field that a version does not have.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
};

namespace lfm2::ort {

constexpr uint32_t kApiVersion = 17;
// The runtimes 1.17 to 1.32: those whose table this is known to be. The newest is the last that pyproject.toml takes.
constexpr int kOldestRuntime = 17;
constexpr int kNewestRuntime = 32;

enum ElementType { kAnyType = 0, kFloat = 1, kUint8 = 2, kInt32 = 6, kInt64 = 7, kHalf = 10 };
enum Characteristic { kRequired = 0, kOptional = 1 };
enum ErrorCode { kFail = 1, kInvalidArgument = 2 };

// Index and type of each function.
template <size_t kIndex, typename Function>
struct Entry {
  static constexpr size_t kAt = kIndex;

  static Function* of(const OrtApi* api) {
    return reinterpret_cast<Function*>(const_cast<void*>(api->functions[kIndex]));
  }
};

using CreateStatus = Entry<0, OrtStatus*(int code, const char* message)>;
using GetErrorCode = Entry<1, int(const OrtStatus*)>;
using CreateCustomOpDomain = Entry<26, OrtStatus*(const char* domain, OrtCustomOpDomain**)>;
using CustomOpDomainAdd = Entry<27, OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)>;
using AddCustomOpDomain = Entry<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>;
using GetTensorMutableData = Entry<51, OrtStatus*(OrtValue*, void**)>;
using GetTensorElementType = Entry<60, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int*)>;
using GetDimensionsCount = Entry<61, OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t*)>;
using GetDimensions = Entry<62, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t count)>;
using GetTensorTypeAndShape = Entry<65, OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**)>;
using KernelInfoGetAttributeFloat = Entry<85, OrtStatus*(const OrtKernelInfo*, const char* name, float*)>;
using KernelInfoGetAttributeInt64 = Entry<86, OrtStatus*(const OrtKernelInfo*, const char* name, int64_t*)>;
using KernelContextGetInputCount = Entry<88, OrtStatus*(const OrtKernelContext*, size_t*)>;
using KernelContextGetInput = Entry<90, OrtStatus*(const OrtKernelContext*, size_t, const OrtValue**)>;
using KernelContextGetOutput =
    Entry<91, OrtStatus*(OrtKernelContext*, size_t, const int64_t* shape, size_t rank, OrtValue**)>;
using ReleaseStatus = Entry<93, void(OrtStatus*)>;
using ReleaseTensorTypeAndShapeInfo = Entry<99, void(OrtTensorTypeAndShapeInfo*)>;
using KernelInfoGetConstantInputTensor =
    Entry<249, OrtStatus*(const OrtKernelInfo*, size_t index, int* is_constant, const OrtValue**)>;
using GetBuildInfoString = Entry<254, const char*()>;
using KernelContextParallelFor =
    Entry<274, OrtStatus*(const OrtKernelContext*, void (*)(void*, size_t), size_t total, size_t batches, void*)>;

}  // namespace lfm2::ort
