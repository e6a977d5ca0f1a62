"""What lies between a layer's products becomes part of our operators: norms, residual sums, routers, and what padding
means to attention and the short convs. Four nodes a layer are left of what the portable graph has.

In: a graph whose products, attention and short convs are ours already (own_ops.py). Out: the same graph, in place.
"""

from __future__ import annotations

import onnx_ir as ir

from lfm2_export.backends.onnx.graph_edits import DOMAIN, finish, insert, padded, producer
from lfm2_export.backends.onnx.own_ops import ATTENTION, SLIDING_ATTENTION
from lfm2_export.config import ModelConfig

# How many inputs an operator has before those of a norm: what is added, and the norm's weights.
_INPUTS_BEFORE_NORM = {"MatMulNBits": 5, "Projections": 10, "FeedForward": 10, "SparseMoe": 10}
_SUM_NORM = "SkipSimplifiedLayerNormalization"
_NORMS = (_SUM_NORM, "SimplifiedLayerNormalization")
# Which of TokenLayout's outputs an operator's inputs are.
_LAYOUT_INPUTS = {
    ATTENTION: {7: 0, 11: 1},
    SLIDING_ATTENTION: {7: 0, 11: 1},
    "GatedConv": {4: 2, 5: 3},
    "GatherND": {1: 4},  # of the last hidden states
}


def fuse_routers(model: ir.Model) -> int:
    """Every SparseMoe makes the router's logits by itself, where they are a product by a matrix of floats. Returns how
    many."""
    count = 0
    for moe in [node for node in model.graph if (node.op_type, node.domain) == ("SparseMoe", DOMAIN)]:
        router = producer(moe.inputs[1])
        if (router.op_type, router.domain) == ("MatMul", DOMAIN) and router.inputs[0] is moe.inputs[0]:
            inputs = padded(moe.inputs, _INPUTS_BEFORE_NORM["SparseMoe"])
            inputs[1], inputs[-1] = None, router.inputs[1]
            moe.resize_inputs(len(inputs))
            for index, value in enumerate(inputs):
                moe.replace_input_with(index, value)
            model.graph.remove(router, safe=True)
            _drop_reshapes(model, moe)
            count += 1
    return finish(model, count)


def _drop_reshapes(model: ir.Model, moe: ir.Node) -> None:
    """QMoE takes rows; SparseMoe takes x as it is, so that the Reshapes before and behind it can go."""
    before, (use, *others) = moe.inputs[0].producer() if moe.inputs[0] else None, moe.outputs[0].uses()
    after = use.node
    if before is None or {before.op_type, after.op_type} != {"Reshape"} or others or len(before.outputs[0].uses()) != 1:
        return
    moe.replace_input_with(0, before.inputs[0])
    y, shaped = moe.outputs[0], after.outputs[0]
    y.shape = shaped.shape
    shaped.replace_all_uses_with(y, replace_graph_outputs=True)
    model.graph.remove([before, after], safe=True)


def fuse_norms(model: ir.Model) -> int:
    """A norm, and the addition before it, becomes part of the product that alone reads it. Returns how many."""
    products = [node for node in model.graph if node.domain == DOMAIN and node.op_type in _INPUTS_BEFORE_NORM]
    found = [(node, producer(node.inputs[0])) for node in products if _has_own_norm(node)]
    for node, norm in found:
        x, delta, gamma = norm.inputs[0], None, norm.inputs[-1]
        if norm.op_type == _SUM_NORM:
            delta, x = norm.inputs[:2]
        delta, delta_gamma = _normed_delta(delta, norm)
        inputs = [x, *padded(node.inputs, _INPUTS_BEFORE_NORM[node.op_type])[1:], delta, gamma]
        if delta_gamma is not None:
            inputs.append(delta_gamma)
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        attributes["epsilon"] = norm.attributes["epsilon"].value
        outputs = {value: index for index, value in enumerate(node.outputs)}
        if delta is not None:
            outputs[norm.outputs[3]] = len(node.outputs)
        made = ir.node(node.op_type, inputs, attributes, domain=DOMAIN, num_outputs=len(outputs))
        insert(model, made, outputs, before=node)
        model.graph.remove([node, norm], safe=True)
    return finish(model, len(found))


def _has_own_norm(product: ir.Node) -> bool:
    """Whether what it reads is a norm that nobody else reads."""
    x = product.inputs[0]
    norm = None if x is None else x.producer()
    if x is None or norm is None or norm.op_type not in _NORMS or len(x.uses()) != 1 or x.is_graph_output():
        return False
    return norm.op_type != _SUM_NORM or (len(norm.inputs) == 3 and len(norm.outputs) == 4)


def _normed_delta(delta: ir.Value | None, norm: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """What is added, and the weights of its own norm where it is one that only ``norm`` reads (a sandwich norm)."""
    own = None if delta is None else delta.producer()
    if delta is None or own is None or own.op_type != "SimplifiedLayerNormalization" or len(delta.uses()) != 1:
        return delta, None
    if own.attributes["epsilon"].value != norm.attributes["epsilon"].value:
        return delta, None
    return own.inputs[0], own.inputs[1]


def lay_out_tokens(model: ir.Model, config: ModelConfig) -> int:
    """What attention and the short convs are told of padding comes from one TokenLayout. Returns how many values it
    replaces."""
    ids, mask = (next(v for v in model.graph.inputs if v.name == name) for name in ("input_ids", "attention_mask"))
    made = ir.node("TokenLayout", (mask, ids), {"taps": config.conv_L_cache}, domain=DOMAIN, num_outputs=5)
    replaced: dict[ir.Value, int] = {}
    for node in model.graph:
        for index, output in _LAYOUT_INPUTS.get(node.op_type, {}).items():
            value = node.inputs[index]
            if value is not None and node.domain in (DOMAIN, ""):
                replaced[value] = output
    insert(model, made, replaced, before=model.graph[0])
    return finish(model, len(replaced))
