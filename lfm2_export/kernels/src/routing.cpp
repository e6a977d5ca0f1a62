#include "routing.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

namespace lfm2 {
namespace {

float sigmoid(float x) {
  return 1.0f / (1.0f + std::exp(-x));
}

// Orders by score, then by the lower index, as one integer: so it is a strict order whatever the floats are.
uint64_t rank_of(float score, int64_t expert) {
  uint32_t bits = 0xffffffffu;
  if (!std::isnan(score)) {
    score += 0.0f;  // -0 and 0 are equal
    std::memcpy(&bits, &score, sizeof bits);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(expert));
}

int32_t expert_of(uint64_t rank) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(rank));
}

}  // namespace

void choose_experts(const Routing& routing, int64_t token, uint64_t* ranks, Choice* choices) {
  constexpr float kEpsilon = 1e-6f;
  const float* logits = routing.logits + token * routing.experts;
  for (int64_t expert = 0; expert < routing.experts; ++expert) {
    const float bias = routing.expert_bias == nullptr ? 0.0f : routing.expert_bias[expert];
    ranks[expert] = rank_of(sigmoid(logits[expert]) + bias, expert);
  }
  std::partial_sort(ranks, ranks + routing.top_k, ranks + routing.experts, std::greater<>());
  float sum = 0.0f;
  for (int64_t i = 0; i < routing.top_k; ++i) {
    choices[i].expert = expert_of(ranks[i]);
    choices[i].weight = sigmoid(logits[choices[i].expert]);
    sum += choices[i].weight;
  }
  for (int64_t i = 0; i < routing.top_k; ++i) {
    const float share = routing.normalize ? choices[i].weight / (sum + kEpsilon) : choices[i].weight;
    choices[i].weight = share * routing.scale;
  }
}

}  // namespace lfm2
