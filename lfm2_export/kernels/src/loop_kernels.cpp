// The kernels that are plain loops, which the compiler vectorizes for every instruction set.

#include "float_matmul_loops.h"
#include "gated_conv_loops.h"
#include "target.h"

namespace lfm2::LFM2_TARGET {

const ConvKernels kConvKernels = {gate_row, convolve_row};
const FloatKernels kFloatKernels = {multiply_floats};

}  // namespace lfm2::LFM2_TARGET
