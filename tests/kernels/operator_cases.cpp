#include "operator_cases.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace lfm2_test {
namespace {

namespace ort = lfm2::ort;

using Shape = std::vector<int64_t>;

constexpr size_t kMostInputs = 16;

class Maker {
 public:
  Maker(const std::string& op, Random& random) : random_(random) {
    made_.op = op;
    made_.on_threads = random.one_in(4);
    made_.inputs.reserve(kMostInputs);  // what `put` returns stays where it is
  }

  Case& made() { return made_; }

  void integer(const std::string& name, int64_t value) { made_.info.integers[name] = value; }

  OrtValue& put(const std::string& name, int type, const Shape& shape) {
    made_.names.push_back(name);
    made_.inputs.emplace_back(tensor_of(type, shape, random_.one_in(2)));
    return *made_.inputs.back();
  }

  void leave_out(const std::string& name) {
    made_.names.push_back(name);
    made_.inputs.emplace_back(std::nullopt);
  }

  void floats(const std::string& name, const Shape& shape, float deviation = 1.0f) {
    OrtValue& value = put(name, ort::kFloat, shape);
    for (int64_t i = elements_of(shape) - 1; i >= 0; --i) {
      value.as<float>()[i] = random_.normal() * deviation;
    }
  }

  void bytes(const std::string& name, const Shape& shape) {
    OrtValue& value = put(name, ort::kUint8, shape);
    for (int64_t i = elements_of(shape) - 1; i >= 0; --i) {
      value.as<uint8_t>()[i] = static_cast<uint8_t>(random_.bits());
    }
  }

  void optional_floats(const std::string& name, const Shape& shape) {
    random_.one_in(2) ? floats(name, shape) : leave_out(name);
  }

  void format(const std::string& prefix, int64_t bits, int64_t group) {
    integer(prefix + "bits", bits);
    integer(prefix + "block_size", group);
  }

  // What a product may take behind `before` inputs: what is added to x [1, tokens, width], and a norm's weights.
  void norm(size_t before, int64_t tokens, int64_t width) {
    if (random_.one_in(2)) {
      return;
    }
    while (made_.inputs.size() < before) {
      leave_out("left out " + std::to_string(made_.inputs.size()));
    }
    const bool has_delta = random_.one_in(2);
    has_delta ? floats("delta", {1, tokens, width}) : leave_out("delta");
    floats("gamma", {width});
    if (has_delta) {
      optional_floats("delta_gamma", {width});
    }
    made_.info.floats["epsilon"] = 1e-5f;
  }

  // [outer..., rows, columns] in codes, scales and perhaps zero points.
  void matrix(const std::string& name, Shape outer, int64_t rows, int64_t columns, int64_t bits, int64_t group) {
    outer.push_back(rows);
    const auto with = [&outer](int64_t last) {
      Shape shape = outer;
      shape.push_back(last);
      return shape;
    };
    bytes(name + " codes", with(columns * bits / 8));
    if (random_.one_in(3)) {
      OrtValue& halves = put(name + " scales", ort::kHalf, with(columns / group));
      for (int64_t i = elements_of(halves.shape) - 1; i >= 0; --i) {
        halves.as<uint16_t>()[i] = static_cast<uint16_t>(0x2000 + random_.between(0, 0x7ff));  // 2^-7 to 2^-5
      }
    } else {
      floats(name + " scales", with(columns / group), 0.01f);
    }
    if (bits == 4 && random_.one_in(2)) {
      bytes(name + " points", with((columns / group + 1) / 2));
    } else {
      leave_out(name + " points");
    }
  }

