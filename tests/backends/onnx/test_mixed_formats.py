"""Matrices of one layer in different formats: what reads several at once reads each as it is stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import lfm2_export
from lfm2_export.artifact import Artifact
from lfm2_export.backends.onnx import variants
from lfm2_export.backends.onnx.plan import make_plan
from lfm2_export.backends.onnx.stored import StoredWeights
from lfm2_export.errors import QuantizationError
from lfm2_export.families import get_family
from lfm2_export.families.tensors import ModelTensor, TensorClass
from lfm2_export.models.loading import load_model
from lfm2_export.quant.formats import IntFormat
from lfm2_export.quant.schemes import FormatChoice, Scheme, get_scheme
from tests.checkpoints import tiny_config, write_random_checkpoint

# All widths are multiples of 128, so that every size of group fits everywhere.
CONFIG = tiny_config(
    "lfm2_moe",
    layer_types=["full_attention", "conv", "full_attention", "full_attention", "conv", "conv"],
    num_hidden_layers=6,
    hidden_size=256,
    intermediate_size=384,
    moe_intermediate_size=128,
    num_dense_layers=4,
    tie_word_embeddings=False,
)
ALIKE = (0, 2)  # layers whose matrices share a format where they are read together

Choose = Callable[[Scheme, ModelTensor], FormatChoice]


def of_format(bits: int, group_size: int, symmetric: bool) -> IntFormat:
    return IntFormat(
        bits=bits, group_size=group_size, symmetric=symmetric, signed_scale=symmetric, scale_dtype="float16"
    )


FORMATS = [of_format(bits, size, bits == 8 or size == 64) for size in (16, 32, 64, 128) for bits in (4, 8)]


def mixed() -> Choose:
    """Every linear in the next format of all, those of one layer in different ones; experts of a layer in one."""
    forms, found = cycle(FORMATS), {}
    plain = Scheme.format_for

    def choose(scheme: Scheme, tensor: ModelTensor) -> FormatChoice:
        if tensor.kind not in (TensorClass.LINEAR, TensorClass.EXPERTS, TensorClass.HEAD):
            return plain(scheme, tensor)
        together = tensor.kind is TensorClass.EXPERTS or tensor.layer in ALIKE
        key = tensor.layer if together else tensor.name
        if key not in found:
            found[key] = next(forms)
        return FormatChoice(found[key], "of this test")

    return choose


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    write_random_checkpoint(folder / "checkpoint", CONFIG, seed=0, dtype="F32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheme, "format_for", mixed())
        lfm2_export.export(folder / "checkpoint", scheme="q4", algorithm="round", output=folder / "artifact")
    return folder


def graph_of(made: Path, role: str) -> Path:
    return made / "artifact" / Artifact.open(made / "artifact", verify=False).program("onnx", "q4").graphs[role]


def test_matrices_in_different_formats_are_fused_all_the_same(made: Path) -> None:
    nodes = onnx.load(graph_of(made, "lfm2"), load_external_data=False).graph.node
    counts = Counter(node.op_type for node in nodes)
    found = {op: counts[op] for op in ("Projections", "FeedForward", "SparseMoe", "MatMulNBits", "QMoE")}
    print(found)
    # Attention's output, both projections of a conv, and the head are alone.
    alone = 3 + 2 * 3 + 1
    assert found == {"Projections": 3, "FeedForward": 4, "SparseMoe": 2, "MatMulNBits": alone, "QMoE": 0}
    several = {a.name for node in nodes for a in node.attribute if a.name.endswith(("_bits", "_block_size"))}
    own = {"up_bits", "up_block_size", "N1_bits", "N1_block_size", "N2_bits", "N2_block_size"}
    assert several == own | {"down_bits", "down_block_size"}
    sizes = {(a.name, a.i) for node in nodes for a in node.attribute if a.name in ("bits", "block_size")}
    table = ("block_size", 256)  # the mixture's choice
    groups = {("block_size", size) for size in (16, 32, 64, 128)}
    assert sizes == {("bits", 4), ("bits", 8), *groups, table}


def test_the_reader_of_weights_knows_each_matrixs_own_format(made: Path) -> None:
    config = lfm2_export.open_checkpoint(made / "checkpoint").config
    portable, own = (StoredWeights(graph_of(made, role), config) for role in ("model", "lfm2"))
    assert {tensor.dtype for tensor in own.tensors.values()} == {"int4", "int8", "float32"}
    for name in portable.tensors:
        assert own.tensors[name].dtype == portable.tensors[name].dtype
        assert np.array_equal(own.read(name), portable.read(name)), name


# Medians over 24 positions: 0.056 of the logits' spread with ours, 0.061 with onnxruntime's: int8 activations.
FAR, FACTOR = 0.08, 1.1


@pytest.mark.skipif(variants.own_library() is None, reason="our operators cannot be had here")
def test_each_matrix_is_multiplied_with_in_its_own_format(made: Path) -> None:
    config = lfm2_export.open_checkpoint(made / "checkpoint").config
    model = load_model(StoredWeights(graph_of(made, "model"), config))
    ids = np.random.default_rng(0).integers(3, CONFIG["vocab_size"], 24).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    spread = np.linalg.norm(expected - expected.mean(), axis=1)

    def distance(kernels: str, expected: np.ndarray = expected) -> float:
        runner = lfm2_export.load_runner(made / "artifact", scheme="q4", threads=1, kernels=kernels)
        return float(np.median(np.linalg.norm(runner.score([ids])[0] - expected, axis=1) / spread))

    ours, stock, control = distance("lfm2"), distance("stock"), distance("lfm2", expected[::-1])
    print(f"median distance from full precision {ours:.4f}, onnxruntime's {stock:.4f}; control {control:.1f}")
    assert stock <= FAR
    assert ours <= FACTOR * stock
    assert control > 1


@pytest.mark.parametrize("other", [of_format(8, 64, True), of_format(4, 64, False)])
def test_experts_of_a_layer_in_several_formats_are_refused(monkeypatch: pytest.MonkeyPatch, other: Any) -> None:
    plain = Scheme.format_for

    def choose(scheme: Scheme, tensor: ModelTensor) -> FormatChoice:
        return FormatChoice(other, "") if tensor.name.endswith("experts.1.w2.weight") else plain(scheme, tensor)

    monkeypatch.setattr(Scheme, "format_for", choose)
    with pytest.raises(QuantizationError, match=r"layers\.4\..*several formats, but QMoE holds all of them in one"):
        make_plan(get_family("lfm2_moe").parse_config(CONFIG), get_scheme("q4"))


def test_experts_in_groups_of_several_sizes_get_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Scheme.format_for

    def choose(scheme: Scheme, tensor: ModelTensor) -> FormatChoice:
        size = 32 if tensor.name.endswith("w2.weight") else 128
        is_expert = tensor.kind is TensorClass.EXPERTS
        return FormatChoice(of_format(4, size, True), f"size {size}") if is_expert else plain(scheme, tensor)

    monkeypatch.setattr(Scheme, "format_for", choose)
    plan = make_plan(get_family("lfm2_moe").parse_config(CONFIG), get_scheme("q4"))
    stacks = [weight for name, weight in plan.items() if ".experts." in name]
    assert {weight.format for weight in stacks} == {of_format(4, 32, True)}
    assert {weight.reason for weight in stacks} == {"size 32"}
