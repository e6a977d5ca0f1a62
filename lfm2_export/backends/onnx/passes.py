"""Rewrites of the traced graph; each does one thing and returns how often it matched.

In: the ``onnx_ir.Model`` of a trace, initializers without values. Out: the same model, in place, smaller and with the
artifact's names. ``PASSES`` is the order; ``check_operators`` proves that the lowering reached every layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnxscript import optimizer

from lfm2_export.backends.onnx.draft_graph import draft_inputs, draft_outputs
from lfm2_export.backends.onnx.plan import ROPE_TABLES, Layout
from lfm2_export.backends.weights.plan import WeightPlan
from lfm2_export.cache import BATCH, FIRST_SCORED, TOTAL, CacheSpec, residual_name
from lfm2_export.config import ModelConfig
from lfm2_export.errors import ExportError
from lfm2_export.heads import SENTENCE
from lfm2_export.quant.formats import IntFormat

SEQUENCE, SCORED = "sequence_length", "scored_length"
ROOT = "net."  # the attribute of the traced wrapper, in front of every initializer's name

# Outputs that we never read; left unnamed, so that the kernels need not compute them.
OPTIONAL_OUTPUTS = {"SkipSimplifiedLayerNormalization": (1, 2, 3)}


def simplify(model: ir.Model) -> int:
    """Folds constants and removes what nothing reads. Initializers are hidden meanwhile, for they have no bytes to
    fold.

    Returns:
        How many nodes went.
    """
    graph = model.graph
    before = len(graph)
    hidden = list(graph.initializers.values())
    for value in hidden:
        graph.inputs.append(value)
        del graph.initializers[value.name]
    tensors = {value.name: value.const_value for value in hidden}
    for value in hidden:
        value.const_value = None
    optimizer.optimize_ir(model, onnx_shape_inference=False)
    for value in hidden:
        graph.inputs.remove(value)
        if value.uses():
            value.const_value = tensors[value.name]
            graph.register_initializer(value)
    return before - len(graph)


def drop_unread_outputs(model: ir.Model) -> int:
    """Unnames optional outputs without a reader."""
    count = 0
    for node in model.graph:
        for index in OPTIONAL_OUTPUTS.get(node.op_type, ()):
            value = node.outputs[index]
            if value.name and not value.uses() and not value.is_graph_output():
                value.name = ""
                count += 1
    return count


def name_initializers(model: ir.Model, plan: WeightPlan) -> int:
    """Gives initializers the names that the plan (and so the manifest) uses: the checkpoint's, with a role."""
    names = {f"{ROOT}{name}": name for stored in plan.values() for name in map(stored.tensor, stored.storage())}
    tables = [pair for kind in ROPE_TABLES.values() for pair in kind.items()]
    names |= {f"{ROOT}model.layout.{attribute}": name for attribute, name in tables}
    found = list(model.graph.initializers.values())
    for value in found:
        if value.name not in names:
            if value.name is not None and value.name.startswith(ROOT):
                raise ExportError(
                    f"{value.name}: traced but not in the weight plan; this is a defect, please report it"
                )
            continue
        del model.graph.initializers[value.name]
        value.name = names[value.name]
        model.graph.register_initializer(value)
    return len(found)


def share_tied_scales(model: ir.Model, plan: WeightPlan) -> int:
    """Lets a tied head read the token table's scales, through the table's Cast: folded twice, they would be in memory
    twice. Codes are left alone, as the operators want other shapes of them. Returns how many heads do."""
    count = 0
    for weight in plan.values():
        if weight.same_bytes_as is not None and isinstance(weight.format, IntFormat):
            own, table = (stored.tensor("scale") for stored in (weight, plan[weight.same_bytes_as]))
            _as_read(model, own).replace_all_uses_with(_as_read(model, table))
            count += 1
    if count:
        common_passes.RemoveUnusedNodesPass()(model)
    return count


def _as_read(model: ir.Model, name: str) -> ir.Value:
    """What an initializer's reader makes of it, where that is a Cast."""
    value = model.graph.initializers[name]
    (reader,) = value.consumers()
    return reader.outputs[0] if reader.op_type == "Cast" else value


def name_axes(model: ir.Model, cache: CacheSpec) -> int:
    """Types every input and output with the artifact's axis names; Transformers.js wants exactly ``batch_size``."""
    inputs: dict[str, tuple[int | str, ...]] = {"input_ids": (BATCH, SEQUENCE), "attention_mask": (BATCH, TOTAL)}
    inputs |= {tensor.past_name: tensor.shape for tensor in cache.tensors}
    outputs = {tensor.present_name: tensor.present_shape for tensor in cache.tensors}
    return _name_axes(model, inputs, outputs | {"logits": (BATCH, 1)})


def name_encoder_axes(model: ir.Model) -> int:
    """The same of an encoder's graph."""
    rows = (BATCH, SEQUENCE)
    outputs = {value.name: rows for value in model.graph.outputs} | {SENTENCE: (BATCH,)}
    return _name_axes(model, {"input_ids": rows, "attention_mask": rows}, outputs)