 private:
  Random& random_;
  Case made_;
};

// Small ones mostly: the plain kernels under a sanitizer take 10 ns for a product of two numbers.
int64_t random_group(Random& random) {
  return random.one_in(3) ? 16ll << random.between(0, 4) : 32;
}

// Widths are multiples of 32.
int64_t least_width(int64_t group) {
  return std::max<int64_t>(group, 32);
}

int64_t random_bits(Random& random) {
  return random.one_in(3) ? 8 : 4;
}

int64_t random_tokens(Random& random, int64_t tokens) {
  return tokens >= 0 ? tokens : random.one_in(8) ? random.of<int64_t>({0, 8, 9, 12, 13, 32, 33}) : random.between(1, 6);
}

Case product(Random& random, int64_t tokens) {
  Maker maker("MatMulNBits", random);
  const int64_t bits = random_bits(random), group = random_group(random);
  const int64_t rows = random.between(1, 40), columns = least_width(group) * random.between(1, 3);
  maker.integer("N", rows);
  maker.integer("K", columns);
  maker.format("", bits, group);
  const int64_t count = random_tokens(random, tokens);
  maker.floats("x", {1, count, columns});
  maker.matrix("w", {}, rows, columns, bits, group);
  maker.optional_floats("bias", {rows});
  maker.norm(5, count, columns);
  return maker.made();
}

Case projections(Random& random, int64_t tokens) {
  Maker maker("Projections", random);
  const int64_t bits = random_bits(random), group = random_group(random);
  const int64_t columns = least_width(group) * random.between(1, 2);
  maker.integer("K", columns);
  maker.format("", bits, group);
  const int64_t count = random_tokens(random, tokens);
  maker.floats("x", {1, count, columns});
  for (int i = 0; i < 3; ++i) {
    const std::string index = std::to_string(i);
    const int64_t rows = random.between(1, 50);
    maker.integer("N" + index, rows);
    const bool as_first = i == 0 || random.one_in(2);
    const int64_t its_bits = as_first ? bits : random_bits(random), its_group = as_first ? group : 32;
    if (!as_first) {
      maker.format("N" + index + "_", its_bits, its_group);
    }
    maker.matrix("w" + index, {}, rows, columns, its_bits, its_group);
  }
  maker.norm(10, count, columns);
  return maker.made();
}

Case feed_forward(Random& random, int64_t tokens) {
  Maker maker("FeedForward", random);
  const int64_t bits = random_bits(random), group = random_group(random), down_bits = random_bits(random);
  const int64_t down_group = random_group(random), width = least_width(group);
  const int64_t inner = least_width(down_group) * random.between(1, 2);
  maker.integer("inner", inner);
  maker.format("", bits, group);
  maker.format("down_", down_bits, down_group);
  const int64_t count = random_tokens(random, tokens);
  maker.floats("x", {1, count, width});
  maker.matrix("w1", {}, inner, width, bits, group);
  const bool as_first = random.one_in(2);
  const int64_t up_bits = as_first ? bits : random_bits(random), up_group = as_first ? group : 32;
  if (!as_first) {
    maker.format("up_", up_bits, up_group);
  }
  maker.matrix("w3", {}, inner, width, up_bits, up_group);
  maker.matrix("w2", {}, width, inner, down_bits, down_group);
  maker.norm(10, count, width);
  return maker.made();
}

Case sparse_moe(Random& random, int64_t wanted) {
  Maker maker("SparseMoe", random);
  const int64_t bits = random_bits(random), group = random_group(random);
  const int64_t width = least_width(group), inner = width;
  const int64_t experts = random.between(1, 4), tokens = random_tokens(random, wanted);
  maker.integer("top_k", random.between(1, experts));
  maker.integer("normalize", random.between(0, 1));
  maker.format("", bits, group);
  maker.made().info.floats["routed_scaling_factor"] = random.normal();
  maker.floats("x", {1, tokens, width});
  const bool makes_logits = random.one_in(2);
  makes_logits ? maker.leave_out("logits") : (void)maker.floats("logits", {tokens, experts});
  maker.optional_floats("bias", {experts});
  maker.matrix("gate_up", {experts}, 2 * inner, width, bits, group);
  maker.matrix("down", {experts}, width, inner, bits, group);
  if (makes_logits) {
    maker.floats("router", {width, experts});
    maker.norm(10, tokens, width);
  }
  return maker.made();
}

Case gated_conv(Random& random, int64_t wanted) {
  Maker maker("GatedConv", random);
  const int64_t batch = random.between(1, 3), tokens = random_tokens(random, wanted), width = random.between(1, 70);
  const int64_t taps = random.between(1, 8), held = taps - 1;
  maker.floats("projected", {batch, tokens, 3 * width});
  maker.floats("weight", {width, 1, taps});
  maker.optional_floats("bias", {width});
  maker.floats("state", {batch, held, width});
  OrtValue& attended = maker.put("attended", ort::kFloat, {batch, tokens, 1});
  for (int64_t i = 0; i < batch * tokens; ++i) {
    attended.as<float>()[i] = random.one_in(4) ? 0.0f : 1.0f;
  }
  OrtValue& rows = maker.put("rows", ort::kInt64, {batch, held});
  for (int64_t i = 0; i < batch * held; ++i) {
    rows.as<int64_t>()[i] = random.between(0, tokens + held - 1);
  }
  maker.made().is_constant = random.one_in(2);
  return maker.made();
}

void put_cache(Maker& maker, const std::string& name, const Shape& shape, bool is_int8) {
  if (!is_int8) {
    return maker.floats(name, shape);
  }
  maker.bytes(name, shape);
  OrtValue& rows = maker.made().input(name);
  for (int64_t end = elements_of(shape); end > 0; end -= shape[3]) {
    const float scale = 0.01f;
    std::memcpy(rows.as<uint8_t>() + end - 4, &scale, sizeof scale);
  }
}

// A first prompt, later tokens with a cache that grows by copying, with one that has room, or with a ring.
Case attention(const std::string& op, Random& random, int64_t wanted) {
  Maker maker(op, random);
  const bool is_int8 = op == "AttentionInt8" || op == "SlidingAttentionInt8", is_first = random.one_in(3);
  const int64_t kv_heads = random.between(1, 2), heads = kv_heads * random.between(1, 3);
  const int64_t head_dim = 16 * random.between(1, random.one_in(8) ? 16 : 5), batch = random.between(1, 3);
  const int64_t tokens = random_tokens(random, wanted), held = is_first ? 0 : random.between(1, 150);
  const int64_t total = std::max<int64_t>(1, held + tokens), past = random.one_in(2) ? held : total + 3;
  maker.integer("num_heads", heads);
  maker.integer("kv_num_heads", kv_heads);
  const int64_t window = op.rfind("Sliding", 0) == 0 ? random.between(1, 100) : 0;
  const bool is_ring = window > 0 && random.one_in(2);
  if (window > 0) {
    maker.integer("window", window);
    maker.integer("ring", is_ring);
  }
  maker.made().info.floats["epsilon"] = 1e-5f;
  maker.floats("q", {batch, tokens, heads * head_dim});
  maker.floats("k", {batch, tokens, kv_heads * head_dim});
  maker.floats("v", {batch, tokens, kv_heads * head_dim});
  maker.floats("q_norm", {head_dim});
  maker.floats("k_norm", {head_dim});
  // A call without tokens behind an empty cache has no position at all: it gets room for the one that the mask names.
  const int64_t ring = (window + 63) / 64 * 64 + 64 * random.between(0, 1);
  const int64_t room = is_ring ? ring : std::max(past, total - tokens);
  const Shape cache = {batch, kv_heads, room, head_dim + (is_int8 ? 4 : 0)};
  put_cache(maker, "past_key", cache, is_int8);
  put_cache(maker, "past_value", cache, is_int8);
  OrtValue& last = maker.put("seqlens_k", ort::kInt32, {batch, 1});
  OrtValue& mask = maker.put("attention_mask", ort::kInt64, {batch, total});
  for (int64_t row = 0; row < batch; ++row) {
    last.as<int32_t>()[row] = static_cast<int32_t>(random.one_in(2) ? total - 1 : random.between(0, total - 1));
    for (int64_t i = 0; i < total; ++i) {
      mask.as<int64_t>()[row * total + i] = i <= last.as<int32_t>()[row] && !random.one_in(20);
    }
  }
  maker.floats("cos", {total + 2, head_dim / 2});
  maker.floats("sin", {total + 2, head_dim / 2});
  OrtValue& positions = maker.put("position_ids", ort::kInt64, {batch, tokens});
  for (int64_t i = 0; i < batch * tokens; ++i) {
    positions.as<int64_t>()[i] = random.between(0, total);
  }
  // Cases are run twice: in place, a call without room writes over what its first token sees, so the second run sees less.
  const int64_t needed = is_ring ? std::min(total, tokens + window - 1) : total;
  maker.made().in_place = cache[2] >= needed && random.one_in(2);
  return maker.made();
}

Case token_layout(Random& random, int64_t wanted) {
  Maker maker("TokenLayout", random);
  const int64_t batch = random.between(0, 3), tokens = random_tokens(random, wanted);
  const int64_t total = tokens + random.between(0, 5);
  maker.integer("taps", random.between(1, 8));
  OrtValue& mask = maker.put("attention_mask", ort::kInt64, {batch, total});
  for (int64_t i = 0; i < batch * total; ++i) {
    mask.as<int64_t>()[i] = random.one_in(4) ? 0 : 1;
  }
  OrtValue& ids = maker.put("input_ids", ort::kInt64, {batch, tokens});
  std::fill_n(ids.as<int64_t>(), batch * tokens, int64_t{1});
  return maker.made();
}

}  // namespace

