// Where the tokens of a call stand among those of their row, from the mask alone: what attention and the short convolutions
// have to know of padding.

#pragma once

#include <cstdint>

namespace lfm2 {

struct TokenLayoutProblem {
  const int64_t* mask;  // [batch, total]: 0 for padding; the last `tokens` positions are the call's
  int64_t batch, total, tokens, taps;
  int32_t* last_seen;   // [batch]: a row's last attended position, 0 if there is none
  int64_t* positions;   // [batch, tokens]: attended tokens before this one, and the padding on the left, which counts
  float* attended;      // [batch, tokens]: 1, or 0 for padding; a call of one token is always attended
  int64_t* conv_rows;   // [batch, taps - 1]: of (state, gated inputs), which the state after the call is
  int64_t* last;        // [batch]: a row's last attended token of the call, 0 if there is none
};

void run_token_layout(const TokenLayoutProblem& problem);

}  // namespace lfm2
