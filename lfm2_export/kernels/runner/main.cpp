// lfm2_native_run MODEL.pte --ids FILE --max-new-tokens N [--threads N]
//
// In: an ExecuTorch program forward(tokens int64 [1, T], start_pos int64 [1]) -> logits [1, 1, V], and a file of token
// ids separated by white space. Out: the greedy continuation's ids on one line of stdout, tokens per second on stderr.
// Needs no Python: an example of what an app on a phone does. Exit codes: 0 done, 2 the input was wrong, 3 the machine
// could not.

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>
#include <executorch/runtime/platform/platform.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

// The wheel has the thread pool's library but not its header; these are the two symbols of it that size the pool.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

using executorch::aten::ScalarType;
using executorch::extension::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using Seconds = std::chrono::duration<double>;

constexpr int kExitInput = 2;
constexpr int kExitMachine = 3;

struct Failure : std::runtime_error {
  Failure(int exit_code, const std::string& message) : std::runtime_error(message), exit_code(exit_code) {}
  int exit_code;
};

struct Arguments {
  std::string model;
  std::string ids;
  int64_t max_new_tokens = 0;
  int64_t threads = 0;  // 0: as many as ExecuTorch takes
};

int64_t to_integer(const std::string& text, const std::string& place) {
  int64_t value = 0;
  const auto end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stop != end || value < 0) {
    throw Failure(kExitInput, place + ": '" + text + "' is not a whole number");
  }
  return value;
}

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name.rfind("--", 0) != 0 && arguments.model.empty()) {
      arguments.model = name;
      continue;
    }
    if (i + 1 == argc) {
      throw Failure(kExitInput, name + ": has no value");
    }
    const std::string value = argv[++i];
    if (name == "--ids") {
      arguments.ids = value;
    } else if (name == "--max-new-tokens") {
      arguments.max_new_tokens = to_integer(value, name);
    } else if (name == "--threads") {
      arguments.threads = to_integer(value, name);
    } else {
      throw Failure(kExitInput, name + ": is not an option");
    }
  }
  if (arguments.model.empty() || arguments.ids.empty() || arguments.max_new_tokens < 1) {
    throw Failure(kExitInput, "usage: lfm2_native_run MODEL.pte --ids FILE --max-new-tokens N [--threads N]");
  }
  return arguments;
}

std::vector<int64_t> read_ids(const std::string& path) {
  std::ifstream file(path);
  if (!file) {
    throw Failure(kExitInput, path + ": cannot be read");
  }
  std::vector<int64_t> ids;
  for (std::string word; file >> word;) {
    ids.push_back(to_integer(word, path));
  }
  if (ids.empty()) {
    throw Failure(kExitInput, path + ": holds no token ids");
  }
  return ids;
}

// A loaded program that keeps its state from call to call.
class Model {
 public:
  explicit Model(const std::string& path) : path_(path), module_(path, Module::LoadMode::Mmap) {
    if (!std::filesystem::is_regular_file(path)) {
      throw Failure(kExitInput, path + ": no such file");
    }
    check(module_.load(executorch::runtime::Program::Verification::InternalConsistency),
          "is damaged or of another version");
    check_signature();
    const Error loaded = module_.load_forward();
    check(loaded, loaded == Error::OperatorMissing
                      ? "calls operators that this program was built without, named above; export with --moe-op lfm2"
                      : "cannot be used here");
    context_ = constant("get_max_context_len", constant("get_max_seq_len", 0));
    vocabulary_ = constant("get_vocab_size", 0);
    read_ends();
  }

  int64_t context() const { return context_; }
  int64_t vocabulary() const { return vocabulary_; }
  bool ends(int64_t token) const { return ends_.count(token) > 0; }

  // The most probable token after `tokens`, which start at position `start`.
  int64_t next(std::vector<int64_t>& tokens, int64_t start) {
    const auto shape = static_cast<executorch::aten::SizesType>(tokens.size());
    const auto input = executorch::extension::from_blob(tokens.data(), {1, shape}, ScalarType::Long);
    const auto position = executorch::extension::from_blob(&start, {1}, ScalarType::Long);
    const auto outputs = module_.forward({EValue(input), EValue(position)});
    check(outputs.error(), "failed");
    const auto logits = outputs->at(0).toTensor();
    const auto vocabulary = logits.size(logits.dim() - 1);
    check(logits.numel() > 0 ? Error::Ok : Error::InvalidProgram, "gives no logits");
    const float* values = logits.const_data_ptr<float>() + (logits.numel() - vocabulary);
    return std::max_element(values, values + vocabulary) - values;
  }

 private:
  void check(Error error, const std::string& meaning) const {
    if (error != Error::Ok) {
      throw Failure(kExitInput, path_ + ": " + meaning + " (" + executorch::runtime::to_string(error) + ")");
    }
  }

