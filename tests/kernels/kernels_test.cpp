// Every kernel against the scalar one, bit for bit, and the scalar one against plain double arithmetic. Buffers have
// exactly the size they need, so that AddressSanitizer sees a kernel that reads or writes beyond them.

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "c_api.h"
#include "expect.h"
#include "layout.h"
#include "moe.h"
#include "target.h"
#include "row_matrix.h"
#include "work.h"

namespace {

using lfm2::kGroup;
using lfm2::kTileBytes;
using lfm2::kTileRows;

struct Shape {
  int64_t tokens, width, inner, experts, top_k;
  int crowd;  // experts that get tokens at all; 0 for all
};

std::string describe(const Shape& s) {
  return "T=" + std::to_string(s.tokens) + " D=" + std::to_string(s.width) + " I=" + std::to_string(s.inner) +
         " E=" + std::to_string(s.experts) + " k=" + std::to_string(s.top_k) + " crowd=" + std::to_string(s.crowd);
}

// Values and weights of one random layer, and what it makes of them.
class Layer {
 public:
  Layer(const Shape& shape, uint32_t seed) : shape(shape), random_(seed) {
    x = normal(shape.tokens * shape.width, 1.0f);
    logits = normal(shape.tokens * shape.experts, 2.0f);
    bias = normal(shape.experts, 0.3f);
    for (int64_t expert = shape.crowd; shape.crowd > 0 && expert < shape.experts; ++expert) {
      bias[expert] = -10.0f;
    }
    gate_up = tiles(shape.experts * 2 * (shape.inner / kTileRows) * (shape.width / kGroup));
    down = tiles(shape.experts * (shape.width / kTileRows) * (shape.inner / kGroup));
  }

  std::vector<float> run(const char* kernels, int threads, bool normalize = true) const {
    std::vector<float> out(x.size(), 7.0f);
    const lfm2::MoeProblem problem = {
        x.data(),       {logits.data(), bias.data(), shape.experts, shape.top_k, normalize, 1.5f},
        gate_up.data(), down.data(),
        shape.tokens,   shape.width,
        shape.inner,    out.data()};
    const std::unique_ptr<void, void (*)(void*)> scratch(std::aligned_alloc(64, lfm2::moe_scratch_bytes(problem)),
                                                         std::free);
    lfm2::run_moe(problem, lfm2::target_by_name(kernels)->tiles, {threads, run_in_turn, nullptr}, scratch.get());
    return out;
  }

  // The same through the C interface, whose threads are real ones.
  std::vector<float> run_threads(const char* kernels, int threads) const {
    std::vector<float> out(x.size(), 7.0f);
    const int failure =
        lfm2_moe_ffn(kernels, threads, array(x), array(logits), array(bias), array(gate_up), array(down), shape.tokens,
                     shape.width, shape.inner, shape.experts, shape.top_k, 1, 1.5f, array(out));
    return failure == 0 ? out : std::vector<float>(x.size());
  }

  double weight(const std::vector<uint8_t>& all, int64_t first_tile, int64_t groups, int64_t row, int64_t input) const {
    const uint8_t* tile = all.data() + (first_tile + row / kTileRows * groups + input / kGroup) * kTileBytes;
    const int64_t in_row = row % kTileRows, in_group = input % kGroup;
    const uint8_t pair = tile[lfm2::kCodesOffset + (in_group % 16 / 4 * kTileRows + in_row) * 4 + in_group % 4];
    return ((in_group < 16 ? pair & 15 : pair >> 4) - 8) * scale_of(tile, in_row);
  }

  Shape shape;
  std::vector<float> x, logits, bias;
  std::vector<uint8_t> gate_up, down;

 private:
  template <typename T>
  static Lfm2Array array(const std::vector<T>& values) {
    return {values.data(), static_cast<int64_t>(values.size())};
  }

  static void run_in_turn(const void*, int workers, void (*task)(void*, int), void* context) {
    for (int worker = 0; worker < workers; ++worker) {
      task(context, worker);
    }
  }

  static double scale_of(const uint8_t* tile, int64_t row) {
    uint16_t half;
    std::memcpy(&half, tile + 2 * row, sizeof half);
    const double size = std::ldexp(1024 + (half & 1023), ((half >> 10) & 31) - 25);
    return half & 0x8000 ? -size : size;
  }

  std::vector<float> normal(int64_t count, float deviation) {
    std::normal_distribution<float> distribution(0.0f, deviation);
    std::vector<float> values(count);
    for (float& value : values) {
      value = distribution(random_);
    }
    return values;
  }

