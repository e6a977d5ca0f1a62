// The kernels that are plain loops, which the compiler vectorizes for every instruction set. On NEON it does so poorly (each
// output is loaded and stored once for every tap, and a tile of 128 sums does not fit the registers): lanes.h does it.

#if defined(__ARM_FEATURE_DOTPROD)
#include "float_matmul_lanes.h"
#include "gated_conv_lanes.h"
#else
#include "float_matmul_loops.h"
#include "gated_conv_loops.h"
#endif
#include "target.h"

namespace lfm2::LFM2_TARGET {

const ConvKernels kConvKernels = {gate_row, convolve_row};
const FloatKernels kFloatKernels = {multiply_floats};

}  // namespace lfm2::LFM2_TARGET
