"""Lowering: what stands in the exported graphs, and that the router's arithmetic is the model's to the last term."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper

import lfm2_export
from lfm2_export.artifact import Artifact
from lfm2_export.backends import get_backend
from lfm2_export.backends.onnx.lower import Lowering, OnnxAttention
from lfm2_export.backends.onnx.plan import make_plan
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.families import get_family
from lfm2_export.models import decoder as eager
from lfm2_export.models import get_net, lfm2_moe
from lfm2_export.quant.schemes import get_scheme
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.conftest import SCHEMES
from tests.graphs import Graph

CONV, ATTENTION = "conv", "full_attention"
FAMILIES = ("tiny-moe", "tiny-dense")

# Of the bundled checkpoints, counted by hand: 6 layers, of them 2 attention (q, k, v, out) and 4 conv (in, out); dense
# feed-forward blocks (w1, w2, w3) in 2 layers of tiny-moe and in all of tiny-dense; one head.
COMMON = {
    "GroupQueryAttention": 2,
    "CausalConvWithState": 4,
    "SimplifiedLayerNormalization": 5,
    "SkipSimplifiedLayerNormalization": 12,
}
LINEARS = {"tiny-moe": 2 * 4 + 4 * 2 + 2 * 3 + 1, "tiny-dense": 2 * 4 + 4 * 2 + 6 * 3 + 1}
MOE_LAYERS = {"tiny-moe": 4, "tiny-dense": 0}

Exported = Callable[[str], Path]


def graphs_of(folder: Path, scheme: str) -> dict[str, onnx.ModelProto]:
    program = Artifact.open(folder, verify=False).program("onnx", scheme)
    return {role: onnx.load(folder / name, load_external_data=False) for role, name in program.graphs.items()}


def attributes(model: onnx.ModelProto, op: str) -> list[dict[str, Any]]:
    nodes = [node for node in model.graph.node if node.op_type == op]
    return [{a.name: helper.get_attribute_value(a) for a in node.attribute} for node in nodes]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_every_layer_became_its_operator(artifact: Exported, checkpoint, scheme):
    quantized, experts = scheme in ("q8", "q4", "q4f16"), MOE_LAYERS[checkpoint]
    expected = COMMON | {
        "RotaryEmbedding": 2 * 2 * ("16" in scheme),
        "MatMulNBits": quantized * LINEARS[checkpoint],
        "GatherBlockQuantized": int(quantized),
        "QMoE": quantized * experts,
        "MoE": (not quantized) * experts,
    }
    folder = artifact(checkpoint)
    for role, model in graphs_of(folder, scheme).items():
        if role.startswith("lfm2"):
            continue  # test_own_ops.py
        counts = Counter(node.op_type for node in model.graph.node)
        assert {op: counts[op] for op in expected} == expected, role
        routers = (not quantized) * (
            LINEARS[checkpoint] - 1
        ) + experts  # a plain head is a Gemm on the embedding's table
        assert counts["MatMul"] == routers, role
    assert dict(Artifact.open(folder, verify=False).program("onnx", scheme).operators) == expected


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_inputs_and_outputs_are_the_contracts(artifact: Exported, checkpoint, scheme):
    path = artifact(checkpoint) / "onnx" / get_backend("onnx").SCHEMES[scheme]
    config, kind = open_checkpoint(checkpoint).config, "tensor(float16)" if "16" in scheme else "tensor(float)"
    inputs = {
        "input_ids": ("tensor(int64)", ["batch_size", "sequence_length"]),
        "attention_mask": ("tensor(int64)", ["batch_size", "total_sequence_length"]),
    }
    outputs: dict[str, Any] = {"logits": ("tensor(float)", ["batch_size", 1, config.vocab_size])}
    for layer in config.conv_layers:
        inputs[f"past_conv.{layer}"] = outputs[f"present_conv.{layer}"] = (kind, ["batch_size", 2, 256])
    for layer in config.attention_layers:
        for part in ("key", "value"):
            inputs[f"past_key_values.{layer}.{part}"] = (kind, ["batch_size", 2, "past_sequence_length", 32])
            outputs[f"present.{layer}.{part}"] = (kind, ["batch_size", 2, "total_sequence_length", 32])
    session = ort.InferenceSession(path)
    assert {v.name: (v.type, v.shape) for v in session.get_inputs()} == inputs
    assert {v.name: (v.type, v.shape) for v in session.get_outputs()} == outputs
    opsets = onnx.load(path, load_external_data=False).opset_import
    assert {(opset.domain, opset.version) for opset in opsets} == {("", 21), ("com.microsoft", 1)}


def test_only_the_cpu_graph_uses_what_older_runtimes_do_not_know(artifact: Exported):
    """QMoE's accuracy_level: onnxruntime before 1.31 refuses a graph that has it."""
    folder = artifact("tiny-moe")
    for scheme in ("q4", "q4f16"):
        found = graphs_of(folder, scheme)
        own = {"lfm2", "lfm2_scoring", "lfm2_kv8", "lfm2_kv8_scoring"} if scheme == "q4" else set()
        assert set(found) == {"model", "cpu", "scoring"} | own
        assert [a.get("accuracy_level") for a in attributes(found["model"], "QMoE")] == [None] * 4
        assert [a.get("accuracy_level") for a in attributes(found["cpu"], "QMoE")] == [4] * 4
    own = {"lfm2", "lfm2_scoring", "lfm2_kv8", "lfm2_kv8_scoring"}
    assert set(graphs_of(folder, "q8")) == {"model", "scoring"} | own
    assert set(graphs_of(folder, "fp32")) == {"model", "scoring"}
    assert set(graphs_of(artifact("tiny-dense"), "q4")) == {"model", "scoring"} | own


