"""Graph passes: each does its rewrite, says how often, and finds nothing the second time; a bad lowering is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest

from lfm2_export.backends.onnx import graphs, lower, passes
from lfm2_export.backends.onnx.plan import make_plan
from lfm2_export.cache import CacheSpec
from lfm2_export.errors import ExportError
from lfm2_export.families import get_family
from lfm2_export.quant.schemes import get_scheme
from tests.checkpoints import tiny_config

FLOAT = ir.TensorType(ir.DataType.FLOAT)


def value(name: str, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=FLOAT)


def node(op: str, inputs: list[ir.Value | None], attributes: dict[str, Any] | None = None, outputs: int = 1) -> ir.Node:
    made = ir.node(op, inputs, attributes or {}, num_outputs=outputs, domain="com.microsoft" if op == "QMoE" else "")
    for index, output in enumerate(made.outputs):
        output.name = f"{op.lower()}_{id(made)}_{index}"
    return made


def model(inputs: list[ir.Value], outputs: list[ir.Value], nodes: list[ir.Node]) -> ir.Model:
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 21, "com.microsoft": 1}, name="test")
    return ir.Model(graph, ir_version=10)


def test_simplify_removes_dead_nodes_and_keeps_initializers_that_are_read():
    x, read, unread = value("x", 2), value("read", 2), value("unread", 2)
    add, dead = node("Add", [x, read]), node("Mul", [x, unread])
    built = model([x], [add.outputs[0]], [add, dead])
    for initializer in (read, unread):
        initializer.const_value = ir.ExternalTensor("data", 0, 8, ir.DataType.FLOAT, shape=ir.Shape([2]), name="w")
        built.graph.register_initializer(initializer)
    assert passes.simplify(built) == 1
    assert list(built.graph.initializers) == ["read"]
    assert read.const_value is not None  # never read from the disk, though it names no file
    assert [i.name for i in built.graph.inputs] == ["x"]
    assert passes.simplify(built) == 0


def test_unread_outputs_are_unnamed():
    x, weight = value("x", 2), value("weight", 2)
    first = node("SkipSimplifiedLayerNormalization", [x, x, weight], outputs=4)
    last = node("SkipSimplifiedLayerNormalization", [first.outputs[0], first.outputs[3], weight], outputs=4)
    built = model([x, weight], [last.outputs[0]], [first, last])
    assert passes.drop_unread_outputs(built) == 2 + 3
    assert [bool(o.name) for o in first.outputs] == [True, False, False, True]
    assert [bool(o.name) for o in last.outputs] == [True, False, False, False]
    assert passes.drop_unread_outputs(built) == 0


def test_debris_is_stripped():
    x = value("x", 2)
    add = node("Add", [x, x])
    add.metadata_props["pkg.torch.onnx.stack_trace"] = "File /home/someone/model.py"
    add.doc_string = "traced"
    relu = node("Relu", [add.outputs[0]])
    add.outputs[0].shape = ir.Shape(["s77"])
    built = model([x], [relu.outputs[0]], [add, relu])
    relu.outputs[0].shape = ir.Shape([2])
    built.graph.doc_string = built.doc_string = "made by"
    assert passes.strip_debris(built) == 1
    assert not add.metadata_props
    assert add.doc_string is built.doc_string is built.graph.doc_string is None
    assert add.outputs[0].shape is None
    assert relu.outputs[0].shape == ir.Shape([2])  # the graph's own outputs keep theirs
    assert passes.strip_debris(built) == 0


def test_nodes_are_numbered_by_kind():
    x = value("x", 2)
    add = node("Add", [x, x])
    again = node("Add", [add.outputs[0], x])
    again.outputs[0].name = "logits"
    built = model([x], [again.outputs[0]], [add, again])
    assert passes.number_nodes(built) == 2
    assert [n.name for n in built.graph] == ["Add_1", "Add_2"]
    assert [n.outputs[0].name for n in built.graph] == ["Add_1_out0", "logits"]


def test_only_4_bit_experts_get_the_fast_kernels():
    x = value("x", 2)
    nodes = [node("QMoE", [x], {"expert_weight_bits": bits}) for bits in (4, 8, 4)]
    built = model([x], [n.outputs[0] for n in nodes], nodes)
    assert passes.allow_int8_experts(built) == 2
    assert ["accuracy_level" in n.attributes for n in nodes] == [True, False, True]


def test_scoring_needs_one_place_where_the_last_position_is_picked():
    x = value("x", "batch_size", "sequence_length", 4)
    relu = node("Relu", [x])
    relu.outputs[0].name, relu.outputs[0].shape = "logits", ir.Shape(["batch_size", 1, 4])
    with pytest.raises(ExportError, match=r"found 0 places where the last position is picked"):
        passes.score_every_position(model([x], [relu.outputs[0]], [relu]))


def test_check_operators_names_what_is_missing():
    x = value("x", 2)
    built = model([x], [], [node("QMoE", [x])])
    assert passes.check_operators(built, {"QMoE": 1, "MoE": 0}) == {"QMoE": 1, "MoE": 0}
    with pytest.raises(ExportError, match=r"QMoE: 1 instead of 2; MatMulNBits: 0 instead of 1; this is a defect"):
        passes.check_operators(built, {"QMoE": 2, "MatMulNBits": 1, "MoE": 0})


def make_graphs(scheme: str) -> graphs.Graphs:
    raw = tiny_config(
        "lfm2_moe",
        num_hidden_layers=2,
        layer_types=["conv", "full_attention"],
        num_dense_layers=1,
        tie_word_embeddings=False,
    )
    config = get_family("lfm2_moe").parse_config(raw)
    chosen = get_scheme(scheme)
    return graphs.make_graphs(config, make_plan(config, chosen), CacheSpec.from_config(config, chosen.activation_dtype))


class PlainNorm(lower.OnnxRMSNorm):
    """What a new exporter release might leave behind: the same arithmetic, without the fused operator."""

    def forward(self, x: Any) -> Any:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


def test_a_layer_that_was_not_lowered_is_noticed(monkeypatch):
    monkeypatch.setattr(lower, "OnnxRMSNorm", PlainNorm)
    with pytest.raises(ExportError, match=r"SimplifiedLayerNormalization: 1 instead of 3"):
        make_graphs("fp32")


def unplanned(original: Callable[..., Any]) -> Callable[..., Any]:
    def lowered(self: lower.Lowering, name: str, module: Any) -> Any:
        return module if name == "model.layers.0.conv.in_proj" else original(self, name, module)

    return lowered


def test_a_weight_that_is_not_in_the_plan_is_noticed(monkeypatch):
    monkeypatch.setattr(lower.Lowering, "_lowered", unplanned(lower.Lowering._lowered))
    with pytest.raises(ExportError, match=r"model.layers.0.conv.in_proj.weight: traced but not in the weight plan"):
        make_graphs("q4")