def name_drafter_axes(model: ir.Model, config: ModelConfig) -> int:
    """The same of a drafter's."""
    return _name_axes(model, draft_inputs(config), draft_outputs(config))


def _name_axes(
    model: ir.Model, inputs: Mapping[str, tuple[int | str, ...]], outputs: Mapping[str, tuple[int | str, ...]]
) -> int:
    """Axes that an output has beyond those named keep their sizes."""
    for value in model.graph.inputs:
        value.shape = ir.Shape(inputs[value.name])
    for value in model.graph.outputs:
        assert value.shape is not None
        named = outputs[value.name]
        value.shape = ir.Shape((*named, *value.shape[len(named) :]))
    return len(model.graph.inputs) + len(model.graph.outputs)


def strip_debris(model: ir.Model) -> int:
    """Removes what the exporter leaves: stack traces (paths of this machine), doc strings, shapes with private
    symbols."""
    boundary = {*model.graph.inputs, *model.graph.outputs}
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = model.doc_string = None
    count = 0
    for node in model.graph:
        count += len(node.metadata_props)
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in boundary:
                value.shape = value.type = None
    for value in (*boundary, *model.graph.initializers.values()):
        value.metadata_props.clear()
    return count


def number_nodes(model: ir.Model) -> int:
    """Short, stable names for nodes and intermediate values, so that the same checkpoint gives the same file."""
    counts: Counter[str] = Counter()
    outputs = set(model.graph.outputs)
    for node in model.graph:
        counts[node.op_type] += 1
        node.name = f"{node.op_type}_{counts[node.op_type]}"
        for index, value in enumerate(node.outputs):
            if value.name and value not in outputs:
                value.name = f"{node.name}_out{index}"
    return sum(counts.values())


def allow_int8_experts(model: ir.Model) -> int:
    """Lets 4-bit QMoE nodes compute with int8 activations (accuracy_level 4): four times as fast on a CPU.

    A pass of its own, on a copy of the graph, because onnxruntime before 1.31 does not know the attribute.
    """
    nodes = [n for n in model.graph if n.op_type == "QMoE" and n.attributes["expert_weight_bits"].value == 4]
    for node in nodes:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 4)
    return len(nodes)


def show_residuals(model: ir.Model, config: ModelConfig) -> int:
    """Makes the residual stream behind every layer an output: what drafters read. It is computed anyway, and handed out
    where a run asks for it. Returns how many."""
    nodes = [node for node in model.graph if node.op_type == "SkipSimplifiedLayerNormalization"]
    # Two norms a layer, of which the first one's addition closes the layer before.
    sums = [node.outputs[3] for node in nodes[1::2]]
    if len(nodes) != 2 * config.num_hidden_layers:
        raise ExportError(f"{len(nodes)} additions to the residual stream; this is a defect, please report it")
    for layer, value in enumerate(sums):
        value.name = residual_name(layer)
        value.type = _activations(model)
        value.shape = ir.Shape((BATCH, SEQUENCE, config.hidden_size))
        model.graph.outputs.append(value)
    return len(sums)


def hide_residuals(model: ir.Model) -> int:
    """Makes them no outputs any more. Returns how many."""
    shown = [value for value in model.graph.outputs if (value.name or "").startswith(residual_name(""))]
    for value in shown:
        model.graph.outputs.remove(value)
        value.shape = value.type = None
        value.name = value.name if value.uses() else ""  # of the last layer: read by nobody else
    return len(shown)


def _activations(model: ir.Model) -> ir.TypeProtocol:
    """The type of what flows between a graph's layers, which is its state's too."""
    state = next(value for value in model.graph.outputs if value.name != "logits")
    assert state.type is not None
    return ir.TensorType(state.dtype)


def score_every_position(model: ir.Model) -> int:
    """Makes the head read all positions, or those from ``FIRST_SCORED`` on where a run gives it: a Slice in the place
    of the GatherND that picks each row's last one. Returns 1."""
    logits = model.graph.outputs[0]
    picks = [n for n in model.graph if n.op_type == "GatherND" and not any(o.is_graph_output() for o in n.outputs)]
    if logits.name != "logits" or len(picks) != 1:
        raise ExportError(f"found {len(picks)} places where the last position is picked; this is a defect, report it")
    (pick,) = picks
    scored = _from_first_scored(model, pick)
    pick.outputs[0].replace_all_uses_with(scored)
    model.graph.remove(pick, safe=True)
    _reshape_like(model, logits, scored)
    assert logits.shape is not None
    logits.shape = ir.Shape((BATCH, SCORED, logits.shape[2]))
    common_passes.RemoveUnusedNodesPass()(model)
    return len(picks)


