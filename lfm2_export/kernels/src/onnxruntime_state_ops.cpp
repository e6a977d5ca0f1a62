// The operators that keep a state: the short convolution and attention; onnxruntime_ops.cpp says what they take.

#include <cstring>
#include <vector>

#include "attention.h"
#include "checks.h"
#include "gated_conv.h"
#include "onnxruntime_kernel.h"
#include "target.h"

namespace lfm2 {
namespace {

// A convolution's weight as the kernels read it, made once, of a weight that the session keeps for good. What comes from
// anywhere else is turned in each call: an address says nothing of what lies there the next time.
class ConstantTaps {
 public:
  ConstantTaps(const OrtApi* api, const OrtKernelInfo* info, size_t index) {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    check(ort::KernelInfoGetConstantInputTensor::of(api)(info, index, &is_constant, &value));
    if (is_constant == 0 || value == nullptr) {
      return;
    }
    const Operand weight = operand_of(api, value);
    if (weight.kind != Kind::kFloat || weight.rank < 1 || weight.count < 1 || weight.count == kTooMany ||
        !weight.is_aligned(sizeof(float))) {
      return;  // refused when it is used
    }
    width_ = weight.sizes[0];
    taps_ = weight.count / width_;
    turned_.resize(static_cast<size_t>(weight.count));
    turn_taps(weight.as<float>(), width_, taps_, turned_.data());
  }

  bool are(int64_t width, int64_t taps) const { return width_ == width && taps_ == taps; }
  const float* data() const { return turned_.data(); }

 private:
  int64_t width_ = 0, taps_ = 0;
  std::vector<float> turned_;
};

class GatedConv {
 public:
  static constexpr const char* kName = "GatedConv";
  static constexpr int kInputs[] = {ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kInt64};
  static constexpr unsigned kOptionalInputs = 1u << 2;
  static constexpr int kOutputs[] = {ort::kFloat, ort::kFloat, ort::kFloat};
  static constexpr unsigned kOptionalOutputs = 1u << 2;

  GatedConv(const OrtApi* api, const OrtKernelInfo* info)
      : constant_(api, info, kWeight), has_window_(attribute_or(api, info, "window", 0) != 0) {}

  void compute(const Context& context) const {
    GatedConvProblem p = prepare({context.input(0), context.input(kWeight), context.input(2), context.input(3),
                                  context.input(4), context.input(5)});
    std::vector<float> turned;
    if (constant_.are(p.width, p.taps)) {
      p.weight = constant_.data();
    } else {
      turned.resize(static_cast<size_t>(p.width * p.taps));
      turn_taps(p.weight, p.width, p.taps, turned.data());
      p.weight = turned.data();
    }
    const int64_t out[] = {p.batch, p.tokens, p.width}, present[] = {p.batch, p.taps - 1, p.width};
    p.out = context.output(out, 3);
    p.present = context.output(present, 3, 1);
    if (has_window_) {
      const int64_t window[] = {p.batch, p.taps - 1 + p.tokens, p.width};
      p.window = context.output(window, 3, 2);
    }
    run_gated_conv(p, best_target().conv, context.pool());
  }

 private:
  static constexpr size_t kWeight = 1;
  ConstantTaps constant_;
  bool has_window_;
};

template <bool kInt8, bool kSliding>
class Attention {
 public:
  static constexpr const char* kName = kSliding ? (kInt8 ? "SlidingAttentionInt8" : "SlidingAttention")
                                                : (kInt8 ? "AttentionInt8" : "Attention");
  static constexpr int kCache = kInt8 ? ort::kUint8 : ort::kFloat;
  static constexpr int kInputs[] = {ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, kCache,
                                    kCache,      ort::kInt32, ort::kInt64, ort::kFloat, ort::kFloat, ort::kInt64};
  static constexpr unsigned kOptionalInputs = 0;
  static constexpr int kOutputs[] = {ort::kFloat, kCache, kCache};