  // Random codes; scales between 2^-7 and 2^-5 of either sign.
  std::vector<uint8_t> tiles(int64_t count) {
    std::vector<uint8_t> bytes(count * kTileBytes);
    for (uint8_t& byte : bytes) {
      byte = static_cast<uint8_t>(random_());
    }
    for (int64_t tile = 0; tile < count; ++tile) {
      for (int row = 0; row < kTileRows; ++row) {
        const auto half = static_cast<uint16_t>((0x2000 + random_() % 0x800) | (random_() & 0x8000));
        std::memcpy(bytes.data() + tile * kTileBytes + 2 * row, &half, sizeof half);
      }
    }
    return bytes;
  }

  std::mt19937 random_;
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::vector<double> in_double(const Layer& layer) {
  const Shape& s = layer.shape;
  const int64_t width_groups = s.width / kGroup, inner_groups = s.inner / kGroup;
  std::vector<double> out(layer.x.size());
  std::vector<uint64_t> ranks(s.experts);
  std::vector<lfm2::Choice> choices(s.top_k);
  for (int64_t token = 0; token < s.tokens; ++token) {
    lfm2::choose_experts({layer.logits.data(), layer.bias.data(), s.experts, s.top_k, true, 1.5f}, token, ranks.data(),
                         choices.data());
    for (const lfm2::Choice& choice : choices) {
      std::vector<double> inner(s.inner);
      for (int64_t i = 0; i < s.inner; ++i) {
        const int64_t gate_tile = (choice.expert * inner_groups + i / kTileRows) * 2 * width_groups;
        double gate = 0, up = 0;
        for (int64_t d = 0; d < s.width; ++d) {
          const double x = layer.x[token * s.width + d];
          gate += x * layer.weight(layer.gate_up, gate_tile, width_groups, i % kTileRows, d);
          up += x * layer.weight(layer.gate_up, gate_tile + width_groups, width_groups, i % kTileRows, d);
        }
        inner[i] = gate / (1 + std::exp(-gate)) * up;
      }
      const int64_t down_tile = choice.expert * width_groups * inner_groups;
      for (int64_t d = 0; d < s.width; ++d) {
        double y = 0;
        for (int64_t i = 0; i < s.inner; ++i) {
          y += inner[i] * layer.weight(layer.down, down_tile, inner_groups, d, i);
        }
        out[token * s.width + d] += choice.weight * y;
      }
    }
  }
  return out;
}

double relative_error(const std::vector<float>& got, const std::vector<double>& want) {
  double error = 0, size = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    size += want[i] * want[i];
  }
  return got.empty() ? 0.0 : std::sqrt(error / size);
}

void test_shape(const Shape& shape, uint32_t seed) {
  const Layer layer(shape, seed);
  const std::vector<float> scalar = layer.run("scalar", 1);
  const double error = relative_error(scalar, in_double(layer));
  expect(error < 0.03, describe(shape) + ": scalar is off by " + std::to_string(error));
  for (auto name = lfm2::runnable_targets(); *name != nullptr; ++name) {
    expect(same_bits(layer.run(*name, 3), scalar), describe(shape) + ": " + *name + " differs from scalar");
    expect(same_bits(layer.run_threads(*name, 4), scalar), describe(shape) + ": " + *name + " differs on threads");
  }
  std::printf("%-40s int8 activations cost %.4f\n", describe(shape).c_str(), error);
}

// What is not finite stays in its token.
void test_not_finite() {
  const Shape shape = {9, 96, 64, 4, 2, 0};
  Layer layer(shape, 1);
  const std::vector<float> clean = layer.run("scalar", 1);
  layer.x[2 * shape.width + 40] = std::numeric_limits<float>::quiet_NaN();
  layer.x[4 * shape.width] = -std::numeric_limits<float>::infinity();
  layer.x[5 * shape.width + 1] = std::numeric_limits<float>::max();
  layer.x[6 * shape.width + 1] = std::numeric_limits<float>::denorm_min();
  for (int64_t expert = 0; expert < shape.experts; ++expert) {
    layer.logits[7 * shape.experts + expert] = std::numeric_limits<float>::quiet_NaN();
  }
  const std::vector<float> scalar = layer.run("scalar", 1);
  for (int64_t token : {0, 1, 3, 8}) {
    const size_t at = token * shape.width;
    expect(std::memcmp(&scalar[at], &clean[at], shape.width * sizeof(float)) == 0, "a NaN spread to another token");
  }
  for (int64_t token : {2, 4, 7}) {
    expect(std::isnan(scalar[token * shape.width]), "a NaN or infinity was lost");
  }
  for (auto name = lfm2::runnable_targets(); *name != nullptr; ++name) {
    const std::vector<float> out = layer.run(*name, 2);
    for (size_t i = 0; i < out.size(); ++i) {
      const bool same = std::isnan(scalar[i]) ? std::isnan(out[i]) : out[i] == scalar[i];
      expect(same, std::string(*name) + " treats what is not finite differently");
    }
  }
}

void test_quantize_extremes() {
  const float inputs[] = {0.0f, 1e-38f, 1e-31f, 1e-29f, 1.0f, 3e38f};
  for (auto name = lfm2::runnable_targets(); *name != nullptr; ++name) {
    for (float greatest : inputs) {
      std::vector<float> x(kGroup, greatest);
      x[3] = -greatest;
      std::vector<int8_t> codes(kGroup);
      float scale = 0;
      int32_t offset = 0;
      lfm2::target_by_name(*name)->tiles.quantize(x.data(), {codes.data(), &scale, &offset, 1}, 0, 0);
      const bool zero = greatest < 1e-30f;
      expect(codes[0] == (zero ? 0 : 127) && codes[3] == (zero ? 0 : -127), std::string(*name) + ": wrong codes");
      expect(offset == -8 * (zero ? 0 : 127 * (kGroup - 2)), std::string(*name) + ": wrong offset");
      expect(std::fabs(scale * codes[0] - greatest) <= 1e-6f * greatest + 1e-30f, std::string(*name) + ": wrong scale");
    }
  }
}

void test_routing() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float logits[] = {0.5f, 0.5f, -1.0f, nan, 0.5f};
  const float bias[] = {0.0f, 0.0f, 9.0f, 0.0f, 0.0f};
  uint64_t ranks[5];
  lfm2::Choice choices[5];
  lfm2::choose_experts({logits, bias, 5, 4, false, 2.0f}, 0, ranks, choices);
  const int want[] = {3, 2, 0, 1};  // NaN, then the bias, then equal scores by index
  for (int i = 0; i < 4; ++i) {
    expect(choices[i].expert == want[i], "choice " + std::to_string(i) + " is " + std::to_string(choices[i].expert));
  }
  expect(std::fabs(choices[1].weight - 2.0f / (1.0f + std::exp(1.0f))) < 1e-6f, "the bias entered a weight");
}