  // forward(int64 [1, T], int64 [1]) -> float32; reading the outputs of anything else would be undefined.
  void check_signature() {
    const auto forward = module_.method_meta("forward");
    check(forward.error(), "has no method forward");
    const auto is = [](const auto& tensor, ScalarType dtype, size_t rank) {
      return tensor.ok() && tensor->scalar_type() == dtype && tensor->sizes().size() == rank;
    };
    const bool fits = forward->num_inputs() == 2 && forward->num_outputs() == 1 &&
                      is(forward->input_tensor_meta(0), ScalarType::Long, 2) &&
                      is(forward->input_tensor_meta(1), ScalarType::Long, 1) &&
                      is(forward->output_tensor_meta(0), ScalarType::Float, 3);
    check(fits ? Error::Ok : Error::InvalidProgram, "is no language model forward(tokens, start_pos) -> logits");
  }

  bool has(const std::string& method) {
    const auto names = module_.method_names();
    return names.ok() && names->count(method) > 0;
  }

  int64_t constant(const std::string& method, int64_t otherwise) {
    if (!has(method)) {
      return otherwise;
    }
    const auto values = module_.execute(method);
    check(values.error(), "failed in " + method);
    return !values->empty() && values->front().isInt() ? values->front().toInt() : otherwise;
  }

  void read_ends() {
    if (!has("get_eos_ids")) {
      return;
    }
    const auto values = module_.execute("get_eos_ids");
    check(values.error(), "failed in get_eos_ids");
    for (const EValue& value : *values) {
      if (value.isInt()) {
        ends_.insert(value.toInt());
      }
    }
  }

  std::string path_;
  Module module_;
  int64_t context_ = 0;
  int64_t vocabulary_ = 0;
  std::set<int64_t> ends_;
};

void set_threads(int64_t threads) {
  if (threads == 0) {
    return;
  }
  const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  if (threads > cores) {
    throw Failure(kExitInput, "--threads " + std::to_string(threads) + ": this machine has " + std::to_string(cores));
  }
  executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool(static_cast<uint32_t>(threads));
}

void check_ids(const std::vector<int64_t>& ids, const Arguments& arguments, const Model& model) {
  const auto prompt = static_cast<int64_t>(ids.size());
  if (model.context() > 0 && arguments.max_new_tokens > model.context() - prompt) {
    throw Failure(kExitInput, arguments.ids + ": " + std::to_string(ids.size()) + " tokens and " +
                                  std::to_string(arguments.max_new_tokens) +
                                  " new ones exceed the program's context of " + std::to_string(model.context()));
  }
  const int64_t greatest = *std::max_element(ids.begin(), ids.end());
  if (model.vocabulary() > 0 && greatest >= model.vocabulary()) {
    throw Failure(kExitInput, arguments.ids + ": token " + std::to_string(greatest) + " is beyond the vocabulary of " +
                                  std::to_string(model.vocabulary()));
  }
}

void generate(Model& model, const Arguments& arguments) {
  std::vector<int64_t> tokens = read_ids(arguments.ids);
  check_ids(tokens, arguments, model);
  const size_t prompt = tokens.size();
  int64_t position = 0;
  int64_t made = 0;
  Seconds prefill{}, decode{};
  while (made < arguments.max_new_tokens) {
    const auto start = std::chrono::steady_clock::now();
    const int64_t token = model.next(tokens, position);
    (position == 0 ? prefill : decode) += std::chrono::steady_clock::now() - start;
    position += static_cast<int64_t>(tokens.size());
    tokens = {token};
    std::printf(made == 0 ? "%lld" : " %lld", static_cast<long long>(token));
    ++made;
    if (model.ends(token)) {
      break;
    }
  }
  std::printf("\n");
  std::fprintf(stderr, "prefill: %zu tokens, %.1f tokens/s\n", prompt, prompt / prefill.count());
  if (made > 1) {
    std::fprintf(stderr, "decode: %lld tokens, %.1f tokens/s\n", static_cast<long long>(made - 1),
                 (made - 1) / decode.count());
  }
}

// ExecuTorch reports how it looks for the processor's cores; only errors are of interest here.
void print_errors(et_timestamp_t, et_pal_log_level_t level, const char* file, const char*, size_t line,
                  const char* message, size_t length) {
  if (level == et_pal_log_level_t::kError || level == et_pal_log_level_t::kFatal) {
    std::fprintf(stderr, "executorch %s:%zu: %.*s\n", file, line, static_cast<int>(length), message);
  }
}

}  // namespace

int main(int argc, char** argv) {
  executorch::runtime::register_pal(executorch::runtime::PalImpl::create(print_errors, __FILE__));
  try {
    const Arguments arguments = parse(argc, argv);
    set_threads(arguments.threads);
    Model model(arguments.model);
    generate(model, arguments);
    return 0;
  } catch (const Failure& failure) {
    std::fprintf(stderr, "lfm2_native_run: %s\n", failure.what());
    return failure.exit_code;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "lfm2_native_run: %s\n", error.what());
    return kExitMachine;
  }
}
