#include "c_api.h"

#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "faults.h"
#include "layout.h"
#include "target.h"

namespace {

using lfm2::Kind;
using lfm2::Operand;

enum Result { kDone, kUnknownKernels, kFault, kNoMemory };

thread_local std::string last_fault;

// Where the machine gives no more threads, those that there are take all of the work.
void run_threads(const void*, int workers, void (*task)(void*, int), void* context) {
  std::vector<std::thread> others;
  try {
    for (int worker = 1; worker < workers; ++worker) {
      others.emplace_back(task, context, worker);
    }
  } catch (const std::exception&) {
  }
  task(context, 0);
  for (std::thread& other : others) {
    other.join();
  }
}

lfm2::ThreadPool pool_of(int threads) {
  return {threads, run_threads, nullptr};
}

// What `run` returns, or why it threw.
template <typename Run>
int guarded(const Run& run) {
  try {
    return run();
  } catch (const lfm2::Fault& fault) {
    last_fault = fault.what();
    return kFault;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

// run(scratch) with so much scratch memory.
template <typename Run>
int with_scratch(size_t bytes, const Run& run) {
  const std::unique_ptr<void, void (*)(void*)> scratch(
      std::aligned_alloc(lfm2::kAlignment, bytes == 0 ? lfm2::kAlignment : bytes), std::free);
  if (scratch == nullptr) {
    return kNoMemory;
  }
  run(scratch.get());
  return kDone;
}

Operand operand_of(const Lfm2Array& array, Kind kind, std::initializer_list<int64_t> sizes) {
  Operand found;
  found.data = array.data;
  found.count = array.count;
  found.kind = kind;
  found.is_there = true;
  for (const int64_t size : sizes) {
    found.sizes[found.rank++] = size;
  }
  return found;
}

// Of a shape that nobody says.
Operand flat(const Lfm2Array& array, Kind kind) {
  return operand_of(array, kind, {array.count});
}

Operand optional(const Lfm2Array& array, Kind kind) {
  return array.data == nullptr ? Operand() : flat(array, kind);
}

lfm2::MatrixOperands matrix_of(const Lfm2RowWeights& weights, const Lfm2RowFormat& format) {
  return {flat(weights.codes, Kind::kByte), flat(weights.scales, format.half_scales != 0 ? Kind::kHalf : Kind::kFloat),
          optional(weights.zero_points, Kind::kByte)};
}

float* checked_output(const char* op, const Lfm2Array& out, int64_t rows, int64_t columns) {
  lfm2::check_output(op, operand_of(out, Kind::kFloat, {rows, columns}), lfm2::times(rows, columns));
  return static_cast<float*>(const_cast<void*>(out.data));
}

const lfm2::Target* target(const char* name) {
  return name == nullptr ? &lfm2::best_target() : lfm2::target_by_name(name);
}

}  // namespace

const char* lfm2_last_fault() {
  return last_fault.c_str();
}

const char* const* lfm2_runnable_kernels() {
  return lfm2::runnable_targets();
}

int lfm2_moe_ffn(const char* kernels_name, int threads, Lfm2Array x, Lfm2Array router_logits, Lfm2Array expert_bias,
                 Lfm2Array gate_up, Lfm2Array down, int64_t tokens, int64_t width, int64_t inner, int64_t experts,
                 int64_t top_k, int normalize, float scale, Lfm2Array out) {
  const lfm2::Target* kernels = target(kernels_name);
  if (kernels == nullptr) {
    return kUnknownKernels;
  }
  return guarded([&] {
    constexpr const char* kOp = "lfm2_moe_ffn";
    lfm2::check_threads(kOp, threads);
    if (inner % lfm2::kGroup != 0) {
      lfm2::refuse("%s: inner width %lld is not a multiple of %d", kOp, static_cast<long long>(inner), lfm2::kGroup);
    }
    const int64_t groups = width / lfm2::kGroup, blocks = inner / lfm2::kGroup;
    const lfm2::MoeOperands operands = {
        operand_of(x, Kind::kFloat, {tokens, width}),
        {operand_of(router_logits, Kind::kFloat, {tokens, experts}), optional(expert_bias, Kind::kFloat)},
        operand_of(gate_up, Kind::kByte, {experts, lfm2::times(2, blocks), groups, lfm2::kTileBytes}),
        operand_of(down, Kind::kByte, {experts, groups, blocks, lfm2::kTileBytes})};
    lfm2::MoeProblem problem = lfm2::prepare({kOp, top_k, normalize != 0, scale}, operands);
    problem.out = checked_output(kOp, out, tokens, width);
    return with_scratch(lfm2::moe_scratch_bytes(problem),
                        [&](void* scratch) { lfm2::run_moe(problem, kernels->tiles, pool_of(threads), scratch); });
  });
}

int lfm2_matmul_nbits(const char* kernels_name, int threads, Lfm2Array x, const Lfm2RowWeights* w,
                      const Lfm2RowFormat* format, Lfm2Array bias, int64_t tokens, int64_t rows, int64_t columns,
                      Lfm2Array out) {
  const lfm2::Target* kernels = target(kernels_name);
  if (kernels == nullptr) {
    return kUnknownKernels;
  }
  return guarded([&] {
    constexpr const char* kOp = "lfm2_matmul_nbits";
    lfm2::check_threads(kOp, threads);
    lfm2::ProductOperands operands;
    operands.x = operand_of(x, Kind::kFloat, {tokens, columns});
    operands.w[0] = matrix_of(*w, *format);
    operands.bias = optional(bias, Kind::kFloat);
    lfm2::MatMulProblem problem =
        lfm2::prepare({kOp, {{format->bits, format->group}}, columns, 1, {rows}}, operands)[0];
    problem.out = checked_output(kOp, out, tokens, rows);
    return problem.tokens == 0 ? kDone : with_scratch(lfm2::matmuls_scratch_bytes(&problem, 1), [&](void* scratch) {
      lfm2::run_matmul(problem, kernels->rows, pool_of(threads), scratch);
    });
  });
}

int lfm2_feed_forward(const char* kernels_name, int threads, Lfm2Array x, const Lfm2RowWeights* gate,
                      const Lfm2RowWeights* up, const Lfm2RowWeights* down, const Lfm2RowFormat* format, int64_t tokens,
                      int64_t width, int64_t inner, Lfm2Array out) {
  const lfm2::Target* kernels = target(kernels_name);
  if (kernels == nullptr) {
    return kUnknownKernels;
  }
  return guarded([&] {
    constexpr const char* kOp = "lfm2_feed_forward";
    lfm2::check_threads(kOp, threads);
    const lfm2::Format stored = {format->bits, format->group};
    lfm2::FeedForwardProblem problem =
        lfm2::prepare({kOp, inner, stored, stored, stored}, {operand_of(x, Kind::kFloat, {tokens, width}),
                                                     matrix_of(*gate, *format), matrix_of(*up, *format),
                                                     matrix_of(*down, *format)});
    problem.out = checked_output(kOp, out, tokens, width);
    return problem.tokens == 0 ? kDone : with_scratch(lfm2::feed_forward_scratch_bytes(problem), [&](void* scratch) {
      lfm2::run_feed_forward(problem, kernels->rows, pool_of(threads), scratch);
    });
  });
}

int lfm2_sparse_moe_nbits(const char* kernels_name, int threads, Lfm2Array x, Lfm2Array router_logits,
                          Lfm2Array expert_bias, const Lfm2RowWeights* gate_up, const Lfm2RowWeights* down,
                          const Lfm2RowFormat* format, int64_t tokens, int64_t width, int64_t experts, int64_t top_k,
                          int normalize, float scale, Lfm2Array out) {
  const lfm2::Target* kernels = target(kernels_name);
  if (kernels == nullptr) {
    return kUnknownKernels;
  }
  return guarded([&] {
    constexpr const char* kOp = "lfm2_sparse_moe_nbits";
    lfm2::check_threads(kOp, threads);
    lfm2::RowMoeProblem problem = lfm2::prepare(
        {kOp, top_k, normalize != 0, scale}, {format->bits, format->group},
        {operand_of(x, Kind::kFloat, {tokens, width}),
         {operand_of(router_logits, Kind::kFloat, {tokens, experts}), optional(expert_bias, Kind::kFloat)},
         matrix_of(*gate_up, *format),
         matrix_of(*down, *format)});
    problem.out = checked_output(kOp, out, tokens, width);
    return problem.tokens == 0 ? kDone : with_scratch(lfm2::row_moe_scratch_bytes(problem), [&](void* scratch) {
      lfm2::run_row_moe(problem, kernels->rows, kernels->floats, pool_of(threads), scratch);
    });
  });
}