  Attention(const OrtApi* api, const OrtKernelInfo* info)
      : attributes_{kName, attribute(api, info, "num_heads"), attribute(api, info, "kv_num_heads"),
                    float_attribute(api, info, "epsilon"), kInt8, kSliding ? attribute(api, info, "window") : 0,
                    kSliding ? attribute_or(api, info, "ring", 0) : 0} {
    if (kSliding) {
      Checks(kName).size("window", attributes_.window);
    }
    check(attributes_);
  }

  void compute(const Context& context) const {
    const AttentionOperands operands = {
        context.input(0), context.input(1), context.input(2), context.input(3), context.input(4),  context.input(5),
        context.input(6), context.input(7), context.input(8), context.input(9), context.input(10), context.input(11)};
    AttentionProblem p = prepare(attributes_, operands);
    const int64_t present[] = {p.batch, p.kv_heads, p.capacity, operands.past_key.sizes[3]};
    p.out = context.output(operands.q.sizes, operands.q.rank);
    p.key = context.output<uint8_t>(present, 4, 1);
    p.value = context.output<uint8_t>(present, 4, 2);
    carry_over(operands.past_key, p, p.key);
    carry_over(operands.past_value, p, p.value);
    if (p.batch * p.tokens > 0) {
      const ThreadPool pool = context.pool();
      run_attention(p, best_target().attention, pool, scratch_of(attention_scratch_bytes(p, pool.workers)));
    }
  }

 private:
  // What no token fills of a longer cache is zero, not what lay there before.
  static void carry_over(const Operand& past, const AttentionProblem& p, uint8_t* present) {
    if (past.data == present) {
      return;
    }
    const int64_t row = cache_row_bytes(p.head_dim, kInt8), held = past.sizes[2] * row, room = p.capacity * row;
    for (int64_t head = 0; head < p.batch * p.kv_heads && room > 0; ++head) {
      if (held > 0) {
        std::memcpy(present + head * room, past.as<uint8_t>() + head * held, held);
      }
      if (p.tokens != p.total) {
        std::memset(present + head * room + held, 0, room - held);
      }
    }
  }

  AttentionAttributes attributes_;
};

class TokenLayout {
 public:
  static constexpr const char* kName = "TokenLayout";
  static constexpr int kInputs[] = {ort::kInt64, ort::kInt64};
  static constexpr unsigned kOptionalInputs = 0;
  static constexpr int kOutputs[] = {ort::kInt32, ort::kInt64, ort::kFloat, ort::kInt64, ort::kInt64};

  TokenLayout(const OrtApi* api, const OrtKernelInfo* info) : taps_(attribute(api, info, "taps")) {
    Checks(kName).size("taps", taps_);
  }

  void compute(const Context& context) const {
    TokenLayoutProblem p = prepare(taps_, {context.input(0), context.input(1)});
    const int64_t rows[] = {p.batch, 1, 1}, tokens[] = {p.batch, p.tokens, 1}, kept[] = {p.batch, p.taps - 1};
    p.last_seen = context.output<int32_t>(rows, 1);
    p.positions = context.output<int64_t>(tokens, 2, 1);
    p.attended = context.output(tokens, 3, 2);
    p.conv_rows = context.output<int64_t>(kept, 2, 3);
    p.last = context.output<int64_t>(rows, 3, 4);  // as GatherND takes it
    run_token_layout(p);
  }

 private:
  int64_t taps_;
};

}  // namespace

std::vector<const OrtCustomOp*> state_ops() {
  static const OrtCustomOp ops[] = {described<GatedConv>(), described<Attention<false, false>>(),
                                    described<Attention<true, false>>(), described<Attention<false, true>>(),
                                    described<Attention<true, true>>(),  described<TokenLayout>()};
  return {&ops[0], &ops[1], &ops[2], &ops[3], &ops[4], &ops[5]};
}

}  // namespace lfm2
