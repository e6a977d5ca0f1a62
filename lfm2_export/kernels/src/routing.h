// Which experts a token goes to, and with which weights: LFM2's rule, exactly.

#pragma once

#include <cstdint>

namespace lfm2 {

struct Routing {
  const float* logits;       // [tokens, experts], the router's output
  const float* expert_bias;  // [experts] or null: added to the scores for the choice only
  int64_t experts;
  int64_t top_k;
  bool normalize;  // divide the weights by their sum + 1e-6
  float scale;     // then multiply them by this
};

struct Choice {
  int32_t expert;
  float weight;
};

// The choices of one token, best first; equal scores go to the lower index. `ranks` is room for `experts` numbers.
// A NaN ranks above everything, as in torch.topk, and makes the token's weights NaN.
void choose_experts(const Routing& routing, int64_t token, uint64_t* ranks, Choice* choices);

}  // namespace lfm2
