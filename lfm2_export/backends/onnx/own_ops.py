"""Rewrites a graph to the operators of our library (domain ``lfm2``; kernels/src/onnxruntime_ops.cpp).

In: a graph with com.microsoft's MatMulNBits and QMoE. Out: the same graph, in place, on operators that read the very
same initializers without packing them anew: it loads at once, its weights are in memory once, and prefill is about
twice as fast. Only a session that has registered the library can open it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx_ir as ir

from lfm2_export.backends.onnx.graph_edits import DOMAIN, finish, insert, only_reader, padded, producer, replace
from lfm2_export.backends.onnx.plan import Layout
from lfm2_export.backends.onnx.variants import INDEPENDENT, ROWS
from lfm2_export.backends.weights.plan import StoredWeight, WeightPlan
from lfm2_export.cache import KEY_STATE, CacheSpec, StateTensor
from lfm2_export.config import ModelConfig
from lfm2_export.families.tensors import Part
from lfm2_export.quant.formats import IntFormat

ATTENTION, SLIDING_ATTENTION = "Attention", "SlidingAttention"
# What the kernels take at once, of inputs and of experts' rows: widths are multiples of it, groups may be halves.
_INPUTS = 32
_GROUP_SIZES = (16, 32, 64, 128, 256)
# A multiple of the lanes in a register, and the most that has room.
_HEAD_DIM_STEP, _MOST_HEAD_DIM = 16, 256
# Whose sums depend, in their last bits, on how many rows there are.
_STOCK_SUMS = {"MatMul", "Gemm", "MatMulNBits", "QMoE", "MoE", "GroupQueryAttention", "CausalConvWithState"}
_DATA_TYPES = {"float32": ir.DataType.FLOAT, "uint8": ir.DataType.UINT8}  # of a state on our operators
_PRODUCTS = (Layout.MATMUL, Layout.GATE_UP, Layout.DOWN)


def fits(plan: WeightPlan) -> bool:
    """Whether the kernels take every product of the plan, and there is one."""
    products = [w for w in plan.values() if w.layout in _PRODUCTS and isinstance(w.format, IntFormat)]
    return plan.activation_dtype == "float32" and bool(products) and all(map(_fits, products))


def _fits(weight: StoredWeight) -> bool:
    form = weight.format
    assert isinstance(form, IntFormat)
    taken_whole = weight.shape[-1:] if weight.layout is Layout.MATMUL else weight.shape[-2:]
    has_blocks = not any(size % _INPUTS for size in taken_whole)
    return form.group_size in _GROUP_SIZES and has_blocks and (form.bits == 4 or form.symmetric)


def use_own_products(model: ir.Model) -> int:
    """Every com.microsoft MatMulNBits becomes ours. Returns how many."""
    nodes = [node for node in model.graph if node.op_type == "MatMulNBits" and node.domain != DOMAIN]
    for node in nodes:
        x, qdata, scale, zero_point, _, bias = padded(node.inputs, 6)
        attributes = {name: node.attributes[name].value for name in ("N", "K", "bits", "block_size")}
        replace(model, node, "MatMulNBits", (x, qdata, _as_stored(scale), zero_point, bias), attributes)
    return finish(model, len(nodes))


def use_own_float_products(model: ir.Model) -> int:
    """Every product by a matrix of floats becomes ours: routers, and layers that were excluded. Returns how many."""
    weights = model.graph.initializers.values()
    nodes = [
        node for node in model.graph if node.op_type == "MatMul" and node.domain == "" and _is_matrix(node, weights)
    ]
    for node in nodes:
        replace(model, node, "MatMul", node.inputs, {})
    return finish(model, len(nodes))


def _is_matrix(product: ir.Node, weights: Collection[ir.Value]) -> bool:
    weight = product.inputs[1]
    return weight in weights and weight.shape is not None and len(weight.shape) == 2


def fuse_feed_forwards(model: ir.Model, plan: WeightPlan) -> int:
    """The three products of a dense feed-forward, ours already, and what lies between them become one FeedForward.
    Returns how many."""
    blocks = [block for block in _feed_forwards(plan) if _is_whole(block)]
    for block in blocks:
        gate, up, down = (only_reader(model, block[part].tensor("qdata")) for part in ("w1", "w3", "w2"))
        assert gate.inputs[0] is up.inputs[0]
        first, second, last = (_format(node) for node in (gate, up, down))
        attributes = {"inner": gate.attributes["N"].value, **first, **_other_format("up_", second, first)}
        attributes |= {f"down_{name}": value for name, value in last.items()}
        weights = [value for node in (gate, up, down) for value in padded(node.inputs, 4)[1:4]]
        replace(model, down, "FeedForward", (gate.inputs[0], *weights), attributes)
    return finish(model, len(blocks))


def _feed_forwards(plan: WeightPlan) -> list[dict[str, StoredWeight]]:
    """The matrices of each dense feed-forward by their names, w1 to w3."""
    blocks: dict[int, dict[str, StoredWeight]] = {}
    for weight in plan.values():
        if weight.part is Part.MLPS and weight.layer is not None and weight.matrix is not None:
            blocks.setdefault(weight.layer, {})[weight.matrix] = weight
    return list(blocks.values())


def _is_whole(block: Mapping[str, StoredWeight]) -> bool:
    """Whether all three matrices are quantized."""
    return all(isinstance(block[part].format, IntFormat) for part in ("w1", "w3", "w2"))


def _format(product: ir.Node) -> dict[str, int]:
    return {name: product.attributes[name].as_int() for name in ("bits", "block_size")}


def _other_format(prefix: str, form: Mapping[str, int], first: Mapping[str, int]) -> dict[str, int]:
    """The attributes of a further matrix: none where it is stored as the first one."""
    return {} if form == first else {f"{prefix}{name}": value for name, value in form.items()}


def fuse_short_convs(model: ir.Model) -> int:
    """From a short conv's first projection to its second: gates, convolution and the choice of the new state become one
    GatedConv. Returns how many."""
    nodes = [node for node in model.graph if node.op_type == "CausalConvWithState"]
    for node in nodes:
        x, weight, bias, state = padded(node.inputs, 4)
        masked = producer(x)
        gated, attended = masked.inputs
        projected = producer(producer(gated).inputs[0]).inputs[0]
        window = next(use.node for use in masked.outputs[0].uses() if use.node.op_type == "Concat")
        (pick,) = window.outputs[0].consumers()
        rows = producer(pick.inputs[1]).inputs[0]
        (out,) = node.outputs[0].consumers()
        made = ir.node("GatedConv", (projected, weight, bias, state, attended, rows), domain=DOMAIN, num_outputs=2)
        insert(model, made, {out.outputs[0]: 0, pick.outputs[0]: 1}, before=pick)
    return finish(model, len(nodes))


def takes_heads(config: ModelConfig) -> bool:
    """Whether Attention takes heads of this size (attention.h); others stay GroupQueryAttention."""
    return config.head_dim % _HEAD_DIM_STEP == 0 and config.head_dim <= _MOST_HEAD_DIM


def fuse_attention(model: ir.Model, config: ModelConfig) -> int:
    """Norms of q and k, RoPE, GroupQueryAttention and its mask become one Attention. Returns how many."""
    if not takes_heads(config):
        return 0
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    for layer, node in zip(config.attention_layers, nodes, strict=True):
        q, k, v, past_key, past_value, seqlens_k, _, cos, sin, position_ids, _ = node.inputs
        assert past_key is not None
        assert past_key.name == StateTensor.names(layer, KEY_STATE)[0]
        (q_norm, q), (k_norm, k) = _before_norm(q), _before_norm(k)
        attributes = {
            "num_heads": node.attributes["num_heads"].value,
            "kv_num_heads": node.attributes["kv_num_heads"].value,
            "epsilon": q_norm.attributes["epsilon"].value,
        }
        window = config.window(config.layer_types[layer])
        if window is not None:
            attributes["window"] = window
        op = ATTENTION if window is None else SLIDING_ATTENTION
        inputs = (q, k, v, q_norm.inputs[1], k_norm.inputs[1], past_key, past_value, seqlens_k, mask)
        made = ir.node(op, (*inputs, cos, sin, position_ids), attributes, domain=DOMAIN, num_outputs=3)
        insert(model, made, {value: index for index, value in enumerate(node.outputs)}, before=node)
    return finish(model, len(nodes))


def cache_of(config: ModelConfig, cache: CacheSpec) -> CacheSpec:
    """The state of the graphs on our operators, of the portable graph's: sliding layers as rings, where attention is
    ours."""
    return cache.with_rings(config) if takes_heads(config) else cache


def keep_rings(model: ir.Model, cache: CacheSpec) -> int:
    """Every SlidingAttention keeps the ring that ``cache`` has for it. Returns how many."""
    _set_boundary(model, cache.bounded)
    nodes = [node for node in _attentions(model) if node.op_type == SLIDING_ATTENTION]
    for node in nodes:
        node.attributes["ring"] = ir.AttrInt64("ring", 1)
    return len(nodes)


def fuse_projections(model: ir.Model) -> int:
    """The products that make q, k and v of one input become one Projections, if all are quantized. Returns how many."""
    count = 0
    for attention in _attentions(model):
        products = [producer(value) for value in attention.inputs[:3]]
        if not _are_together(products):
            continue
        first, *others = map(_format, products)
        attributes = {"K": products[0].attributes["K"].value, **first}
        attributes |= {f"N{index}": node.attributes["N"].value for index, node in enumerate(products)}
        for index, form in enumerate(others, start=1):
            attributes |= _other_format(f"N{index}_", form, first)
        weights = [value for node in products for value in padded(node.inputs, 4)[1:4]]
        while weights[-1] is None:
            weights.pop()
        made = ir.node(
            "Projections", (products[0].inputs[0], *weights), attributes, domain=DOMAIN, num_outputs=len(products)
        )
        insert(model, made, {node.outputs[0]: i for i, node in enumerate(products)}, before=products[0])
        count += 1
    return finish(model, count)


def _are_together(products: Sequence[ir.Node]) -> bool:
    first = products[0]
    return all(
        (node.op_type, node.domain) == ("MatMulNBits", DOMAIN)
        and node.inputs[0] is first.inputs[0]
        and len(node.inputs) <= 4  # no bias
        for node in products
    )


def _before_norm(x: ir.Value | None) -> tuple[ir.Node, ir.Value | None]:
    """The norm of each head, and the projection that goes into it; a Reshape stands before and behind it."""
    norm = producer(producer(x).inputs[0])
    assert norm.op_type == "SimplifiedLayerNormalization"
    return norm, producer(norm.inputs[0]).inputs[0]


def quantize_cache(model: ir.Model, cache: CacheSpec) -> int:
    """Every Attention keeps its cache in int8; ``cache`` describes it. Returns how many."""
    _set_boundary(model, cache.positions)
    nodes = _attentions(model)
    for node in nodes:
        node.op_type = f"{node.op_type}Int8"
    return len(nodes)


def _set_boundary(model: ir.Model, tensors: Iterable[StateTensor]) -> None:
    """Shapes and types of the graph's inputs and outputs."""
    boundary = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    for tensor in tensors:
        for name, shape in ((tensor.past_name, tensor.shape), (tensor.present_name, tensor.present_shape)):
            boundary[name].shape = ir.Shape(shape)
            # A new type: a copy of a graph shares its types with the original.
            boundary[name].type = ir.TensorType(_DATA_TYPES[tensor.dtype])


