// As much of ONNX Runtime as our operators see: the table of onnxruntime_abi.h, with tensors in memory of exactly their
// size. So a sanitizer sees everything that an operator does, and a test may hand over what a session would never let
// through.

#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "guarded_buffer.h"
#include "onnxruntime_abi.h"

// A tensor, whatever its shape says of its memory. Two may share memory.
struct OrtValue {
  int type = 0;
  std::vector<int64_t> shape;
  std::shared_ptr<void> memory;

  template <typename T>
  T* as() const {
    return static_cast<T*>(memory.get());
  }
};

struct OrtStatus {
  int code;
  std::string text;
};

struct OrtTensorTypeAndShapeInfo {
  const OrtValue* of;
};

// A node: its attributes, and which of its inputs are initializers.
struct OrtKernelInfo {
  std::map<std::string, int64_t> integers;
  std::map<std::string, float> floats;
  std::map<size_t, const OrtValue*> constants;
};

// One call. `outputs` that are there already are taken where the shape fits; `missing` ones the node does not have.
struct OrtKernelContext {
  std::vector<const OrtValue*> inputs;  // null: left out
  std::map<size_t, OrtValue> outputs;
  std::map<size_t, bool> missing;
  bool on_threads = false;
  const OrtCustomOp* op = nullptr;  // whose call it is: Kernel::run says it
};

namespace lfm2_test {

// Bytes of a type's element; 0: nothing that our operators know.
int64_t element_bytes(int type);

// Elements of a shape; -1: no tensor of the tests is that large.
int64_t elements_of(const std::vector<int64_t>& shape);

// Memory of exactly `bytes`, in front of a page that cannot be touched or between the heap's own red zones.
std::shared_ptr<void> memory_of(int64_t bytes, bool guarded);

OrtValue tensor_of(int type, const std::vector<int64_t>& shape, bool guarded = true);

template <typename T>
OrtValue tensor_of(int type, const std::vector<int64_t>& shape, const std::vector<T>& values, bool guarded = true) {
  OrtValue made = tensor_of(type, shape, guarded);
  for (size_t i = 0; i < values.size(); ++i) {
    made.as<T>()[i] = values[i];
  }
  return made;
}

// What is in an output's memory before an operator writes to it.
constexpr uint8_t kUnwritten = 0xa5;

// An operator's kernel, as a session makes one for a node.
class Kernel {
 public:
  // `op` as the graph names it. Where it is refused `fault` says why, and `run` must not be called.
  Kernel(const std::string& op, const OrtKernelInfo& info);
  ~Kernel();
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  const std::string& fault() const { return fault_; }

  // Empty, or why the call was refused.
  std::string run(OrtKernelContext& context) const;

 private:
  const OrtCustomOp* op_;
  void* kernel_ = nullptr;
  std::string fault_;
};

}  // namespace lfm2_test
