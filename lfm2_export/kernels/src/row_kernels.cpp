// row_matrix.h in lanes.h's words, compiled for every instruction set.

#include "row_dot.h"
#include "row_inputs.h"
#include "target.h"

#if defined(__AVX2__)
#include "row_block.h"
#endif

namespace lfm2::LFM2_TARGET {

#if defined(__AVX2__)
constexpr auto kBlock = block;
#else
constexpr auto kBlock = nullptr;
#endif

const RowKernels kRowKernels = {LFM2_TARGET_NAME, normalize, quantize, swiglu, dot, kBlock, accumulate_row};

}  // namespace lfm2::LFM2_TARGET
