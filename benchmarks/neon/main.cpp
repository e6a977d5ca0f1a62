// One operator of one set of kernels, a number of times, for neon_instructions.py, which counts the instructions of some
// times more:
//
//   neon_instructions KERNELS TIMES product BITS GROUP TOKENS | attention INT8 TOKENS | conv TOKENS | router TOKENS
//                                   | quantize BITS | swiglu BITS | norm
//
// Prints how many of the operator's units one time has: weights times tokens, or what unit_of in the script says.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "attention.h"
#include "row_work.h"
#include "target.h"

namespace {

using namespace lfm2;

// Of numbers of about 1, that differ.
std::vector<float> values(int64_t count) {
  std::vector<float> found(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    found[static_cast<size_t>(i)] = static_cast<float>((i * 7919) % 1021 - 510) * (1.0f / 300);
  }
  return found;
}

std::vector<uint8_t> bytes(int64_t count) {
  std::vector<uint8_t> found(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    found[static_cast<size_t>(i)] = static_cast<uint8_t>(i * 7919 >> 3);
  }
  return found;
}

std::vector<uint16_t> halves(int64_t count) { return std::vector<uint16_t>(static_cast<size_t>(count), 0x2c66); }

struct Aligned {
  explicit Aligned(size_t bytes) : memory(std::aligned_alloc(64, (bytes + 64) / 64 * 64)) { std::memset(memory, 0, bytes); }
  ~Aligned() { std::free(memory); }
  void* memory;
};

// Calls what is left to do `times` times; returns the units of one.
int64_t repeat(int times, int64_t units, const std::function<void()>& step) {
  for (int i = 0; i < times; ++i) {
    step();
  }
  return units;
}

int64_t product(const Target& target, int times, int bits, int64_t group, int64_t tokens) {
  constexpr int64_t kRowCount = 32, kColumns = 1024;
  const auto codes = bytes(kRowCount * kColumns * bits / 8);
  const auto scales = halves(kRowCount * kColumns / group);
  const auto x = values(tokens * kColumns);
  const RowMatrix w = {codes.data(), scales.data(), nullptr, kRowCount, kColumns, group, bits, true};
  Arena counted(nullptr);
  SharedInput input;
  input.take(counted, tokens, w);
  const Aligned room(counted.used());
  Arena arena(room.memory);
  input = {};
  input.take(arena, tokens, w);
  RowInput in = {};
  in.x = x.data();
  input.quantize(target.rows, kNoPool, in, kColumns);
  std::vector<float> out(static_cast<size_t>(tokens * kRowCount));
  return repeat(times, kRowCount * kColumns * tokens,
                [&] { multiply(target.rows, w, input.of(w), out.data(), kRowCount); });
}

int64_t attention(const Target& target, int times, bool is_int8, int64_t tokens) {
  constexpr int64_t kHeads = 4, kKvHeads = 1, kHeadDim = 64, kPositions = 1024;
  AttentionProblem p = {};
  const auto q = values(tokens * kHeads * kHeadDim), k = values(tokens * kKvHeads * kHeadDim), norm = values(kHeadDim);
  const auto cos = values(kPositions * kHeadDim / 2), sin = values(kPositions * kHeadDim / 2);
  std::vector<int64_t> ids, mask(kPositions, 1);
  for (int64_t i = 0; i < tokens; ++i) {
    ids.push_back(kPositions - tokens + i);
  }
  const int32_t last = kPositions - 1;
  Aligned key(kKvHeads * kPositions * cache_row_bytes(kHeadDim, is_int8));
  Aligned value(kKvHeads * kPositions * cache_row_bytes(kHeadDim, is_int8));
  std::vector<float> out(static_cast<size_t>(tokens * kHeads * kHeadDim));
  p = {q.data(), k.data(), k.data(), norm.data(), norm.data(), cos.data(), sin.data(), ids.data(), mask.data(), &last,
       static_cast<uint8_t*>(key.memory), static_cast<uint8_t*>(value.memory), out.data(), 1, tokens, kPositions,
       kPositions, kPositions, kHeads, kKvHeads, kHeadDim, 0, 1e-5f, is_int8, false};
  const Aligned scratch(attention_scratch_bytes(p, 1));
  return repeat(times, tokens * kHeads * kPositions * kHeadDim,
                [&] { run_attention(p, target.attention, kNoPool, scratch.memory); });
}

int64_t conv(const Target& target, int times, int64_t tokens) {
  constexpr int64_t kWidth = 512, kTaps = 3;
  const auto projected = values(tokens * 3 * kWidth), weight = values(kTaps * kWidth), state = values(2 * kWidth);
  const std::vector<float> attended(static_cast<size_t>(tokens), 1.0f);
  const int64_t rows[] = {tokens, tokens + 1};
  std::vector<float> out(static_cast<size_t>(tokens * kWidth)), present(2 * kWidth);
  const GatedConvProblem p = {projected.data(), weight.data(), nullptr, state.data(), attended.data(), rows, out.data(),
                              present.data(), nullptr, 1, tokens, kWidth, kTaps};
  return repeat(times, tokens * kWidth, [&] { run_gated_conv(p, target.conv, kNoPool); });
}

int64_t router(const Target& target, int times, int64_t tokens) {
  constexpr int64_t kInputs = 512, kOutputs = 32;
  const auto x = values(tokens * kInputs), w = values(kInputs * kOutputs);
  std::vector<float> out(static_cast<size_t>(tokens * kOutputs));
  const FloatMatMulProblem p = {x.data(), w.data(), tokens, kInputs, kOutputs, out.data()};
  return repeat(times, tokens * kInputs * kOutputs, [&] { run_float_matmul(p, target.floats, kNoPool); });
}

// What lies between the products, of one token.
int64_t between(const Target& target, int times, const char* what, int bits) {
  constexpr int64_t kColumns = 2048;
  const auto x = values(kColumns), delta = values(kColumns), gamma = values(kColumns);
  std::vector<float> sum(kColumns), to(kColumns), scales(kColumns / kGroupInputs), sums(kColumns / kGroupInputs);
  std::vector<int8_t> codes(kColumns);
  const RowActivations all = {codes.data(), scales.data(), sums.data(), 1, kColumns, bits, false};
  const RowInput in = {x.data(), delta.data(), gamma.data(), nullptr, 1e-5f, sum.data()};
  return repeat(times, kColumns, [&] {
    if (std::strcmp(what, "norm") == 0) {
      target.rows.normalize(in, kColumns, 0, to.data());
    } else if (std::strcmp(what, "quantize") == 0) {
      target.rows.quantize(x.data(), kColumns, all, 0);
    } else {
      for (int64_t group = 0; group < kColumns / kGroupInputs; ++group) {
        target.rows.swiglu(x.data() + group * kGroupInputs, delta.data() + group * kGroupInputs, 1, all, group, 0);
      }
    }
  });
}

}  // namespace

int main(int count, char** arguments) {
  const Target* target = count > 3 ? target_by_name(arguments[1]) : nullptr;
  if (target == nullptr) {
    std::fprintf(stderr, "neon_instructions: no such kernels here\n");
    return 2;
  }
  const int times = std::atoi(arguments[2]);
  const char* what = arguments[3];
  const auto number = [&](int index) { return count > index ? std::atoll(arguments[index]) : 0; };
  const auto is = [what](const char* name) { return std::strcmp(what, name) == 0; };
  const int64_t units = is("product") ? product(*target, times, static_cast<int>(number(4)), number(5), number(6))
                        : is("attention") ? attention(*target, times, number(4) != 0, number(5))
                        : is("conv")      ? conv(*target, times, number(4))
                        : is("router")    ? router(*target, times, number(4))
                                          : between(*target, times, what, static_cast<int>(number(4)));
  std::printf("%lld\n", static_cast<long long>(units));
  return 0;
}
