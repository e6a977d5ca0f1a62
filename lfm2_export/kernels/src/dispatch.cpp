// Which kernels this processor runs. The translation units that exist are named by LFM2_HAVE_* from CMakeLists.txt.

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "target.h"

#if defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace lfm2 {
namespace {

#if defined(LFM2_HAVE_AVX512VNNI)
bool has_avx512vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
}
#endif

#if defined(LFM2_HAVE_AVX2)
bool has_avx2() {
  // F16C came with Ivy Bridge, before AVX2 and FMA, and GCC 10's __builtin_cpu_supports does not know its name.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif

#if defined(LFM2_HAVE_AVXVNNI)
bool has_avxvnni() {
  if (!has_avx2()) {
    return false;
  }
  uint32_t eax = 7, ebx = 0, ecx = 1, edx = 0;  // leaf 7, subleaf 1: EAX bit 4
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return (eax >> 4) & 1;
}
#endif

#if defined(__aarch64__) && defined(__APPLE__)
bool has_feature(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
#endif

#if defined(LFM2_HAVE_NEONDOT)
bool has_neondot() {
#if defined(__APPLE__)
  return has_feature("hw.optional.arm.FEAT_DotProd");
#else
  return (getauxval(AT_HWCAP) >> 20) & 1;  // HWCAP_ASIMDDP
#endif
}
#endif

#if defined(LFM2_HAVE_NEONI8MM)
bool has_neoni8mm() {
#if defined(__APPLE__)
  return has_feature("hw.optional.arm.FEAT_I8MM");
#else
  return (getauxval(AT_HWCAP2) >> 13) & 1;  // HWCAP2_I8MM
#endif
}
#endif

bool always() {
  return true;
}

struct Candidate {
  Target target;
  bool (*runs_here)();
};

#define LFM2_TARGET_OF(name) \
  {#name, name::kKernels, name::kRowKernels, name::kAttentionKernels, name::kConvKernels, name::kFloatKernels}

constexpr Candidate kFastestFirst[] = {
#if defined(LFM2_HAVE_AVX512VNNI)
    {LFM2_TARGET_OF(avx512vnni), has_avx512vnni},
#endif
#if defined(LFM2_HAVE_AVXVNNI)
    {LFM2_TARGET_OF(avxvnni), has_avxvnni},
#endif
#if defined(LFM2_HAVE_AVX2)
    {LFM2_TARGET_OF(avx2), has_avx2},
#endif
#if defined(LFM2_HAVE_NEONI8MM)
    {LFM2_TARGET_OF(neoni8mm), has_neoni8mm},
#endif
#if defined(LFM2_HAVE_NEONDOT)
    {LFM2_TARGET_OF(neondot), has_neondot},
#endif
    {LFM2_TARGET_OF(scalar), always},
};

// The first that runs here; the last one always does.
const Target& fastest() {
  const Candidate* candidate = kFastestFirst;
  while (!candidate->runs_here()) {
    ++candidate;
  }
  return candidate->target;
}

const Target& chosen() {
  const Target& best = fastest();
  const char* name = std::getenv("LFM2_KERNELS");
  if (name == nullptr || *name == '\0') {
    return best;
  }
  if (const Target* target = target_by_name(name)) {
    return *target;
  }
  std::fprintf(stderr, "LFM2_KERNELS=%s: unknown here, or not for this processor; using %s\n", name, best.name);
  return best;
}

}  // namespace

const Target& best_target() {
  static const Target& target = chosen();
  return target;
}

const Target* target_by_name(const char* name) {
  for (const Candidate& candidate : kFastestFirst) {
    if (std::strcmp(candidate.target.name, name) == 0) {
      return candidate.runs_here() ? &candidate.target : nullptr;
    }
  }
  return nullptr;
}

const char* const* runnable_targets() {
  static const auto names = [] {
    std::array<const char*, std::size(kFastestFirst) + 1> found = {};
    size_t count = 0;
    for (const Candidate& candidate : kFastestFirst) {
      if (candidate.runs_here()) {
        found[count++] = candidate.target.name;
      }
    }
    return found;
  }();
  return names.data();
}

}  // namespace lfm2
