"""Schemes: which weight gets which format, and why."""

from dataclasses import replace

import pytest

from lfm2_export.backends import get_backend
from lfm2_export.errors import QuantizationError
from lfm2_export.families.tensors import ModelTensor, Part, TensorClass
from lfm2_export.quant.formats import FloatFormat, IntFormat
from lfm2_export.quant.schemes import NEVER_QUANTIZED, SCHEMES, check_patterns, get_scheme

W1 = "model.layers.0.feed_forward.w1.weight"


def weight(name: str, kind: TensorClass) -> ModelTensor:
    return ModelTensor(name=name, shape=(32, 32), kind=kind, part=Part.MLPS)


def test_unknown_scheme_lists_the_known_ones():
    with pytest.raises(QuantizationError) as error:
        get_scheme("q5")
    assert str(error.value) == "scheme 'q5' is unknown; known schemes: fp32, fp16, q8, q4, q4f16, 8da4w"


def test_programs_have_the_names_that_runtimes_look_for():
    assert get_backend("onnx").SCHEMES == {
        "fp32": "model.onnx",
        "fp16": "model_fp16.onnx",
        "q8": "model_quantized.onnx",
        "q4": "model_q4.onnx",
        "q4f16": "model_q4f16.onnx",
    }
    assert set(get_backend("executorch").SCHEMES) == {"fp32", "8da4w"}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_small_and_routing_weights_are_never_quantized(scheme):
    for kind in NEVER_QUANTIZED:
        choice = scheme.format_for(weight("some.weight", kind))
        assert choice.format == FloatFormat(dtype=scheme.activation_dtype)
        assert choice.reason.startswith("never quantized: ")
    assert set(NEVER_QUANTIZED) == {TensorClass.ROUTER, TensorClass.EXPERT_BIAS, TensorClass.SMALL}


def test_q4_has_int4_linears_and_experts_and_an_int8_embedding():
    scheme = get_scheme("q4")
    found = {kind: scheme.format_for(weight("w", kind)).format for kind in TensorClass if kind not in NEVER_QUANTIZED}
    assert found[TensorClass.LINEAR] == IntFormat(bits=4, group_size=32, symmetric=False, scale_dtype="float16")
    signed = IntFormat(bits=4, group_size=64, symmetric=True, signed_scale=True, scale_dtype="float16")
    assert found[TensorClass.EXPERTS] == signed
    assert found[TensorClass.EMBEDDING] == found[TensorClass.HEAD] == replace(signed, bits=8, group_size=128)
    assert [found[kind].bits_per_weight(128) for kind in (TensorClass.LINEAR, TensorClass.EXPERTS)] == [4.625, 4.25]
    assert found[TensorClass.HEAD].bits_per_weight(128) == 8.125
    assert scheme.format_for(weight(W1, TensorClass.LINEAR)).reason == "scheme q4: linear"


def test_q8_has_groups_of_32_everywhere():
    """onnxruntime's kernels round activations in the weights' groups, which costs q8 more than its weights do."""
    scheme = get_scheme("q8")
    for kind in (TensorClass.LINEAR, TensorClass.EXPERTS, TensorClass.EMBEDDING, TensorClass.HEAD):
        format = scheme.format_for(weight("w", kind)).format
        assert (format.bits, format.group_size, format.bits_per_weight(64)) == (8, 32, 8.5)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_onnx_scales_take_two_bytes(scheme):
    for kind in (TensorClass.LINEAR, TensorClass.EXPERTS, TensorClass.EMBEDDING, TensorClass.HEAD):
        format = scheme.format_for(weight("w", kind)).format
        if isinstance(format, IntFormat) and scheme.name in get_backend("onnx").SCHEMES:
            assert format.scale_dtype == "float16"


def test_q4f16_experts_have_no_zero_points_because_webgpu_takes_none():
    experts = get_scheme("q4f16").experts
    assert experts == IntFormat(bits=4, symmetric=True, signed_scale=True, scale_dtype="float16")
    assert not get_scheme("q4f16").linear.symmetric


def test_group_size_changes_every_integer_format_and_no_other():
    scheme = get_scheme("q4").with_group_size(128)
    assert {scheme.linear.group_size, scheme.experts.group_size, scheme.head.group_size} == {128}
    assert get_scheme("q4").linear.group_size == 32
    assert get_scheme("q4").fits_groups
    assert not scheme.fits_groups  # what the user asks for holds for every width, or is refused
    with pytest.raises(QuantizationError, match="scheme fp16 has no groups; leave --group-size out"):
        get_scheme("fp16").with_group_size(32)
    with pytest.raises(QuantizationError, match="group_size=48 is not supported"):
        get_scheme("q4").with_group_size(48)


def test_excluded_and_sensitive_weights_say_which_pattern_chose_them():
    scheme = get_scheme("q4").with_exclude(["*.layers.0.*"])
    choice = scheme.format_for(weight(W1, TensorClass.LINEAR))
    assert choice == (FloatFormat(dtype="float32"), "excluded by --exclude *.layers.0.*")
    assert scheme.format_for(weight(W1.replace(".0.", ".1."), TensorClass.LINEAR)).reason == "scheme q4: linear"
    assert scheme.options()["exclude"] == ["*.layers.0.*"]
    assert scheme.options()["formats"]["linear"]["dtype"] == "int4"

    choosy = replace(get_scheme("q4"), sensitive_patterns=("*.w1.weight",))
    assert choosy.format_for(weight(W1, TensorClass.LINEAR)) == (choosy.sensitive, "sensitive: *.w1.weight")
    assert choosy.sensitive.bits == 8


def test_patterns_that_match_nothing_are_refused():
    check_patterns(["*.w1.weight"], [W1])
    with pytest.raises(QuantizationError, match=r"--exclude \*\.w9\.weight w7: matches no weight"):
        check_patterns(["*.w1.weight", "*.w9.weight", "w7"], [W1])


def test_patterns_that_match_nothing_are_answered_with_names_that_would():
    names = [f"model.layers.{layer}.feed_forward.w{i}.weight" for layer in range(4) for i in (1, 2, 3)]
    names = ["model.embed_tokens.weight", *names]
    with pytest.raises(QuantizationError) as error:
        check_patterns(["model.layers.2.feedforward.w3.weight"], names)
    close = str(error.value).partition("closest to model.layers.2.feedforward.w3.weight: ")[2].split(", ")
    print(close)
    assert close[0] == "model.layers.2.feed_forward.w3.weight"
    assert len(close) == 3


@pytest.mark.parametrize("pattern", ["lm_head.weight", "lm_head.*"])
def test_a_tied_head_is_excluded_by_the_name_of_its_table(pattern):
    with pytest.raises(QuantizationError, match=r"the head is tied .*: exclude model\.embed_tokens\.weight$"):
        check_patterns([pattern], ["model.embed_tokens.weight", W1])
    check_patterns([pattern], ["model.embed_tokens.weight", "lm_head.weight"])
