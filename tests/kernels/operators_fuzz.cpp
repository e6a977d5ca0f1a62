// Our operators for ONNX Runtime against calls that nobody would make: attributes, shapes, types and values of a graph that
// wants to hurt. Each is refused in words, or runs within its memory and writes all of its outputs.
//
//   operators_fuzz [--cases N | --seconds N] [--seed N]      prints the seed of what went wrong, and exits with 1

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>

#include "operator_cases.h"

namespace {

namespace ort = lfm2::ort;
using lfm2_test::Case;
using lfm2_test::Random;

constexpr int64_t kGreatest = std::numeric_limits<int64_t>::max(), kLeast = std::numeric_limits<int64_t>::min();

int64_t odd_integer(Random& random, int64_t was) {
  const auto raised = [was](uint64_t by) { return static_cast<int64_t>(static_cast<uint64_t>(was) + by); };
  switch (random.between(0, 8)) {
    case 0: return random.of<int64_t>({0, -1, 1, 2, 3, 7, 16, 31, 33, 48, 64, 100, 256, kGreatest, kLeast});
    case 1: return raised(1ull << random.between(28, 63));
    case 2: return raised(random.bits() << random.between(0, 63));
    case 3: return raised(static_cast<uint64_t>(random.between(-2, 2)));
    case 4: return raised(static_cast<uint64_t>(was) * static_cast<uint64_t>(random.between(0, 3)));
    case 5: return was / 2;
    case 6: return static_cast<int64_t>(0 - static_cast<uint64_t>(was));
    case 7: return static_cast<int64_t>(1ull << random.between(0, 62));
    default: return static_cast<int64_t>(random.bits());
  }
}

float odd_float(Random& random) {
  return random.of<float>({0.0f, -0.0f, -1.0f, 1e-38f, 1e-45f, 1e30f, -3e38f, NAN, INFINITY, -INFINITY, 1e-5f});
}

void spoil_attribute(Case& c, Random& random) {
  auto& [integers, floats, constants] = c.info;
  if (integers.empty() && floats.empty()) {
    return;
  }
  const auto at = random.between(0, static_cast<int64_t>(integers.size() + floats.size()) - 1);
  if (at < static_cast<int64_t>(integers.size())) {
    const auto found = std::next(integers.begin(), at);
    if (random.one_in(20)) {
      integers.erase(found);
    } else {
      found->second = odd_integer(random, found->second);
    }
  } else {
    std::next(floats.begin(), at - static_cast<int64_t>(integers.size()))->second = odd_float(random);
  }
}

std::optional<OrtValue>& some_input(Case& c, Random& random) {
  return c.inputs[static_cast<size_t>(random.between(0, static_cast<int64_t>(c.inputs.size()) - 1))];
}

// Another shape, in memory of its own; now and then one whose product would wrap to the size that there is.
void spoil_shape(Case& c, Random& random) {
  std::optional<OrtValue>& value = some_input(c, random);
  if (!value.has_value()) {
    return;
  }
  std::vector<int64_t> shape = value->shape;
  const auto axis = static_cast<size_t>(random.between(0, std::max<int64_t>(0, static_cast<int64_t>(shape.size()) - 1)));
  const int64_t small = shape.empty() ? 1 : shape[axis] & 0xffffff;  // an axis that is huge beside one of 0 shrinks
  switch (shape.empty() ? 5 : random.between(0, 6)) {
    case 0: shape[axis] = std::max<int64_t>(0, small + random.between(-2, 2)); break;
    case 1: shape[axis] = random.of<int64_t>({0, 1, 2, small * 2, small / 2}); break;
    case 2: std::swap(shape[axis], shape[0]); break;
    case 3: shape.erase(shape.begin() + static_cast<int64_t>(axis)); break;
    case 4: shape[axis] = 0, shape.push_back(odd_integer(random, 1) & kGreatest); break;  // no elements at all
    case 5: shape.insert(shape.begin(), static_cast<size_t>(random.between(1, 9)), 1); break;
    default: shape = {std::max<int64_t>(0, lfm2_test::elements_of(shape))};
  }
  const int64_t elements = lfm2_test::elements_of(shape);
  if (elements < 0) {
    return;
  }
  OrtValue made = lfm2_test::tensor_of(value->type, shape, random.one_in(2));
  const int64_t shared = std::min(elements, lfm2_test::elements_of(value->shape));
  std::memcpy(made.memory.get(), value->memory.get(),
              static_cast<size_t>(shared * lfm2_test::element_bytes(value->type)));
  value = made;
}

void spoil_type(Case& c, Random& random) {
  std::optional<OrtValue>& value = some_input(c, random);
  if (value.has_value()) {
    constexpr int kString = 8, kDouble = 11;
    const int type = random.of<int>({ort::kFloat, ort::kUint8, ort::kInt32, ort::kInt64, ort::kHalf, kString, kDouble});
    value = lfm2_test::tensor_of(type, value->shape);
  }
}

void spoil_value(OrtValue& value, int64_t at, Random& random) {
  switch (value.type) {
    case ort::kFloat: value.as<float>()[at] = odd_float(random); break;
    case ort::kInt32: value.as<int32_t>()[at] = static_cast<int32_t>(odd_integer(random, value.as<int32_t>()[at])); break;
    case ort::kInt64: value.as<int64_t>()[at] = odd_integer(random, value.as<int64_t>()[at]); break;
    case ort::kHalf: value.as<uint16_t>()[at] = static_cast<uint16_t>(random.bits()); break;
    default: value.as<uint8_t>()[at] = static_cast<uint8_t>(random.bits());
  }
}

void spoil_values(Case& c, Random& random) {
  std::optional<OrtValue>& value = some_input(c, random);
  if (!value.has_value() || lfm2_test::elements_of(value->shape) < 1) {
    return;
  }
  for (int64_t i = random.between(1, 3); i > 0; --i) {
    spoil_value(*value, random.between(0, lfm2_test::elements_of(value->shape) - 1), random);
  }
}

void spoil_presence(Case& c, Random& random) {
  if (random.one_in(2)) {
    some_input(c, random).reset();
  } else if (random.one_in(2)) {
    c.inputs.resize(static_cast<size_t>(random.between(0, static_cast<int64_t>(c.inputs.size()))));
  } else {
    const std::optional<OrtValue> other = some_input(c, random);  // two inputs from one tensor
    some_input(c, random) = other;
  }
}

using Spoil = std::function<void(Case&, Random&)>;

void spoil(Case& c, Random& random) {
  static const std::vector<Spoil> kinds = {spoil_attribute, spoil_attribute, spoil_shape, spoil_shape,
                                           spoil_type,      spoil_values,    spoil_values, spoil_presence};
  for (int64_t i = random.between(1, 3); i > 0 && !c.inputs.empty(); --i) {
    random.of(kinds)(c, random);
  }
}

struct Counts {
  int64_t refused = 0, ran = 0;
};

// Empty, or what is wrong.
std::string check_case(uint64_t seed, Counts& counts) {
  Random random(seed);
  Case c = lfm2_test::random_case(random.of(lfm2_test::kOperators), random);
  const bool is_spoilt = !random.one_in(5);
  if (is_spoilt) {
    spoil(c, random);
  }
  const lfm2_test::Result result = lfm2_test::run(c);
  (result.fault.empty() ? counts.ran : counts.refused) += 1;
  if (!is_spoilt && !result.fault.empty()) {
    return "what fits was refused: " + result.fault + "\n" + c.described();
  }
  if (!is_spoilt && lfm2_test::unwritten_output(result) >= 0) {
    return "output " + std::to_string(lfm2_test::unwritten_output(result)) + " is not whole\n" + c.described();
  }
  if (result.fault.size() > 300 || result.fault.find('\n') != std::string::npos) {
    return "no line: " + result.fault;
  }
  return "";
}

struct Options {
  int64_t cases = 3000, seconds = 0;
  uint64_t seed = 1;
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    const int64_t value = std::atoll(argv[i + 1]);
    if (name == "--cases") {
      options.cases = value;
    } else if (name == "--seconds") {
      options.cases = kGreatest;
      options.seconds = value;
    } else if (name == "--seed") {
      options.seed = static_cast<uint64_t>(value);
    }
  }
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse(argc, argv);
  const auto start = std::chrono::steady_clock::now();
  const auto is_time = [&] {
    return options.seconds == 0 || std::chrono::steady_clock::now() - start < std::chrono::seconds(options.seconds);
  };
  const bool says_seeds = std::getenv("LFM2_FUZZ_SEEDS") != nullptr;  // the last one is that of a crash
  Counts counts;
  for (int64_t i = 0; i < options.cases && is_time(); ++i) {
    const uint64_t seed = options.seed * 1000000007 + static_cast<uint64_t>(i);
    if (says_seeds) {
      std::fprintf(stderr, "case %lld\n", static_cast<long long>(i));
    }
    const std::string wrong = check_case(seed, counts);
    if (!wrong.empty()) {
      std::printf("FAILED: case %lld of seed %llu: %s\n", static_cast<long long>(i),
                  static_cast<unsigned long long>(options.seed), wrong.c_str());
      return 1;
    }
  }
  std::printf("%lld calls refused, %lld ran\n", static_cast<long long>(counts.refused),
              static_cast<long long>(counts.ran));
  return counts.refused > 0 && counts.ran > 0 ? 0 : 1;
}