def show_windows(model: ir.Model, cache: CacheSpec) -> int:
    """Every GatedConv also returns its window, from which the state after any of a call's tokens can be taken, as an
    output of the graph. Returns how many."""
    nodes = {node.outputs[1].name: node for node in model.graph if node.op_type == "GatedConv"}
    for tensor in cache.conv if nodes else ():
        node = nodes[tensor.present_name]
        node.resize_outputs(3)
        node.attributes["window"] = ir.AttrInt64("window", 1)
        window = node.outputs[2]
        window.name, window.type = tensor.window_name, node.outputs[1].type
        window.shape = ir.Shape((tensor.shape[0], None, tensor.shape[2]))
        model.graph.outputs.append(window)
    return len(nodes)


def mark_independent_rows(model: ir.Model) -> bool:
    """Notes in the graph that a token's logits are the same bits whatever other tokens are in a call, if all of its
    sums are made by our operators. Returns whether."""
    independent = not any(node.domain != DOMAIN and node.op_type in _STOCK_SUMS for node in model.graph)
    if independent:
        model.metadata_props[ROWS] = INDEPENDENT
    return independent


def _attentions(model: ir.Model) -> list[ir.Node]:
    kinds = (ATTENTION, SLIDING_ATTENTION)
    return [node for node in model.graph if node.op_type in kinds and node.domain == DOMAIN]