const std::vector<std::string> kOperators = {"MatMulNBits", "Projections", "FeedForward",   "SparseMoe",
                                             "GatedConv",   "Attention",   "AttentionInt8", "TokenLayout",
                                             "SlidingAttention", "SlidingAttentionInt8"};

Case random_case(const std::string& op, Random& random, int64_t tokens) {
  if (op == "MatMulNBits") return product(random, tokens);
  if (op == "Projections") return projections(random, tokens);
  if (op == "FeedForward") return feed_forward(random, tokens);
  if (op == "SparseMoe") return sparse_moe(random, tokens);
  if (op == "GatedConv") return gated_conv(random, tokens);
  if (op == "TokenLayout") return token_layout(random, tokens);
  return attention(op, random, tokens);
}

OrtValue& Case::input(const std::string& name) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end() || !inputs[static_cast<size_t>(found - names.begin())].has_value()) {
    std::abort();
  }
  return *inputs[static_cast<size_t>(found - names.begin())];
}

std::string Case::described() const {
  std::string text = op;
  for (const auto& [name, value] : info.integers) {
    text += " " + name + "=" + std::to_string(value);
  }
  for (const auto& [name, value] : info.floats) {
    text += " " + name + "=" + std::to_string(value);
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    text += "\n  " + names[i] + ":";
    if (inputs[i].has_value()) {
      text += " type " + std::to_string(inputs[i]->type);
      for (const int64_t size : inputs[i]->shape) {
        text += " " + std::to_string(size);
      }
    }
  }
  return text + (in_place ? "\n  in place" : "") + (on_threads ? "\n  on threads" : "") + "\n";
}

