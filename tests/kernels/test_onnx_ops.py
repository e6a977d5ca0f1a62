"""Our operators for ONNX Runtime, one at a time, against float64 arithmetic, and what they refuse."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.kernels import c_api, onnx_operators
from tests.kernels.attention_cases import ATTENTION_CASES, AttentionCase, dequantize_rows
from tests.kernels.matrix_cases import (
    FEED_FORWARD_CASES,
    MOE_CASES,
    PRODUCT_CASES,
    PROJECTIONS_CASES,
    PROJECTIONS_OUT,
    ProjectionsCase,
)
from tests.kernels.norm_cases import NORMED_CASES, NormedCase
from tests.kernels.one_operator import FLOAT_OUT, Arrays, DoubleArray, open_operator, operator_library, run_operator
from tests.kernels.onnx_operators import CASES
from tests.kernels.token_cases import CONV_CASES, LAYOUT_CASES, LAYOUT_OUT, ConvCase, LayoutCase

pytestmark = pytest.mark.skipif(operator_library() is None, reason="no compiler for our operators")

# Largest error of an attention's outputs, as a share of the largest output. An int8 cache has its queries rounded to 15
# bits, which counts where they are large. Measured: 3e-7 and 5e-5, 7e-6 and 2e-3 at a sharpness of 100.
FLOAT_BOUND, INT8_BOUND = 2e-6, 2e-4
# Of everything else, in norms: 3e-7 measured.
BOUND = 1e-6


def attention_bound(case: AttentionCase) -> float:
    return (INT8_BOUND if case.int8 else FLOAT_BOUND) * max(1.0, case.sharpness / 4)


def share_of(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def relative(got: npt.NDArray[Any], want: DoubleArray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.label)
def test_attention_is_that_of_float64(case: AttentionCase) -> None:
    out, *present = case.run()
    caches = [dequantize_rows(rows) if case.int8 else rows.astype(np.float64) for rows in present]
    for rows, cache, want in zip(present, caches, case.expected_present(), strict=True):
        there = ~np.isnan(want)
        scale = np.ascontiguousarray(rows[..., -4:]).view(np.float32) / 2 if case.int8 else np.float32(0)
        assert cache.shape == want.shape
        assert (np.abs(cache - want)[there] <= np.broadcast_to(1.001 * scale + 2e-6, want.shape)[there]).all()
    # The operator's own cache, so that only the arithmetic on it counts.
    error = share_of(out, case.expected_out(*caches))
    print(f"{case.label}: {error:.1e}")
    assert error <= attention_bound(case)


@pytest.mark.parametrize("case", [*PRODUCT_CASES, *FEED_FORWARD_CASES, *MOE_CASES], ids=lambda case: case.label)
def test_products_are_those_of_float64_on_int8_activations(case: Any) -> None:
    error = relative(case.run()[0], case.expected())
    print(f"{case.label}: {error:.1e}")
    assert error <= BOUND


@pytest.mark.parametrize("case", PROJECTIONS_CASES, ids=lambda case: case.label)
def test_three_products_at_once_are_those_of_float64(case: ProjectionsCase) -> None:
    errors = [relative(got, want) for got, want in zip(case.run(), case.expected(), strict=True)]
    print(f"{case.label}: {max(errors):.1e}")
    assert max(errors) <= BOUND


@pytest.mark.parametrize("case", NORMED_CASES, ids=lambda case: case.label)
def test_a_product_of_a_norm_is_that_of_float64(case: NormedCase) -> None:
    got, want = case.run(), case.expected()
    if case.is_sum:
        np.testing.assert_array_equal(got[-1], want[-1])
    errors = [relative(*both) for both in zip(got, want, strict=True)]
    print(f"{case.label}: {max(errors):.1e}")
    assert max(errors) <= BOUND
    plain = case.case.expected()  # the control
    assert relative(got[0], plain[0] if isinstance(plain, list) else plain) > 0.1


@pytest.mark.parametrize("case", LAYOUT_CASES, ids=lambda case: case.label)
def test_where_tokens_stand_is_what_the_mask_says(case: LayoutCase) -> None:
    for got, want in zip(case.run(), case.expected(), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("case", CONV_CASES, ids=lambda case: case.label)
def test_the_gated_convolution_is_that_of_float64(case: ConvCase) -> None:
    errors = [relative(got, want) for got, want in zip(case.run(), case.expected(), strict=True)]
    print(f"{case.label}: {errors[0]:.1e}, state {errors[1]:.1e}")
    assert max(errors) <= BOUND


@pytest.mark.parametrize("kernels", [] if operator_library() is None else c_api.runnable_kernels()[1:])
def test_other_kernels_give_what_the_fastest_give(tmp_path: Path, kernels: str) -> None:
    command = [sys.executable, "-m", onnx_operators.__name__, str(tmp_path / "plain.npz")]
    folder = Path(__file__).parents[2]
    environment = os.environ | {"LFM2_KERNELS": kernels, "PYTHONPATH": str(folder)}
    subprocess.run(command, check=True, env=environment, cwd=folder, timeout=120)
    plain, worst, same = np.load(tmp_path / "plain.npz"), 0.0, 0
    for case in CASES:
        want = [plain[f"{case.label} output {index}"] for index in range(len(case.run()))]
        for got, expected in zip(case.run(), want, strict=True):
            assert got.shape == expected.shape
            same += np.array_equal(got, expected)
        bound = BOUND if not isinstance(case, AttentionCase) else attention_bound(case)
        error = share_of(case.run()[0], want[0])
        worst = max(worst, error / bound)
        assert error <= bound, case.label
    print(f"{len(CASES)} cases, {same} outputs equal to the last bit, worst {worst:.2f} of its bound")


def test_a_changed_input_is_noticed() -> None:
    """The control: each input of an attention matters."""
    case = AttentionCase(held=(20, 9), tokens=1)
    clean, limit = case.run()[0], 20 * attention_bound(case)
    for name in ("q", "k", "v", "q_norm", "k_norm", "past_key", "past_value", "cos", "sin"):
        array = case.inputs[name]
        assert array is not None
        changed = case.run(case.inputs | {name: array * np.float32(1.01) + np.float32(0.01)})[0]
        assert share_of(changed, clean) > limit, name
    for name in ("seqlens_k", "position_ids"):
        array = case.inputs[name]
        assert array is not None
        assert share_of(case.run(case.inputs | {name: array - array.dtype.type(1)})[0], clean) > limit, name


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row_and_is_seen_by_every_later_token(
    name: str, value: float, int8: bool
) -> None:
    case = AttentionCase(tokens=70, lengths=(70, 70, 70), kv_heads=1, heads=2, int8=int8)
    clean, spoilt = case.run()[0], case.inputs[name]
    assert spoilt is not None
    spoilt = spoilt.copy()
    spoilt[1, 40, 3:5] = value  # two in one head: the sum of squares is infinite, and so is a product with the other
    got = case.run(case.inputs | {name: spoilt})[0]
    np.testing.assert_array_equal(got[[0, 2]], clean[[0, 2]])
    finite = np.isfinite(got[1]).all(-1)
    if name == "q":
        assert np.flatnonzero(~finite).tolist() == [40]
    else:
        assert not finite[40:].any()


@pytest.mark.parametrize("int8", [False, True])
def test_what_lies_behind_a_rows_last_position_is_not_looked_at(int8: bool) -> None:
    case = AttentionCase(held=(11, 70, 3), capacity=96, int8=int8)
    spoilt = dict(case.inputs)
    for name in ("past_key", "past_value"):
        array = case.inputs[name]
        assert array is not None
        filled = array.copy()
        for row, held in enumerate(case.held or ()):
            filled[row, :, held:] = 255 if int8 else np.nan  # 255 in all bytes makes the scale a NaN too
        spoilt[name] = filled
    np.testing.assert_array_equal(case.run(spoilt)[0], case.run()[0])


def test_a_row_that_may_see_nothing_is_zero() -> None:
    for int8 in (False, True):
        out = AttentionCase(tokens=20, hidden=(0, 3), int8=int8).run()[0]
        assert not out[0, :3].any()
        assert np.abs(out[0, 3:]).max(-1).all()


def test_positions_outside_of_the_table_stay_in_it() -> None:
    case = AttentionCase(tokens=2)
    out = case.run(case.inputs | {"position_ids": np.array([[-7, 2**40]])})[0]
    assert np.isfinite(out).all()


Change = Callable[[dict[str, Any], dict[str, Any]], object]


def shape(name: str, *sizes: int, dtype: Any = None) -> Change:
    """An input of another shape (or type), filled with ones."""

    def change(inputs: dict[str, Any], _: dict[str, Any]) -> None:
        inputs[name] = np.ones(sizes, dtype or inputs[name].dtype)

    return change


def value(name: str, array: Any) -> Change:
    def change(inputs: dict[str, Any], _: dict[str, Any]) -> None:
        inputs[name] = np.array(array, inputs[name].dtype).reshape(inputs[name].shape)

    return change


def left_out(name: str) -> Change:
    return lambda inputs, _: inputs.update({name: None})


def attribute(**values: Any) -> Change:
    return lambda _, attributes: attributes.update(values)


def without(name: str) -> Change:
    return lambda _, attributes: attributes.pop(name)


def both(first: Change, second: Change) -> Change:
    def change(inputs: dict[str, Any], attributes: dict[str, Any]) -> None:
        first(inputs, attributes)
        second(inputs, attributes)

    return change


ATTENTION = AttentionCase(held=(5,), tokens=2)  # 4 heads of 32, 2 of the cache
ATTENTION_INT8 = replace(ATTENTION, int8=True)
PROJECTIONS = PROJECTIONS_CASES[0]  # 64, 16 and 16 x 96
PRODUCT, FEED_FORWARD, MOE = PRODUCT_CASES[1], FEED_FORWARD_CASES[0], MOE_CASES[0]  # 100 x 96; 64-96; 4 of 64-96
NORMED, ROUTED, LAYOUT = NORMED_CASES[3], MOE_CASES[-1], LAYOUT_CASES[1]  # 100 x 96, of a sum; 5 of 64-64; 4 x 4
MOE_NORMED = NORMED_CASES[-6]  # of a sum
LOGITS = shape("logits", 40, 5, dtype=np.float32)
CONV = CONV_CASES[2]  # 3 rows, 5 tokens, 7 taps, width 48

REFUSALS: list[tuple[str, Any, Change, str]] = [
    ("Attention", ATTENTION, attribute(kv_num_heads=3), "4 heads for 3 of the cache"),
    ("Attention", ATTENTION, attribute(kv_num_heads=0), "4 heads for 0 of the cache"),
    ("Attention", ATTENTION, attribute(num_heads=-4), "-4 heads for 2"),
    ("Attention", ATTENTION, without("epsilon"), "epsilon"),
    ("Attention", ATTENTION, without("num_heads"), "num_heads"),
    ("Attention", ATTENTION, attribute(num_heads=8), "k has 128 elements, not 64"),
    ("Attention", ATTENTION, attribute(num_heads=128), "head_dim 1 is not a multiple of 16 up to 256"),
    ("Attention", ATTENTION, shape("q", 1, 2, 4 * 24), "head_dim 24 is not a multiple of 16 up to 256"),
    ("Attention", ATTENTION, shape("q", 1, 2, 4 * 272), "head_dim 272 is not a multiple of 16 up to 256"),
    ("Attention", ATTENTION, shape("q", 2, 128), "q has 2 dimensions, not 3"),
    ("Attention", ATTENTION, shape("q", 1, 2, 130), "q is [1, 2, 130], not [1, 2, 128]"),
    ("Attention", ATTENTION, shape("v", 1, 3, 64), "v has 192 elements, not 128"),
    ("Attention", ATTENTION, shape("q_norm", 128), "q_norm has 128 elements, not 32"),
    ("Attention", ATTENTION, shape("k_norm", 1), "k_norm has 1 elements, not 32"),
    ("Attention", ATTENTION, shape("attention_mask", 7), "attention_mask has 1 dimensions, not 2"),
    ("Attention", ATTENTION, shape("attention_mask", 1, 1), "2 tokens behind 5 positions, but a mask of 1 positions"),
    ("Attention", ATTENTION, shape("attention_mask", 2, 7), "attention_mask has 14 elements, not 7"),
    ("Attention", ATTENTION, value("seqlens_k", [7]), "seqlens_k 7 of 7 positions"),
    ("Attention", ATTENTION, value("seqlens_k", [-1]), "seqlens_k -1 of 7 positions"),
    ("Attention", ATTENTION, shape("seqlens_k", 2), "seqlens_k has 2 elements, not 1"),
    ("Attention", ATTENTION, shape("past_key", 2, 5, 32), "past_key has 3 dimensions, not 4"),
    ("Attention", ATTENTION, shape("past_key", 1, 2, 5, 36), "past_key is [1, 2, 5, 36], not [1, 2, 5, 32]"),
    ("Attention", ATTENTION, shape("past_value", 1, 2, 4, 32), "past_value is [1, 2, 4, 32], not [1, 2, 5, 32]"),
    ("Attention", ATTENTION, both(shape("cos", 0, 16), shape("sin", 0, 16)), "cos holds no position"),
    ("Attention", ATTENTION, shape("cos", 33, 5), "cos has 165 elements, not 160"),
    ("Attention", ATTENTION, shape("sin", 3, 16), "sin has 48 elements, not 160"),
    ("Attention", ATTENTION, shape("position_ids", 1, 1), "position_ids has 1 elements, not 2"),
    ("Attention", ATTENTION, shape("q", 1, 2, 128, dtype=np.float64), "q"),
    ("Attention", ATTENTION, shape("past_key", 1, 2, 5, 36, dtype=np.uint8), "past_key"),
    ("AttentionInt8", ATTENTION_INT8, shape("past_key", 1, 2, 5, 32), "past_key is [1, 2, 5, 32], not [1, 2, 5, 36]"),
    ("MatMulNBits", PRODUCT, shape("x", 1, 9, 64), "x has 64 columns, not 96"),
    ("MatMulNBits", PRODUCT, shape("x"), "x has 1 columns, not 96"),
    ("MatMulNBits", PRODUCT, both(shape("x"), attribute(K=1)), "100 x 1 does not fit groups of 32"),
    ("MatMulNBits", PRODUCT, attribute(bits=3), "bits 3: 4 and 8 are known"),
    ("MatMulNBits", PRODUCT, attribute(block_size=24), "block_size 24: 16, 32, 64, 128 and 256 are known"),
    ("MatMulNBits", PRODUCT, both(shape("x", 1, 48), attribute(K=48, block_size=16)), "48 columns are not a multiple"),
    ("MatMulNBits", PRODUCT, attribute(block_size=64), "100 x 96 does not fit groups of 64"),
    ("MatMulNBits", PRODUCT, attribute(N=101), "w codes has 4800 elements, not 4848"),
    ("MatMulNBits", PRODUCT, attribute(N=-1), "N is -1: 1 to 2147483647 are possible"),
    ("MatMulNBits", PRODUCT, attribute(bits=8), "w codes has 4800 elements, not 9600"),
    ("MatMulNBits", PRODUCT, shape("w_scales", 100, 2), "w scales has 200 elements, not 300"),
    ("MatMulNBits", PRODUCT, shape("w_scales", 100, 3, dtype=np.float64), "scales are neither float nor float16"),
    ("MatMulNBits", PRODUCT, shape("w_points", 100, 1), "w zero points has 100 elements, not 200"),
    ("MatMulNBits", PRODUCT, shape("bias", 99), "bias has 99 elements, not 100"),
    ("MatMulNBits", PRODUCT, without("K"), "K"),
    ("Projections", PROJECTIONS, shape("x", 1, 64), "x has 64 columns, not 96"),
    ("Projections", PROJECTIONS, both(shape("x"), attribute(K=1)), "64 x 1 does not fit groups of 32"),
    ("Projections", PROJECTIONS, attribute(N1=17), "w of N1 codes has 768 elements, not 816"),
    ("Projections", PROJECTIONS, attribute(N2=0), "N is 0: 1 to"),
    ("Projections", PROJECTIONS, shape("v_scales", 16, 2), "w of N2 scales has 32 elements, not 48"),
    ("Projections", PROJECTIONS, shape("k_points", 16, 1), "w of N1 zero points has 16 elements, not 32"),
    ("Projections", PROJECTIONS, without("N2"), "N2"),
    ("Projections", PROJECTIONS, attribute(N1_bits=8), "w of N1 codes has 768 elements, not 1536"),
    ("Projections", PROJECTIONS, attribute(N2_block_size=48), "N2_block_size 48: 16, 32, 64, 128 and 256 are known"),
    ("MatMulNBits", NORMED, shape("gamma", 97), "gamma has 97 elements, not 96"),
    ("MatMulNBits", NORMED, shape("delta", 1, 2, 96), "delta has 192 elements, not 96"),
    ("MatMulNBits", NORMED, left_out("gamma"), "delta without the weights of a norm"),
    ("MatMulNBits", NORMED_CASES[2], shape("delta_gamma", 96, dtype=np.float32), "delta_gamma without delta"),
    ("MatMulNBits", NORMED, attribute(epsilon=-1.0), "epsilon is negative or not finite"),
    ("SparseMoe", ROUTED, shape("router", 63, 5), "router is [63, 5], not [64, 5]"),
    ("SparseMoe", ROUTED, shape("router", 64), "router has 1 dimensions, not 2"),
    ("SparseMoe", ROUTED, LOGITS, "router_logits and a router"),
    ("SparseMoe", MOE_NORMED, both(left_out("router"), LOGITS), "a norm without a router"),
    ("TokenLayout", LAYOUT, shape("input_ids", 3, 4), "the mask [4, 4] is not that of tokens [3, 4]"),
    ("TokenLayout", LAYOUT, shape("input_ids", 4, 5), "the mask [4, 4] is not that of tokens [4, 5]"),
    ("TokenLayout", LAYOUT, attribute(taps=0), "taps is 0: 1 to"),
    ("FeedForward", FEED_FORWARD, attribute(up_bits=8), "w3 codes has 3072 elements, not 6144"),
    ("FeedForward", FEED_FORWARD, attribute(up_bits=5), "up_bits 5: 4 and 8 are known"),
    ("FeedForward", FEED_FORWARD, attribute(inner=33), "inner width 33 is not a multiple of 32"),
    ("FeedForward", FEED_FORWARD, attribute(inner=128), "w1 codes has 3072 elements, not 4096"),
    ("FeedForward", FEED_FORWARD, attribute(down_bits=8), "w2 codes has 3072 elements, not 6144"),
    ("FeedForward", FEED_FORWARD, attribute(down_block_size=64), "64 x 96 does not fit groups of 64"),
    ("FeedForward", FEED_FORWARD, shape("x", 1, 96), "w1 codes has 3072 elements, not 4608"),
    ("FeedForward", FEED_FORWARD, shape("x"), "96 x 1 does not fit groups of 32"),
    ("SparseMoe", MOE, attribute(top_k=5), "5 of 4 experts"),
    ("SparseMoe", MOE, attribute(top_k=0), "top_k is 0: 1 to"),
    ("SparseMoe", MOE, shape("logits", 2, 4), "router_logits has 8 elements, not 4"),
    ("SparseMoe", MOE, shape("expert_bias", 3), "expert_bias has 3 elements, not 4"),
    ("SparseMoe", MOE, shape("x", 1, 1, 48), "widths 48 and 128 are not multiples of 32"),
    ("SparseMoe", MOE, shape("x"), "widths 1 and"),
    ("SparseMoe", MOE, shape("x", 1, 0), "width is 0: 1 to"),
    ("SparseMoe", MOE, shape("gate_up_codes", 4, 192, 31), "gate_up codes has 23808 elements, not 24576"),
    ("GatedConv", CONV, shape("projected", 15, 144), "projected has 2 dimensions, not 3"),
    ("GatedConv", CONV, shape("projected", 3, 5, 145), "projected is [3, 5, 145], not [3, 5, 144]"),
    ("GatedConv", CONV, shape("state", 3, 288), "state has 2 dimensions, not 3"),
    ("GatedConv", CONV, shape("state", 2, 6, 48), "state is [2, 6, 48], not [3, 6, 48]"),
    ("GatedConv", CONV, shape("state", 3, 5, 48), "weight has 336 elements, not 288"),
    ("GatedConv", CONV, shape("attended", 3, 4, 1), "attended has 12 elements, not 15"),
    ("GatedConv", CONV, shape("rows", 3, 5), "rows has 15 elements, not 18"),
    ("GatedConv", CONV, value("rows", [-1] * 18), "row -1 of 11 is not there"),
    ("GatedConv", CONV, value("rows", [11] * 18), "row 11 of 11 is not there"),
    ("GatedConv", replace(CONV, bias=True), shape("bias", 47), "bias has 47 elements, not 48"),
]  # fmt: skip

FLOAT = FLOAT_OUT["out"]
OUTPUTS = {
    "GatedConv": {"out": FLOAT, "present": FLOAT},
    "Projections": PROJECTIONS_OUT,
    "TokenLayout": LAYOUT_OUT,
}


def outputs_of(op: str, case: Any) -> dict[str, int]:
    return case.outputs if hasattr(case, "outputs") else OUTPUTS.get(op, FLOAT_OUT)


@pytest.mark.parametrize(("op", "case", "change", "words"), REFUSALS, ids=[f"{r[0]}: {r[3]}" for r in REFUSALS])
def test_what_does_not_fit_is_refused_by_name(op: str, case: Any, change: Change, words: str) -> None:
    inputs: Arrays = dict(case.inputs)
    attributes = dict(getattr(case, "attributes", {}))
    change(inputs, attributes)
    with pytest.raises(Exception, match=re.escape(words)) as refused:
        run_operator(op, inputs, outputs_of(op, case), attributes)
    print(str(refused.value)[:200])


def test_zero_points_of_8_bit_codes_are_refused() -> None:
    case = PRODUCT_CASES[6]
    inputs = case.inputs | {"w_points": np.zeros((65, 5), np.uint8)}
    with pytest.raises(Exception, match="zero points are known of 4-bit codes only"):
        run_operator("MatMulNBits", inputs, FLOAT_OUT, case.attributes)


@pytest.mark.parametrize(("op", "case"), [("Attention", ATTENTION), ("MatMulNBits", PRODUCT), ("GatedConv", CONV)])
def test_inputs_that_must_be_there_are_missed_when_the_graph_is_opened(op: str, case: Any) -> None:
    attributes = dict(getattr(case, "attributes", {}))
    for name in ("q", "past_key", "position_ids", "x", "w_codes", "w_scales", "projected", "rows"):
        if name in case.inputs:
            with pytest.raises(Exception, match=r"(?i)input"):
                open_operator(op, case.inputs | {name: None}, outputs_of(op, case), attributes)
    with pytest.raises(Exception, match=r"(?i)input"):
        open_operator(op, dict(list(case.inputs.items())[:1]), outputs_of(op, case), attributes)


@pytest.mark.parametrize(
    ("op", "case"),
    [("MatMulNBits", PRODUCT), ("Projections", PROJECTIONS), ("FeedForward", FEED_FORWARD), ("SparseMoe", MOE)],
)
def test_no_tokens_are_no_work(op: str, case: Any) -> None:
    inputs = dict(case.inputs)
    assert inputs["x"] is not None
    inputs["x"] = inputs["x"][:, :0]
    if op == "SparseMoe":
        inputs["logits"] = np.zeros((0, 4), np.float32)
    assert run_operator(op, inputs, outputs_of(op, case), case.attributes)[0].size == 0
