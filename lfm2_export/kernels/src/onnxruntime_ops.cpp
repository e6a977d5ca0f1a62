// Operators for ONNX Runtime, domain "lfm2", version 1; a session gets them by registering this library.
//
//   MatMulNBits(x, codes, scales, zero_points?, bias?) -> x times the transposed matrix, plus bias
//       K, N, bits, block_size
//   MatMul(x, w) -> x times a matrix of floats [inputs, outputs]
//   Projections(x, three times codes, scales, zero_points?) -> x times each; K, N0, N1, N2, bits, block_size, and
//       N1_bits, N1_block_size, N2_bits, N2_block_size where the later ones differ from the first
//   FeedForward(x, w1 codes, scales, zero_points?, w3 codes, scales, zero_points?, w2 codes, scales, zero_points?)
//       -> (silu(x w1') * x w3') w2'; inner, bits, block_size (of w1 and w3), up_bits, up_block_size (of w3, where it
//       differs), down_bits, down_block_size
//   SparseMoe(x, router_logits?, expert_bias?, gate_up codes, scales, zero_points?, down codes, scales, zero_points?,
//       router?) -> the chosen experts' outputs, by logits that are given or made of x with a matrix of floats
//       top_k, normalize, routed_scaling_factor, bits, block_size
//   The four with matrices of codes take three inputs more, behind all others: delta?, gamma? and delta_gamma?. They then
//       read the RMS norm of x + delta with the weights gamma, where delta may be the norm of what is given with the
//       weights delta_gamma. An attribute epsilon; their last output is the sum
//   GatedConv(projected, weight, bias?, state, attended, rows) -> C * conv(B * x), new state, and, where the attribute
//       `window` is 1, all of (state, gated inputs), of which the new state is some rows
//   Attention(q, k, v, q_norm, k_norm, past_key, past_value, seqlens_k, attention_mask, cos, sin, position_ids)
//       -> attended values, present_key, present_value; num_heads, kv_num_heads, epsilon. Where the past and the present
//       are one buffer, only new positions are written
//   AttentionInt8: the same with a cache of uint8, [..., head_dim + 4] (attention.h)
//   SlidingAttention, SlidingAttentionInt8: the same; window: how many attended positions a token sees, its own
//       included. Where ring is 1, past and present are rings of one size, which need not hold more than the window
//       (attention.h); graphs of earlier versions do not have it, and keep everything
//   TokenLayout(attention_mask, input_ids) -> seqlens_k, position_ids, attended, conv_rows, last: where each row's tokens
//       stand, of a mask [batch, positions] whose last positions are the call's tokens; taps (token_layout.h)
//
// A row's result is the same bits whatever rows stand beside it, in one call or in several: an answer depends neither on how
// a prompt is cut nor on how many tokens are verified at once.
//
// Weights are the initializers of com.microsoft's MatMulNBits and QMoE, read where the runtime has mapped the data file
// (see row_matrix.h). What a graph could get wrong is in faults.h: attributes are looked at when a session
// is made, tensors in every call, so that the kernels need not look.

#include <cstdio>
#include <cstring>

#include "onnxruntime_kernel.h"

#define LFM2_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

namespace ort = lfm2::ort;

thread_local std::string the_misfit;

// 31 of "1.31.1"; -1 of what is no version 1.
int minor_of(const char* version) {
  int major = 0, minor = 0;
  return version != nullptr && std::sscanf(version, "%d.%d", &major, &minor) == 2 && major == 1 ? minor : -1;
}

// Through a wrong index another function is called, which ends the process or worse. So the version is looked at first,
// then calls are made that harm nothing and whose answers are known.
bool answers(const OrtApi* api) {
  const char* built = ort::GetBuildInfoString::of(api)();
  if (built == nullptr || std::strncmp(built, "ORT Build Info", 14) != 0) {
    return false;
  }
  OrtStatus* status = ort::CreateStatus::of(api)(ort::kInvalidArgument, "lfm2");
  const int code = ort::GetErrorCode::of(api)(status);
  ort::ReleaseStatus::of(api)(status);
  return code == ort::kInvalidArgument;
}

// Null, and the reason in the_misfit, where the table in onnxruntime_abi.h is not known to be this runtime's.
const OrtApi* fitting(const OrtApiBase* base) {
  const char* version = base->GetVersionString();
  const int minor = minor_of(version);
  const std::string found = std::string("ONNX Runtime ") + (version == nullptr ? "without a version" : version);
  the_misfit.clear();
  if (minor < ort::kOldestRuntime || minor > ort::kNewestRuntime) {
    the_misfit = found + ": these kernels are for 1." + std::to_string(ort::kOldestRuntime) + " to 1." +
                 std::to_string(ort::kNewestRuntime);
    return nullptr;
  }
  const OrtApi* api = base->GetApi(ort::kApiVersion);
  if (api == nullptr || !answers(api)) {
    the_misfit = found + ": its interface is not that of its version";
    return nullptr;
  }
  return api;
}

}  // namespace

// Why the last RegisterCustomOps in this thread registered nothing; empty where it did.
LFM2_EXPORT const char* lfm2_onnx_misfit() {
  return the_misfit.c_str();
}

// What SessionOptions.register_custom_ops_library looks for.
LFM2_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace lfm2;
  const OrtApi* api = fitting(base);
  if (api == nullptr) {  // there is no table to make a status with
    return nullptr;      // the session then says that it does not know the operators
  }
  return guarded(api, "lfm2", [&] {
    OrtCustomOpDomain* domain = nullptr;  // lives as long as the process, as every session may use it
    check(ort::CreateCustomOpDomain::of(api)("lfm2", &domain));
    for (const auto& ops : {product_ops(), state_ops()}) {
      for (const OrtCustomOp* op : ops) {
        check(ort::CustomOpDomainAdd::of(api)(domain, op));
      }
    }
    check(ort::AddCustomOpDomain::of(api)(options, domain));
  });
}
