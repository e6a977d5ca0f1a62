// Which kernels this processor runs. The translation units that exist are named by LFM2_HAVE_* from CMakeLists.txt.

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "attention.h"
#include "float_matmul.h"
#include "gated_conv.h"
#include "kernels.h"
#include "row_matrix.h"

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

template <typename Table>
struct Candidate {
  const Table* kernels;
  bool (*runs_here)();
};

constexpr Candidate<Kernels> kFastestFirst[] = {
#if defined(LFM2_HAVE_AVX512VNNI)
    {&kAvx512VnniKernels, has_avx512vnni},
#endif
#if defined(LFM2_HAVE_AVXVNNI)
    {&kAvxVnniKernels, has_avxvnni},
#endif
#if defined(LFM2_HAVE_AVX2)
    {&kAvx2Kernels, has_avx2},
#endif
#if defined(LFM2_HAVE_NEONI8MM)
    {&kNeonI8mmKernels, has_neoni8mm},
#endif
#if defined(LFM2_HAVE_NEONDOT)
    {&kNeonDotKernels, has_neondot},
#endif
    {&kScalarKernels, always},
};

constexpr Candidate<RowKernels> kFastestRowsFirst[] = {
#if defined(LFM2_HAVE_AVX512VNNI)
    {&kAvx512VnniRowKernels, has_avx512vnni},
#endif
#if defined(LFM2_HAVE_NEONDOT)
    {&kNeonDotRowKernels, has_neondot},
#endif
    {&kScalarRowKernels, always},
};

// The first that runs here; the last one always does.
template <typename Table>
const Table* fastest(const Candidate<Table>* candidate) {
  while (!candidate->runs_here()) {
    ++candidate;
  }
  return candidate->kernels;
}

template <typename Table, size_t kCount>
const Table* by_name(const Candidate<Table> (&candidates)[kCount], const char* name) {
  for (const Candidate<Table>& candidate : candidates) {
    if (std::strcmp(candidate.kernels->name, name) == 0) {
      return candidate.runs_here() ? candidate.kernels : nullptr;
    }
  }
  return nullptr;
}

template <typename Table, size_t kCount>
bool is_listed(const Candidate<Table> (&candidates)[kCount], const char* name) {
  for (const Candidate<Table>& candidate : candidates) {
    if (std::strcmp(candidate.kernels->name, name) == 0) {
      return true;
    }
  }
  return false;
}

// One variable names the kernels of both tables: a name that only `others` know is none of this table's business.
template <typename Table, typename Other, size_t kCount, size_t kOthers>
const Table* chosen(const Candidate<Table> (&candidates)[kCount], const Candidate<Other> (&others)[kOthers]) {
  const Table* const best = fastest(candidates);
  const char* name = std::getenv("LFM2_KERNELS");
  if (name == nullptr || *name == '\0') {
    return best;
  }
  if (const Table* kernels = by_name(candidates, name)) {
    return kernels;
  }
  if (is_listed(candidates, name) || !is_listed(others, name)) {
    std::fprintf(stderr, "LFM2_KERNELS=%s: unknown here, or not for this processor; using %s\n", name, best->name);
  }
  return best;
}

// What runs here; ends with null.
template <typename Table, size_t kCount>
std::array<const char*, kCount + 1> runnable(const Candidate<Table> (&candidates)[kCount]) {
  std::array<const char*, kCount + 1> names = {};
  size_t count = 0;
  for (const Candidate<Table>& candidate : candidates) {
    if (candidate.runs_here()) {
      names[count++] = candidate.kernels->name;
    }
  }
  return names;
}

}  // namespace

const Kernels& best_kernels() {
  static const Kernels* const kernels = chosen(kFastestFirst, kFastestRowsFirst);
  return *kernels;
}

const RowKernels& best_row_kernels() {
  static const RowKernels* const kernels = chosen(kFastestRowsFirst, kFastestFirst);
  return *kernels;
}

const AttentionKernels& best_attention_kernels() {
#if defined(LFM2_HAVE_AVX512VNNI)
  if (&best_row_kernels() == &kAvx512VnniRowKernels) {
    return kAvx512AttentionKernels;
  }
#endif
  return kPlainAttentionKernels;
}

const ConvKernels& best_conv_kernels() {
#if defined(LFM2_HAVE_AVX512VNNI)
  if (&best_row_kernels() == &kAvx512VnniRowKernels) {
    return kAvx512ConvKernels;
  }
#endif
  return kScalarConvKernels;
}

const FloatKernels& best_float_kernels() {
#if defined(LFM2_HAVE_AVX512VNNI)
  if (&best_row_kernels() == &kAvx512VnniRowKernels) {
    return kAvx512FloatKernels;
  }
#endif
  return kScalarFloatKernels;
}

const Kernels* kernels_by_name(const char* name) {
  return by_name(kFastestFirst, name);
}

const RowKernels* row_kernels_by_name(const char* name) {
  return by_name(kFastestRowsFirst, name);
}

const char* const* runnable_kernels() {
  static const auto names = runnable(kFastestFirst);
  return names.data();
}

const char* const* runnable_row_kernels() {
  static const auto names = runnable(kFastestRowsFirst);
  return names.data();
}

}  // namespace lfm2
