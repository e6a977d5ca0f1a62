"""A .pte with 8-bit linear layers beside those of 4 bits: XNNPACK takes them all, and they are found in the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

pytest.importorskip("executorch")

import numpy as np
import torch
import torch.nn.functional as F
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from torch import Tensor, nn

from lfm2_export.backends.eager import EagerRunner
from lfm2_export.backends.executorch import KL_TOLERANCE, export, ops
from lfm2_export.backends.executorch.lower import ExecutorchLinear
from lfm2_export.backends.executorch.plan import make_plan
from lfm2_export.backends.executorch.quiet import quiet
from lfm2_export.backends.executorch.weights import Codes
from lfm2_export.backends.executorch.xnnpack import partitioner
from lfm2_export.checkpoint import Checkpoint
from lfm2_export.errors import ArtifactError, QuantizationError
from lfm2_export.families.tensors import HEAD
from lfm2_export.models.loading import load_model
from lfm2_export.quant.formats import IntFormat
from lfm2_export.quant.schemes import FormatChoice, Scheme, get_scheme
from tests.backends.executorch.programs import (
    MAX_CONTEXT,
    Made,
    checkpoint_of,
    divergence,
    make,
    prompt,
    request,
)

ROWS = IntFormat(bits=8, group_size=None, symmetric=True)
SIZES = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
WIDE = ("model.layers.0.conv.in_proj.weight", "model.layers.1.self_attn.q_proj.weight", HEAD)
EXPERT = "model.layers.1.feed_forward.experts.0.w1.weight"


def scheme_with(names: Sequence[str], form: IntFormat = ROWS) -> Scheme:
    return replace(get_scheme("8da4w"), choices={name: FormatChoice(form, "a test") for name in names})


@cache
def checkpoint() -> Checkpoint:
    return checkpoint_of("lfm2_moe", layer_types=("conv", "full_attention"), **SIZES)


@cache
def uniform() -> Made:
    return make(checkpoint(), "8da4w")


@cache
def mixed() -> Made:
    """The same checkpoint, with a projection that is cut into three, one of those that share an input, and the head."""
    asked = replace(request(checkpoint(), "8da4w"), scheme=scheme_with(WIDE))
    export.estimate(asked)
    return Made(checkpoint=checkpoint(), folder=asked.folder, exported=export.export_program(asked))


def test_nothing_is_left_to_other_operators() -> None:
    """The same calls as in the uniform program, none of which multiplies or dequantizes a layer."""
    found = [(one.exported.options["delegates"], one.exported.options["operators"]) for one in (uniform(), mixed())]
    assert found[0] == found[1]
    (operators,) = mixed().exported.options["operators"].values()
    print(operators)
    assert not [name for name in operators if any(part in name for part in ("linear", "mm", "dequantize", "per_token"))]


class OnFloats(ExecutorchLinear):
    """A control: the same weight without quantized activations."""

    def forward(self, x: Tensor) -> Tensor:
        weight = ops.dequantized_weight(self.weight, self.scale, self.zero_point, self.group_size)
        return F.linear(x, weight, self.bias)


def calls_left(kind: type[nn.Module]) -> list[str]:
    """The calls of a lowered layer with random codes of 8 bits."""
    rng = np.random.default_rng(0)
    codes = Codes(
        qdata=torch.from_numpy(rng.integers(-128, 128, (24, 64)).astype(np.int8)),
        scale=torch.from_numpy(rng.random((24, 1), np.float32) / 100),
        group_size=None,
    )
    with torch.no_grad(), quiet():
        tokens = torch.export.Dim("T", min=1, max=8)
        layer = kind(codes, None).eval()
        exported = torch.export.export(layer, (torch.zeros(1, 5, 64),), dynamic_shapes=({1: tokens},), strict=False)
        config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
        edge = to_edge_transform_and_lower(exported, partitioner=[partitioner()], compile_config=config)
    return [str(node.target) for node in edge.exported_program().graph.nodes if node.op == "call_function"]


def test_a_layer_of_8_bits_is_one_call_of_xnnpack() -> None:
    calls = calls_left(ExecutorchLinear)
    print(calls)
    assert calls[0] == "executorch_call_delegate"
    assert len(calls) == 2  # and what takes its one result
    with pytest.raises(RuntimeError, match="was not decomposed or delegated"):
        calls_left(OnFloats)


def test_the_program_computes_what_its_file_holds() -> None:
    made = mixed()
    tokens = prompt(made, 24)
    expected = made.eager().prefill([tokens])
    found = made.runner().prefill([tokens])
    lost = float(divergence(expected, found).mean())
    unquantized = EagerRunner(load_model(made.checkpoint), context_length=MAX_CONTEXT)
    other = float(divergence(unquantized.prefill([tokens]), found).mean())
    print(f"KL {lost:.2e}, from the checkpoint's own weights {other:.2e}")
    assert other > 3 * lost
    assert lost < KL_TOLERANCE


def test_stored_weights_are_the_quantized_ones() -> None:
    from lfm2_export.backends.executorch.stored import StoredWeights
    from lfm2_export.quant.algorithms import get_algorithm

    made = mixed()
    places = made.exported.options["weights"][made.path.name]
    stored = StoredWeights(made.path, places, made.checkpoint.config)
    for name in WIDE:
        weight = made.checkpoint.read("model.embed_tokens.weight" if name == HEAD else name)
        assert np.array_equal(stored.read(name), get_algorithm("round")(weight, ROWS).dequantize())
        assert stored.tensors[name].dtype == "int8"
    described = {row["format"] for row in made.exported.options["widths"] if row["part"] == "head"}
    assert described == {"int8 by rows"}
    records = {tensor.name: tensor.granularity for tensor in made.exported.tensors}
    assert records[HEAD] == "rows, symmetric, float32 scales"


def test_a_manifest_that_says_otherwise_is_refused() -> None:
    from lfm2_export.backends.executorch.stored import StoredWeights

    made = mixed()
    places: dict[str, Any] = dict(made.exported.options["weights"][made.path.name])
    (part,) = places[HEAD]
    for change, said in (({"scale": 7}, "has scale=7, not a SHA-256"), ({"kind": "int4"}, "has group_size=None")):
        with pytest.raises(ArtifactError, match=said):
            StoredWeights(made.path, places | {HEAD: [part | change]}, made.checkpoint.config)
    moved = StoredWeights(made.path, places | {HEAD: [part | {"scale": "0" * 64}]}, made.checkpoint.config)
    with pytest.raises(ArtifactError, match=r"does not hold lm_head\.weight as the manifest describes it"):
        moved.read(HEAD)


@pytest.mark.parametrize(
    ("names", "form", "message"),
    [
        (
            WIDE,
            replace(ROWS, group_size=32),
            "8 bits in groups of 32, but XNNPACK takes 8 bits with a scale for a whole",
        ),
        (WIDE, replace(ROWS, bits=4), "group_size=None, but XNNPACK takes multiples of 32"),
        ([EXPERT], ROWS, "llama::quantized_moe_ffn takes symmetric int4"),
    ],
    ids=["groups of 8 bits", "rows of 4 bits", "experts of 8 bits"],
)
def test_what_the_operators_do_not_take_is_refused_before_any_work(
    names: Sequence[str], form: IntFormat, message: str
) -> None:
    with pytest.raises(QuantizationError, match=message):
        make_plan(checkpoint().config, scheme_with(names, form))
