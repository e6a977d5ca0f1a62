// One sparse mixture-of-experts feed-forward: route, then for each chosen expert down(silu(gate x) * up x), weighted.

#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "routing.h"
#include "work.h"

namespace lfm2 {

struct MoeProblem {
  const float* x;  // [tokens, width]
  Routing routing;
  const uint8_t* gate_up;  // [experts][2*inner/32][width/32][576], see layout.h
  const uint8_t* down;     // [experts][width/32][inner/32][576]
  int64_t tokens;
  int64_t width;  // multiple of 32
  int64_t inner;  // multiple of 32
  float* out;     // [tokens, width]
};

// Bytes of scratch memory that `run_moe` needs.
size_t moe_scratch_bytes(const MoeProblem& problem);

// `scratch` is 64-byte aligned. The problem's sizes must have been checked.
void run_moe(const MoeProblem& problem, const Kernels& kernels, const ThreadPool& pool, void* scratch);

}  // namespace lfm2