// Steps may throw on the host's threads, which it would not survive.
void test_no_memory() {
  const auto run_on_threads = [](const void*, int workers, void (*task)(void*, int), void* context) {
    std::vector<std::thread> threads;
    for (int worker = 0; worker < workers; ++worker) {
      threads.emplace_back(task, context, worker);
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
  };
  for (int64_t failing : {0, 17, 99}) {
    bool thrown = false;
    std::atomic<int> done = 0;
    try {
      lfm2::share_out({4, run_on_threads, nullptr}, 100, [&](int64_t task) {
        if (task == failing) {
          throw std::bad_alloc();
        }
        ++done;
      });
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    expect(thrown && done == 99, "a step without memory: " + std::to_string(done) + " others were done");
  }
}

void print_names(const char* what, const char* const* names) {
  std::printf("%s:", what);
  for (; *names != nullptr; ++names) {
    std::printf(" %s", *names);
  }
  std::printf("\n");
}

}  // namespace

// `--brief`: only the shapes that take every path, for where a processor is emulated a second time.
int main(int count, char** arguments) {
  const bool brief = count > 1 && std::strcmp(arguments[1], "--brief") == 0;
  const Shape shapes[] = {
      {1, 64, 96, 4, 2, 0},     // one token, odd inner groups
      {1, 32, 32, 1, 1, 0},     // the smallest
      {2, 96, 32, 3, 3, 0},     // all experts
      {5, 160, 224, 8, 1, 0},   // top 1, experts without a token
      {7, 96, 160, 6, 2, 2},    // all tokens on the same experts
      {33, 64, 64, 5, 4, 0},    // odd
      {65, 32, 96, 3, 1, 1},    // all on one expert: more than one segment
      {131, 64, 32, 4, 2, 0},   //
      {1030, 32, 32, 2, 1, 0},  // more than one pass
      {0, 64, 64, 4, 2, 0},     // nothing
  };
  uint32_t seed = 0;
  for (const Shape& shape : shapes) {
    test_shape(shape, ++seed);
  }
  std::mt19937 random(99);
  const auto below = [&random](int64_t end) { return static_cast<int64_t>(random() % end); };
  for (int i = 0; i < (brief ? 2 : 12); ++i) {
    const int64_t experts = 1 + below(9);
    const Shape shape = {1 + below(40), 32 * (1 + below(6)), 32 * (1 + below(6)),
                         experts,       1 + below(experts),  static_cast<int>(below(3))};
    test_shape(shape, ++seed);
  }
  test_not_finite();
  test_quantize_extremes();
  test_routing();
  test_no_memory();
  test_row_kernels(brief);
  test_attention_kernels();
  print_names("kernels", lfm2::runnable_targets());
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
