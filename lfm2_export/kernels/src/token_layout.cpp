#include "token_layout.h"

namespace lfm2 {
namespace {

void lay_out(const TokenLayoutProblem& p, int64_t row) {
  const int64_t* mask = p.mask + row * p.total;
  const int64_t first = p.total - p.tokens;
  int64_t seen = 0, leading = 0, last_seen = 0, kept = 0;
  for (int64_t slot = 0; slot < p.total; ++slot) {
    const bool is_there = mask[slot] != 0;
    seen += is_there;
    leading += seen == 0;
    last_seen = is_there ? slot : last_seen;
    if (slot >= first) {
      const int64_t token = slot - first;
      const bool attended = is_there || p.tokens == 1;
      p.positions[row * p.tokens + token] = seen + leading - 1;
      p.attended[row * p.tokens + token] = attended ? 1.0f : 0.0f;
      kept = attended ? token + 1 : kept;
    }
  }
  p.last_seen[row] = static_cast<int32_t>(last_seen);
  p.last[row] = kept == 0 ? 0 : kept - 1;
  for (int64_t i = 0; i < p.taps - 1; ++i) {
    p.conv_rows[row * (p.taps - 1) + i] = kept + i;
  }
}

}  // namespace

void run_token_layout(const TokenLayoutProblem& problem) {
  for (int64_t row = 0; row < problem.batch; ++row) {
    lay_out(problem, row);
  }
}

}  // namespace lfm2
