"""Rewrites a graph to the operators of our library (domain ``lfm2``; kernels/src/onnxruntime_ops.cpp).

In: a graph with com.microsoft's MatMulNBits and QMoE. Out: the same graph, in place, on operators that read the very
same initializers without packing them anew: it loads at once, its weights are in memory once, and prefill is about
twice as fast. Only a session that has registered the library can open it.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from lfm2_export.backends.onnx.plan import Layout, StoredWeight, WeightPlan
from lfm2_export.config import ModelConfig
from lfm2_export.quant.formats import IntFormat

DOMAIN, VERSION = "lfm2", 1
# Inputs that share a scale in the kernels' activations: widths are multiples of it.
_INPUTS = 32
_GROUP_SIZES = (32, 64, 128, 256)
_PRODUCTS = (Layout.MATMUL, Layout.GATE_UP, Layout.DOWN)


def fits(plan: WeightPlan) -> bool:
    """Whether the kernels take every product of the plan, and there is one."""
    products = [w for w in plan.values() if w.layout in _PRODUCTS and isinstance(w.format, IntFormat)]
    return plan.activation_dtype == "float32" and bool(products) and all(map(_fits, products))


def _fits(weight: StoredWeight) -> bool:
    form = weight.format
    assert isinstance(form, IntFormat)
    has_blocks = weight.layout is Layout.MATMUL or weight.shape[-2] % _INPUTS == 0  # experts' rows come in blocks too
    return form.group_size in _GROUP_SIZES and has_blocks and (form.bits == 4 or form.symmetric)


def use_own_products(model: ir.Model) -> int:
    """Every com.microsoft MatMulNBits becomes ours. Returns how many."""
    nodes = [node for node in model.graph if node.op_type == "MatMulNBits" and node.domain != DOMAIN]
    for node in nodes:
        x, qdata, scale, zero_point, _, bias = _padded(node.inputs, 6)
        attributes = {name: node.attributes[name].value for name in ("N", "K", "bits", "block_size")}
        _replace(model, node, "MatMulNBits", (x, qdata, scale, zero_point, bias), attributes)
    _import_domain(model, len(nodes))
    return len(nodes)


def fuse_feed_forwards(model: ir.Model, plan: WeightPlan) -> int:
    """The three products of a dense feed-forward, ours already, and what lies between them become one FeedForward.
    Returns how many."""
    blocks = [name.removesuffix(".w2") for name in plan if name.endswith(".feed_forward.w2") and _is_whole(plan, name)]
    for block in blocks:
        gate, up, down = (_only_reader(model, f"{block}.{part}.qdata") for part in ("w1", "w3", "w2"))
        assert gate.inputs[0] is up.inputs[0]
        attributes = {
            "inner": gate.attributes["N"].value,
            **{name: gate.attributes[name].value for name in ("bits", "block_size")},
            **{f"down_{name}": down.attributes[name].value for name in ("bits", "block_size")},
        }
        weights = [value for node in (gate, up, down) for value in _padded(node.inputs, 4)[1:4]]
        _replace(model, down, "FeedForward", (gate.inputs[0], *weights), attributes)
    if blocks:
        common_passes.RemoveUnusedNodesPass()(model)
    return len(blocks)


def _is_whole(plan: WeightPlan, w2: str) -> bool:
    """Whether all three matrices are quantized, the first two alike, and the width between them comes in groups."""
    block = w2.removesuffix(".w2")
    w1, w3, down = (plan[f"{block}.{part}"] for part in ("w1", "w3", "w2"))
    return isinstance(down.format, IntFormat) and isinstance(w1.format, IntFormat) and w1.format == w3.format


def use_own_experts(model: ir.Model, config: ModelConfig) -> int:
    """Every QMoE becomes a SparseMoe, which routes by itself from the router's logits. Returns how many."""
    nodes = [node for node in model.graph if node.op_type == "QMoE"]
    for node in nodes:
        inputs = _padded(node.inputs, 15)
        gate_up = inputs[2]
        assert gate_up is not None
        assert gate_up.name is not None
        block = gate_up.name.removesuffix(".experts.gate_up.qdata")
        logits = _only_reader(model, f"{block}.gate.weight").outputs[0]
        bias = model.graph.initializers.get(f"{block}.expert_bias")
        attributes = {
            "top_k": config.num_experts_per_tok,
            "normalize": int(config.norm_topk_prob),
            "routed_scaling_factor": float(config.routed_scaling_factor),
            "bits": node.attributes["expert_weight_bits"].value,
            "block_size": node.attributes["block_size"].value,
        }
        weights = (gate_up, inputs[3], inputs[11], inputs[5], inputs[6], inputs[12])
        _replace(model, node, "SparseMoe", (inputs[0], logits, bias, *weights), attributes)
    _import_domain(model, len(nodes))
    if nodes:
        common_passes.RemoveUnusedNodesPass()(model)  # the routing around the old nodes
    return len(nodes)


def _padded(inputs: Sequence[ir.Value | None], count: int) -> list[ir.Value | None]:
    return [*inputs, *[None] * (count - len(inputs))]


def _only_reader(model: ir.Model, name: str) -> ir.Node:
    (use,) = model.graph.initializers[name].uses()
    return use.node


def _replace(
    model: ir.Model, node: ir.Node, op: str, inputs: Sequence[ir.Value | None], attributes: dict[str, object]
) -> None:
    kept = list(inputs)
    while kept[-1] is None:
        kept.pop()
    name = node.outputs[0].name
    made = ir.node(op, kept, attributes, domain=DOMAIN, name=node.name)
    model.graph.insert_before(node, made)
    node.outputs[0].replace_all_uses_with(made.outputs[0], replace_graph_outputs=True)
    made.outputs[0].type, made.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    model.graph.remove(node, safe=True)
    made.outputs[0].name = name


def _import_domain(model: ir.Model, nodes: int) -> None:
    if nodes:
        model.graph.opset_imports[DOMAIN] = VERSION
