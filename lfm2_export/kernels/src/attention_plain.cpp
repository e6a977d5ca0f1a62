#include "attention_plain.h"

namespace lfm2 {

const AttentionKernels kPlainAttentionKernels = {attend_plain, store_row};

}  // namespace lfm2
