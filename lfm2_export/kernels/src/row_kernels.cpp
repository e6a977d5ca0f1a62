// row_matrix.h in lanes.h's words, compiled for every instruction set.

#include "row_dot.h"
#include "row_inputs.h"
#include "target.h"

#if defined(__ARM_NEON)
#include "row_block_neon.h"
#else
#include "row_block.h"
#endif

namespace lfm2::LFM2_TARGET {

const RowKernels kRowKernels = {LFM2_TARGET_NAME, normalize, quantize, swiglu, dot, block, accumulate_row, kFewTokens,
                                kShifts, kTakesSmallGroups};

}  // namespace lfm2::LFM2_TARGET
