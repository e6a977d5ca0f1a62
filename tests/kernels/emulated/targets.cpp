// Brings the emulated kernels among those that this processor runs. Who calls the two functions of dispatch.cpp that
// find kernels is sent here by the linker (--wrap in CMakeLists.txt), so that neither the tests nor the C interface
// that they use need to know which kernels are emulated.

#include <cstring>
#include <vector>

#include "declared.h"

namespace lfm2 {
namespace {

// Plain loops have no instructions that could be emulated.
#define LFM2_EMULATED_TARGET(name) \
  {#name, name::kKernels, name::kRowKernels, name::kAttentionKernels, scalar::kConvKernels, scalar::kFloatKernels}

const Target kEmulated[] = {LFM2_EMULATED_TARGET(emulated512), LFM2_EMULATED_TARGET(emulatedvnni)};

bool runs_here() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

}  // namespace

// dispatch.cpp's own.
const Target* native_target_by_name(const char* name) __asm__("__real__ZN4lfm214target_by_nameEPKc");
const char* const* native_targets() __asm__("__real__ZN4lfm216runnable_targetsEv");

const Target* tested_target_by_name(const char* name) __asm__("__wrap__ZN4lfm214target_by_nameEPKc");
const char* const* tested_targets() __asm__("__wrap__ZN4lfm216runnable_targetsEv");

const Target* tested_target_by_name(const char* name) {
  for (const Target& target : kEmulated) {
    if (std::strcmp(target.name, name) == 0) {
      return runs_here() ? &target : nullptr;
    }
  }
  return native_target_by_name(name);
}

const char* const* tested_targets() {
  static const auto names = [] {
    std::vector<const char*> found;
    for (auto name = native_targets(); *name != nullptr; ++name) {
      found.push_back(*name);
    }
    for (const Target& target : kEmulated) {
      if (runs_here()) {
        found.insert(found.end() - 1, target.name);  // scalar stays the last one
      }
    }
    found.push_back(nullptr);
    return found;
  }();
  return names.data();
}

}  // namespace lfm2
