"""The weight plan: every tensor of a checkpoint once, in the format that the scheme and the options say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest

from lfm2_export.backends.onnx.plan import Layout, make_plan
from lfm2_export.backends.weights.plan import WeightPlan
from lfm2_export.config import ModelConfig
from lfm2_export.errors import QuantizationError
from lfm2_export.families import get_family
from lfm2_export.quant.formats import FloatFormat, IntFormat
from lfm2_export.quant.schemes import get_scheme
from tests.checkpoints import tiny_config

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
SCHEMES = ("fp32", "fp16", "q8", "q4", "q4f16")
EXPERTS = "model.layers.1.feed_forward.experts"
WIDE = {"hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 256}


def config_of(model_type: str = "lfm2_moe", **overrides: Any) -> ModelConfig:
    return get_family(model_type).parse_config(tiny_config(model_type, **overrides))


def plan_of(
    config: ModelConfig, scheme: str = "q4", group_size: int | None = None, exclude: Sequence[str] = ()
) -> WeightPlan:
    chosen = get_scheme(scheme).with_exclude(exclude)
    return make_plan(config, chosen if group_size is None else chosen.with_group_size(group_size))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["lfm2", "lfm2_moe"])
def test_every_tensor_is_stored_once(model_type, tied, scheme):
    config = config_of(model_type, tie_word_embeddings=tied, conv_bias=True)
    plan = plan_of(config, scheme)
    found = Counter(name for weight in plan.values() if weight.same_bytes_as is None for name in weight.sources)
    shapes = {name: tensor.shape for name, tensor in get_family(model_type).tensors(config).items()}
    assert found == Counter(list(shapes))
    stored = sum(prod(weight.shape) for weight in plan.values() if weight.same_bytes_as is None)
    assert stored == sum(map(prod, shapes.values()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_routers_and_small_tensors_are_never_quantized(scheme):
    plan = plan_of(config_of(conv_bias=True), scheme)
    small = [w for name, w in plan.items() if name.endswith(("norm.weight", "conv.conv.weight", ".bias"))]
    routers = [w for name, w in plan.items() if name.endswith((".gate", ".expert_bias"))]
    assert len(small) > 10
    assert len(routers) == 2 * 4
    assert all(isinstance(weight.format, FloatFormat) for weight in small)
    assert {weight.format for weight in routers} == {FloatFormat(dtype="float32")}  # in fp16 programs too
    assert all(weight.reason for weight in (*small, *routers))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("scheme", ["q8", "q4", "q4f16"])
def test_group_size_is_honoured(scheme, group_size):
    plan = plan_of(config_of(**WIDE), scheme, group_size)
    quantized = [weight for weight in plan.values() if isinstance(weight.format, IntFormat)]
    assert {weight.format.group_size for weight in quantized} == {group_size}
    for weight in quantized:
        assert weight.storage()["scale"][0] == (*weight.shape[:-1], weight.shape[-1] // group_size)


def test_group_size_that_does_not_divide_a_width_is_refused():
    with pytest.raises(
        QuantizationError, match=r"in_features=96 is not a multiple of group_size=64; pass --group-size"
    ):
        plan_of(config_of(), "q4", 64)
    plan_of(config_of(), "q4", 64, exclude=["*.feed_forward.w2.weight", "*.experts.*"])


@pytest.mark.parametrize("scheme", ["q4", "q4f16"])
def test_what_is_excluded_stays_float(scheme):
    pattern = "model.layers.?.self_attn.*_proj.weight"
    plan = plan_of(config_of(), scheme, exclude=[pattern])
    floats = [w for name, w in plan.items() if "_proj" in name and "self_attn" in name]
    assert len(floats) == 2 * 4
    dtype = get_scheme(scheme).activation_dtype
    assert {weight.format for weight in floats} == {FloatFormat(dtype=dtype)}
    assert {weight.reason for weight in floats} == {f"excluded by --exclude {pattern}"}
    assert all(weight.layout is Layout.TRANSPOSED for weight in floats)
    assert isinstance(plan["model.layers.0.conv.in_proj"].format, IntFormat)


def test_excluding_a_layers_experts_needs_all_of_them():
    plan = plan_of(config_of(), exclude=[f"{EXPERTS}.*"])
    assert plan[f"{EXPERTS}.down"].format == FloatFormat(dtype="float32")
    assert isinstance(plan[f"{EXPERTS.replace('1', '2')}.down"].format, IntFormat)
    with pytest.raises(QuantizationError, match=r"exclude the whole layer"):
        plan_of(config_of(), exclude=[f"{EXPERTS}.0.w1.weight"])


def test_excluding_nothing_is_refused():
    with pytest.raises(QuantizationError, match=r"--exclude model.layer.\*: matches no weight"):
        plan_of(config_of(), exclude=["model.layer.*"])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tied_head_shares_the_embeddings_bytes(scheme):
    plan = plan_of(config_of(), scheme)
    table, head = plan[EMBEDDING], plan[HEAD]
    assert head.same_bytes_as == EMBEDDING
    sizes = [{role: prod(shape) * d.itemsize for role, (shape, d) in w.storage().items()} for w in (table, head)]
    assert sizes[0] == sizes[1]
    assert plan.nbytes() == sum(weight.nbytes() for weight in plan.values()) - head.nbytes()


def test_excluding_a_tied_embedding_excludes_the_head():
    plan = plan_of(config_of(), exclude=[f"{EMBEDDING}.weight"])
    assert plan[EMBEDDING].format == plan[HEAD].format == FloatFormat(dtype="float32")
    assert plan[EMBEDDING].storage()["weight"] == plan[HEAD].storage()["weight"]


def test_embedding_and_head_are_8_bit_in_q4():
    for tied in (True, False):
        plan = plan_of(config_of(tie_word_embeddings=tied))
        assert {plan[EMBEDDING].format.bits, plan[HEAD].format.bits} == {8}
        assert plan["model.layers.0.conv.in_proj"].format.bits == 4


@pytest.mark.parametrize(("inner", "symmetric"), [(32, True), (64, False)])
def test_experts_of_one_group_a_row_have_no_zero_points(inner, symmetric):
    """onnxruntime 1.30, which Transformers.js brings, misreads them."""
    scheme = replace(get_scheme("q4"), experts=IntFormat(bits=4, symmetric=False, scale_dtype="float16"))
    plan = make_plan(config_of(moe_intermediate_size=inner), scheme)
    assert plan[f"{EXPERTS}.down"].format.symmetric is symmetric
    assert plan[f"{EXPERTS}.gate_up"].format.symmetric is symmetric
    assert not plan["model.layers.0.conv.in_proj"].format.symmetric


@pytest.mark.parametrize("scheme", ["q8", "q4", "q4f16"])
def test_scales_are_float16_whatever_the_activations_are(scheme):
    plan = plan_of(config_of(), scheme)
    scales = {w.layout: w.storage()["scale"][1] for w in plan.values() if isinstance(w.format, IntFormat)}
    assert set(scales) == {Layout.DOWN, Layout.GATE_UP, Layout.MATMUL, Layout.TABLE}
    assert set(scales.values()) == {np.dtype(np.float16)}


def test_a_width_that_is_no_multiple_of_the_schemes_groups_gets_the_largest_that_divides_it():
    plan = plan_of(config_of(hidden_size=192), "q4")
    sizes = {name: weight.format.group_size for name, weight in plan.items() if isinstance(weight.format, IntFormat)}
    assert {sizes[EMBEDDING], sizes[HEAD], sizes["model.layers.0.conv.out_proj"]} == {64}
    assert sizes["model.layers.0.conv.in_proj"] == 32
    assert plan["model.layers.0.conv.in_proj"].reason == "scheme q4: linear"
    assert plan[EMBEDDING].reason == "scheme q4: embedding; groups of 64: 192 columns are no multiple of 128"
    assert plan[HEAD].format == plan[EMBEDDING].format
    with pytest.raises(QuantizationError, match=r"in_features=48 is not a multiple of group_size=128; pass --group-"):
        plan_of(config_of(hidden_size=48), "q4")


@pytest.mark.parametrize(("hidden", "inner", "size"), [(256, 128, 64), (256, 96, 32), (96, 128, 32), (128, 64, 64)])
def test_a_layers_experts_have_groups_that_fit_inside_and_outside(hidden, inner, size):
    """QMoE has one group size for both matrices."""
    plan = plan_of(config_of(hidden_size=hidden, moe_intermediate_size=inner))
    for name in (f"{EXPERTS}.gate_up", f"{EXPERTS}.down"):
        assert plan[name].format.group_size == size
        assert plan[name].format.symmetric
        assert ("no multiple of 64" in plan[name].reason) == (size == 32)
