// Operators for ONNX Runtime, domain "lfm2", version 1; a session gets them by registering this library.
//
//   MatMulNBits(x, codes, scales, zero_points?, bias?) -> x times the transposed matrix, plus bias
//       K, N, bits, block_size
//   Projections(x, three times codes, scales, zero_points?) -> x times each; K, N0, N1, N2, bits, block_size, and
//       N1_bits, N1_block_size, N2_bits, N2_block_size where the later ones differ from the first
//   FeedForward(x, w1 codes, scales, zero_points?, w3 codes, scales, zero_points?, w2 codes, scales, zero_points?)
//       -> (silu(x w1') * x w3') w2'; inner, bits, block_size (of w1 and w3), up_bits, up_block_size (of w3, where it
//       differs), down_bits, down_block_size
//   GatedConv(projected, weight, bias?, state, attended, rows) -> C * conv(B * x), new state
//   Attention(q, k, v, q_norm, k_norm, past_key, past_value, seqlens_k, attention_mask, cos, sin, position_ids)
//       -> attended values, present_key, present_value; num_heads, kv_num_heads, epsilon. Where the past and the present
//       are one buffer, only new positions are written
//   AttentionInt8: the same with a cache of uint8, [..., head_dim + 4] (attention.h)
//   SparseMoe(x, router_logits, expert_bias?, gate_up codes, scales, zero_points?, down codes, scales, zero_points?)
//       top_k, normalize, routed_scaling_factor, bits, block_size
//
// Weights are the initializers of com.microsoft's MatMulNBits and QMoE, read where the runtime has mapped the data file
// (see row_matrix.h). What a graph could get wrong is in faults.h: attributes are looked at when a session
// is made, tensors in every call, so that the kernels need not look.

#include "onnxruntime_kernel.h"

#define LFM2_EXPORT extern "C" __attribute__((visibility("default")))

// What SessionOptions.register_custom_ops_library looks for.
LFM2_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace lfm2;
  const OrtApi* api = base->GetApi(ort::kApiVersion);
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