Result run(const Case& c) {
  OrtKernelInfo info = c.info;
  if (c.is_constant && c.inputs.size() > 1 && c.inputs[1].has_value()) {
    info.constants[1] = &*c.inputs[1];
  }
  const Kernel kernel(c.op, info);
  return kernel.fault().empty() ? call(kernel, c) : Result{kernel.fault(), {}};
}

Result call(const Kernel& kernel, const Case& c) {
  OrtKernelContext context;
  for (const std::optional<OrtValue>& value : c.inputs) {
    context.inputs.push_back(value.has_value() ? &*value : nullptr);
  }
  context.on_threads = c.on_threads;
  if (c.in_place && c.inputs.size() > 6 && c.inputs[5].has_value() && c.inputs[6].has_value()) {
    context.outputs[1] = *c.inputs[5];
    context.outputs[2] = *c.inputs[6];
  }
  Result result;
  result.fault = kernel.run(context);
  result.outputs = std::move(context.outputs);
  return result;
}

int unwritten_output(const Result& result) {
  uint32_t unwritten;
  std::memset(&unwritten, kUnwritten, sizeof unwritten);
  for (const auto& [index, value] : result.outputs) {
    for (int64_t i = value.type == ort::kFloat ? elements_of(value.shape) - 1 : -1; i >= 0; --i) {
      uint32_t bits;
      std::memcpy(&bits, value.as<float>() + i, sizeof bits);
      if (bits == unwritten || !std::isfinite(value.as<float>()[i])) {
        return static_cast<int>(index);
      }
    }
  }
  return -1;
}

bool same_bits(const Result& a, const Result& b) {
  return a.fault == b.fault && a.outputs.size() == b.outputs.size() &&
         std::all_of(a.outputs.begin(), a.outputs.end(), [&b](const auto& output) {
           const auto& [index, value] = output;
           const auto other = b.outputs.find(index);
           const auto bytes = static_cast<size_t>(elements_of(value.shape) * element_bytes(value.type));
           return other != b.outputs.end() && other->second.shape == value.shape &&
                  (bytes == 0 || std::memcmp(value.memory.get(), other->second.memory.get(), bytes) == 0);
         });
}

}  // namespace lfm2_test