def use_own_experts(model: ir.Model, config: ModelConfig) -> int:
    """Every QMoE becomes a SparseMoe, which routes by itself from the router's logits. Returns how many."""
    nodes = [node for node in model.graph if node.op_type == "QMoE"]
    for node in nodes:
        inputs = padded(node.inputs, 15)
        gate_up = inputs[2]
        assert gate_up is not None
        assert gate_up.name is not None
        block = gate_up.name.removesuffix(".experts.gate_up.qdata")
        logits = only_reader(model, f"{block}.gate.weight").outputs[0]
        bias = model.graph.initializers.get(f"{block}.expert_bias")
        attributes = {
            "top_k": config.num_experts_per_tok,
            "normalize": int(config.norm_topk_prob),
            "routed_scaling_factor": float(config.routed_scaling_factor),
            "bits": node.attributes["expert_weight_bits"].value,
            "block_size": node.attributes["block_size"].value,
        }
        weights = (gate_up, _as_stored(inputs[3]), inputs[11], inputs[5], _as_stored(inputs[6]), inputs[12])
        replace(model, node, "SparseMoe", (inputs[0], logits, bias, *weights), attributes)
    return finish(model, len(nodes))  # the routing around the old nodes goes too


def _as_stored(scale: ir.Value | None) -> ir.Value | None:
    """The initializer behind a Cast: our operators read float16 scales where they are mapped."""
    node = None if scale is None else scale.producer()
    return scale if node is None or node.op_type != "Cast" else node.inputs[0]
