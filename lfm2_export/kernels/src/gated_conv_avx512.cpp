#include "gated_conv_loops.h"

namespace lfm2 {

const ConvKernels kAvx512ConvKernels = {gate_row, convolve_row};

}  // namespace lfm2
