// Which kernels an instruction set brings, and which of them run here. CMakeLists.txt compiles the sources that are written
// once (row_kernels.cpp, tile_kernels.cpp, attention_kernels.cpp, loop_kernels.cpp) for each set, in a namespace of its own
// (LFM2_TARGET).

#pragma once

#include "attention.h"
#include "float_matmul.h"
#include "gated_conv.h"
#include "kernels.h"
#include "row_matrix.h"

namespace lfm2 {

#define LFM2_DECLARE_TARGET(target)                      \
  namespace target {                                     \
  extern const Kernels kKernels;                         \
  extern const RowKernels kRowKernels;                   \
  extern const AttentionKernels kAttentionKernels;       \
  extern const ConvKernels kConvKernels;                 \
  extern const FloatKernels kFloatKernels;               \
  }

LFM2_DECLARE_TARGET(scalar)
LFM2_DECLARE_TARGET(avx2)
LFM2_DECLARE_TARGET(avxvnni)
LFM2_DECLARE_TARGET(avx512vnni)
LFM2_DECLARE_TARGET(neondot)
LFM2_DECLARE_TARGET(neoni8mm)

struct Target {
  const char* name;
  const Kernels& tiles;
  const RowKernels& rows;
  const AttentionKernels& attention;
  const ConvKernels& conv;
  const FloatKernels& floats;
};

// The fastest of this processor, or the one that the environment variable LFM2_KERNELS names.
const Target& best_target();

// By name, null if unknown here or not runnable on this processor.
const Target* target_by_name(const char* name);

// The names of all that this processor runs, fastest first, scalar last; ends with null.
const char* const* runnable_targets();

}  // namespace lfm2