def _from_first_scored(model: ir.Model, pick: ir.Node) -> ir.Value:
    """What ``pick`` reads, from an input's position on: an initializer too, which a run may leave as it is."""
    hidden = pick.inputs[0]
    assert hidden is not None
    bounds = {FIRST_SCORED: 0, "last_scored": 2**63 - 1, "scored_axis": 1}
    values = [ir.Value(name=name, const_value=ir.tensor([n], ir.DataType.INT64)) for name, n in bounds.items()]
    for value in values:
        value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape((1,))
        model.graph.register_initializer(value)
    model.graph.inputs.append(values[0])
    slice_ = ir.node("Slice", [hidden, *values], name="scored")
    slice_.outputs[0].name = "scored_out0"
    model.graph.insert_before(pick, slice_)
    return slice_.outputs[0]


def _reshape_like(model: ir.Model, logits: ir.Value, hidden: ir.Value) -> None:
    """Where a Gemm makes the logits, the Reshape behind it has the single position of the trace as a constant."""
    reshape = logits.producer()
    if reshape is not None and reshape.op_type == "Cast":  # fp16 programs
        assert reshape.inputs[0] is not None
        reshape = reshape.inputs[0].producer()
    if reshape is None or reshape.op_type != "Reshape":
        return
    assert logits.shape is not None
    width = ir.Value(name="vocab_size", const_value=ir.tensor([logits.shape[2]], ir.DataType.INT64))
    model.graph.register_initializer(width)
    size = ir.node("Shape", [hidden], {"start": 0, "end": 2}, name="hidden_size")
    shape = ir.node("Concat", [size.outputs[0], width], {"axis": 0}, name="logits_shape")
    for node in (size, shape):
        node.outputs[0].name = f"{node.name}_out0"
    model.graph.insert_before(reshape, [size, shape])
    reshape.replace_input_with(1, shape.outputs[0])


def expected_operators(config: ModelConfig, plan: WeightPlan) -> dict[str, int]:
    """How often each fused operator must stand in the graph of this model under this plan."""
    quantized = [w for w in plan.values() if isinstance(w.format, IntFormat)]
    experts = len(config.moe_layers)
    quantized_experts = sum(w.layout is Layout.DOWN for w in quantized)
    attention = len(config.attention_layers)
    plain_rope = config.head_dim % 16 != 0 or plan.activation_dtype == "float16"
    return {
        "GroupQueryAttention": attention,
        "RotaryEmbedding": 2 * attention * plain_rope,
        "CausalConvWithState": len(config.conv_layers),
        # The first norm has nothing to add; q and k norms; those behind a block's two halves.
        "SimplifiedLayerNormalization": 1 + 2 * attention + 2 * config.num_hidden_layers * config.use_sandwich_norm,
        "SkipSimplifiedLayerNormalization": 2 * config.num_hidden_layers,
        "MatMulNBits": sum(w.layout is Layout.MATMUL for w in quantized),
        "GatherBlockQuantized": sum(w.layout is Layout.TABLE for w in quantized),
        "QMoE": quantized_experts,
        "MoE": experts - quantized_experts,
    }


def expected_encoder_operators(config: ModelConfig, plan: WeightPlan) -> dict[str, int]:
    """The same of an encoder."""
    quantized = [w for w in plan.values() if isinstance(w.format, IntFormat)]
    attention = len(config.attention_layers)
    return {
        "MultiHeadAttention": attention,
        "RotaryEmbedding": 2 * attention,
        "CausalConvWithState": len(config.conv_layers),
        "SimplifiedLayerNormalization": 1 + 2 * attention,
        "SkipSimplifiedLayerNormalization": 2 * config.num_hidden_layers,
        "MatMulNBits": sum(w.layout is Layout.MATMUL for w in quantized),
        "GatherBlockQuantized": sum(w.layout is Layout.TABLE for w in quantized),
    }


def expected_drafter_operators(config: ModelConfig, plan: WeightPlan) -> dict[str, int]:
    """The same of a drafter, whose Markov matrices are read once for each proposal."""
    assert config.drafter is not None
    quantized = [w for w in plan.values() if isinstance(w.format, IntFormat)]
    layers, again = config.num_hidden_layers, [f"markov_head.{name}" for name in ("markov_w1", "markov_w2")]
    readings = {weight.name: config.drafter.block_size if weight.name in again else 1 for weight in quantized}
    return {
        # The first norm of the block, that of the streams, and those of q and k.
        "SimplifiedLayerNormalization": 2 + 2 * layers,
        "SkipSimplifiedLayerNormalization": 2 * layers,
        "MatMulNBits": sum(readings[w.name] for w in quantized if w.layout is Layout.MATMUL),
        "GatherBlockQuantized": sum(readings[w.name] for w in quantized if w.layout is Layout.TABLE),
        "Softmax": layers,
        "ArgMax": config.drafter.block_size,
    }


def check_operators(model: ir.Model, expected: Mapping[str, int]) -> dict[str, int]:
    """Counts the fused operators.

    Raises:
        ExportError: a count differs, so some layer was not lowered as planned.
    """
    counts = Counter(node.op_type for node in model.graph)
    wrong = [f"{op}: {counts[op]} instead of {n}" for op, n in expected.items() if counts[op] != n]
    if wrong:
        raise ExportError(f"the lowered graph has {'; '.join(wrong)}; this is a defect, please report it")
    return {op: counts[op] for op in expected}
