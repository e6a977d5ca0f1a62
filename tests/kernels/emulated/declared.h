// What target.h declares for every instruction set, for those that are emulated.

#pragma once

#include "target.h"

namespace lfm2 {

LFM2_DECLARE_TARGET(emulated512)
LFM2_DECLARE_TARGET(emulatedvnni)

}  // namespace lfm2
