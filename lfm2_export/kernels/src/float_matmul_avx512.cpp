#include "float_matmul_loops.h"

namespace lfm2 {

const FloatKernels kAvx512FloatKernels = {multiply_floats};

}  // namespace lfm2
