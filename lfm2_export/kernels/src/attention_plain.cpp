#include "attention_plain.h"
#include "target.h"

namespace lfm2 {

namespace scalar {

const AttentionKernels kAttentionKernels = {attend_plain, store_row};

}  // namespace scalar
}  // namespace lfm2