def test_graphs_of_a_program_read_the_same_bytes(artifact: Exported):
    for scheme in SCHEMES:
        found = graphs_of(artifact("tiny-moe"), scheme)
        places = [
            {i.name: [(e.key, e.value) for e in i.external_data] for i in model.graph.initializer if i.external_data}
            for model in found.values()
        ]
        assert all(each == places[0] for each in places)
        assert len(places[0]) > 50


@pytest.mark.parametrize(
    ("head_dim", "dtype", "fused"),
    [(16, "float32", 1), (32, "float32", 1), (8, "float32", 0), (24, "float32", 0), (16, "float16", 0)],
)
def test_rope_is_inside_attention_where_the_kernels_can(head_dim, dtype, fused):
    config = get_family("lfm2").parse_config(
        tiny_config("lfm2", num_hidden_layers=1, layer_types=[ATTENTION], head_dim=head_dim)
    )
    assert OnnxAttention(config, getattr(torch, dtype)).fused_rope == bool(fused)


@pytest.mark.parametrize("model_type", ["lfm2", "lfm2_moe"])
def test_no_leaf_of_the_eager_model_is_left(model_type):
    config = get_family(model_type).parse_config(tiny_config(model_type))
    plan = make_plan(config, get_scheme("q4"))
    with torch.device("meta"):
        model = get_net(model_type)(config)
        count = Lowering(config, plan).lower_(model)
    leaves = (torch.nn.Linear, torch.nn.Embedding, eager.RMSNorm, eager.CausalConv, eager.GroupedQueryAttention)
    assert not [name for name, module in model.named_modules() if isinstance(module, leaves)]
    # Two norms a layer and the last one; 2 a conv layer and its convolution; 4 linears, q and k norm, and the
    # kernel per attention layer; w1, w2, w3 per dense layer or one block; embedding, head, layout.
    dense = config.num_dense_layers
    assert count == 2 * 5 + 1 + 3 * 3 + 2 * 7 + 3 * dense + (5 - dense) + 3


def with_router_scale(checkpoint: Path, factor: float) -> Path:
    """Multiplies the routers' weights where they lie in the file (float32)."""
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:start]).items():
        if name.endswith("feed_forward.gate.weight"):
            begin, end = (start + offset for offset in entry["data_offsets"])
            data[begin:end] = (np.frombuffer(data[begin:end], np.float32) * np.float32(factor)).tobytes()
    path.write_bytes(data)
    return checkpoint


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_routing_is_exact_where_all_scores_are_faint(tmp_path, monkeypatch, norm_topk_prob):
    """The model adds 1e-6 to the sum of the chosen scores: experts that all say no then say nothing. Sigmoid in
    onnxruntime is 0 below -18, and the operators' own normalization knows no such term."""
    raw = tiny_config(
        "lfm2_moe",
        num_hidden_layers=2,
        layer_types=[CONV, ATTENTION],
        num_experts=2,
        num_dense_layers=0,
        use_expert_bias=False,
        norm_topk_prob=norm_topk_prob,
    )
    checkpoint = with_router_scale(write_random_checkpoint(tmp_path / "checkpoint", raw, seed=0, dtype="F32"), 20.0)
    schemes = ("fp32", "fp16", "q8") if norm_topk_prob else ("fp32",)
    lfm2_export.export(checkpoint, scheme=schemes[:-1] or schemes, output=tmp_path / "artifact")
    if "q8" in schemes:  # of experts alone, so that the routers see what they see in fp32
        rest = ("*_proj.weight", "model.embed_tokens.weight")
        lfm2_export.export(checkpoint, scheme="q8", exclude=rest, output=tmp_path / "artifact")
    model = get_net(open_checkpoint(checkpoint).config.model_type).from_pretrained(checkpoint)
    ids = np.random.default_rng(0).integers(0, raw["vocab_size"], (1, 64))
    with torch.inference_mode():
        out = model(torch.from_numpy(ids), output_router_logits=True)
        faint = sum(int((logits.amax(-1) < -14).sum()) for logits in out.router_logits)
        monkeypatch.setattr(lfm2_moe, "ROUTING_EPS", 0.0)
        control = np.abs((model(torch.from_numpy(ids)).logits - out.logits).numpy()).max()
    assert faint > 5, "the test's own premise"
    for scheme in schemes:
        graph = Graph(tmp_path / "artifact", scheme, "scoring")
        logits = graph(ids, np.ones_like(ids), graph.empty(1))[0]
        error = np.abs(logits - out.logits.numpy()).max()
        print(f"{scheme}: {faint} tokens with faint scores, logit error {error:.2e}; without 1e-6 {control:.2e}")
        assert error <= {"fp32": 1e-4, "fp16": 0.1, "q8": 0.5}[scheme]
        if norm_topk_prob:
            assert error < control / 4
