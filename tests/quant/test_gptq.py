"""gptq lessens the error of a layer's output, given its input's statistics, and does nothing else to a weight."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from lfm2_export.errors import QuantizationError
from lfm2_export.quant import gptq
from lfm2_export.quant.algorithms import get_algorithm
from lfm2_export.quant.formats import IntFormat, QuantizedTensor
from lfm2_export.quant.groups import Chunk, Scratch
from lfm2_export.quant.hessian import DAMPING, input_statistics

FORMATS = {
    "int4": IntFormat(bits=4, symmetric=False),
    "int4-fp16": IntFormat(bits=4, symmetric=False, group_size=16, scale_dtype="float16"),
    "int4-128": IntFormat(bits=4, symmetric=False, group_size=128),
    "int4-signed": IntFormat(bits=4, symmetric=True, signed_scale=True, scale_dtype="float16"),
    "int4-positive": IntFormat(bits=4, symmetric=True, scale_dtype="bfloat16"),
    "int8": IntFormat(bits=8, symmetric=False),
    "int8-signed": IntFormat(bits=8, symmetric=True, signed_scale=True, group_size=256),
    "int8-rows": IntFormat(bits=8, symmetric=True, group_size=None),
}
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
WIDTH = 256


def hessian_error(weight: np.ndarray, dequantized: np.ndarray, hessian: np.ndarray) -> float:
    """trace(dW H dWᵀ) for dW = ``weight`` - ``dequantized``, both [R, N]: with H = XᵀX / tokens, the mean over tokens
    of the squared error that storing the weight adds to the layer's output. H is [N, N], or its diagonal [N].

    Products are float32, their sum is float64.
    """
    difference = np.subtract(weight, dequantized, dtype=np.float32)
    if hessian.ndim == 1:
        return float(np.einsum("rn,rn,n->", difference, difference, hessian, dtype=np.float64, optimize=True))
    felt = difference @ np.asarray(hessian, np.float32)
    return float(np.vecdot(felt, difference).sum(dtype=np.float64))


def random_weight(rows: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).laplace(size=(rows, WIDTH)) * 0.02).astype(np.float32)


def random_inputs(tokens: int = 1000) -> np.ndarray:
    """Correlated, of very different sizes, one of them always zero."""
    rng = np.random.default_rng(1)
    mixed = rng.standard_normal((tokens, WIDTH)) @ rng.standard_normal((WIDTH, WIDTH)) / 16
    inputs = (mixed + rng.standard_normal((tokens, 1))) * np.exp(rng.standard_normal(WIDTH))
    inputs[:, 7] = 0
    return inputs.astype(np.float32)


@pytest.fixture(scope="module")
def hessian() -> np.ndarray:
    inputs = random_inputs()
    return inputs.T @ inputs / len(inputs)


def quantized(weight: np.ndarray, format: IntFormat, hessian: np.ndarray) -> QuantizedTensor:
    return get_algorithm("gptq").fitted(input_statistics(hessian))(weight, format, threads=1)


@every_format
def test_the_output_is_nearer_than_with_refit_and_shuffled_statistics_do_worse(format, hessian) -> None:
    weight = random_weight(48)
    refit = hessian_error(weight, get_algorithm("refit")(weight, format).dequantize(), hessian)
    found = hessian_error(weight, quantized(weight, format, hessian).dequantize(), hessian)
    order = np.random.default_rng(0).permutation(WIDTH)
    shuffled = quantized(weight, format, hessian[np.ix_(order, order)]).dequantize()
    control = hessian_error(weight, shuffled, hessian)
    print(f"gptq has {found / refit:.3f} of refit's error, with shuffled statistics {control / refit:.3f}")
    assert found < 0.35 * refit  # measured: 0.23 to 0.30
    assert control > 1.2 * refit  # measured: 1.37 to 2.08


@every_format
def test_scales_are_ones_that_the_format_stores_and_zero_points_are_refits(format, hessian) -> None:
    weight = random_weight(16)
    tensor, refit = quantized(weight, format, hessian), get_algorithm("refit")(weight, format)
    scale = tensor.scale.astype(np.float32)
    assert np.array_equal(format.representable_scale(scale), scale)
    assert np.array_equal(np.sign(scale), np.sign(refit.scale))
    assert tensor.zero_point is None or np.array_equal(tensor.zero_point, refit.zero_point)
    assert tensor.qdata.max() <= format.greatest_code


def test_no_round_makes_the_error_of_any_row_larger(hessian, monkeypatch) -> None:
    weight, format, errors = random_weight(32), FORMATS["int4"], []
    damped = input_statistics(hessian).hessian_NN.astype(np.float64)
    for rounds in range(4):
        monkeypatch.setattr(gptq, "ROUNDS", rounds)
        difference = weight - quantized(weight, format, hessian).dequantize().astype(np.float64)
        errors.append(np.einsum("rn,nm,rm->r", difference, damped, difference))
    print("errors by round, of the first one's:", [f"{one.sum() / errors[0].sum():.3f}" for one in errors])
    for before, after in pairwise(errors):
        assert np.all(after <= before * (1 + 1e-5))
    assert errors[2].sum() < 0.97 * errors[0].sum()  # measured: 0.939


def test_without_rounds_the_codes_are_those_of_gptq_as_published(hessian, monkeypatch) -> None:
    """With the inverse's Cholesky factor, updating what is left (arXiv:2210.17323, algorithm 1, activation order)."""
    monkeypatch.setattr(gptq, "ROUNDS", 0)
    monkeypatch.setattr(gptq, "_BLOCK", 48)  # no divisor of the width
    weight, format = random_weight(16), FORMATS["int4"]
    grid = get_algorithm("refit")(weight, format)
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    damped = hessian.astype(np.float64) + DAMPING * np.diagonal(hessian).mean() * np.eye(WIDTH)
    factor = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    left, codes = weight.astype(np.float64)[:, order], np.empty(weight.shape)
    for place, column in enumerate(order):
        scale, zero = (part[:, column // 32].astype(np.float64) for part in (grid.scale, grid.zero_point))
        codes[:, column] = np.clip(np.rint(left[:, place] / scale) + zero, 0, 15)
        error = left[:, place] - (codes[:, column] - zero) * scale
        left[:, place:] -= (error / factor[place, place])[:, None] * factor[place, place:]
    found = quantized(weight, format, hessian)
    differing = float((found.qdata != codes).mean())
    print(f"{differing:.5f} of the codes differ (float32 against float64)")
    assert differing < 0.002
    assert np.array_equal(found.scale, grid.scale)


def test_the_factor_is_the_hessians(hessian) -> None:
    statistics = input_statistics(hessian)
    order, factor = statistics.order_N, statistics.factor_NN.astype(np.float64)
    damped = statistics.hessian_NN[np.ix_(order, order)].astype(np.float64)
    inverse = np.linalg.inv(factor)
    diagonal = inverse @ damped @ inverse.T
    off = diagonal - np.diag(np.diagonal(diagonal))
    assert np.array_equal(factor, np.triu(factor))
    assert np.all(np.diagonal(factor) == 1)
    assert np.abs(off).max() < 1e-4 * np.diagonal(diagonal).mean()
    assert np.all(np.diff(np.diagonal(hessian)[order]) <= 0), "activation order"


@every_format
def test_the_result_is_the_same_on_every_run_and_knows_nothing_of_other_rows(format, hessian) -> None:
    weight = random_weight(37)
    kept = weight.copy()
    one, other = (quantized(weight, format, hessian) for _ in range(2))
    assert np.array_equal(one.qdata, other.qdata)
    assert np.array_equal(one.scale, other.scale)
    alone = quantized(weight[11:12], format, hessian).dequantize()
    # A product of one row is summed in another order than one of 37.
    expected = hessian_error(weight[11:12], one.rows(slice(11, 12)).dequantize(), hessian)
    assert hessian_error(weight[11:12], alone, hessian) == pytest.approx(expected, rel=0.1)
    assert np.array_equal(weight, kept)


def test_a_diagonal_weighs_columns_and_carries_nothing_over(hessian) -> None:
    weight, format = random_weight(32), FORMATS["int4"]
    diagonal = np.ascontiguousarray(np.diagonal(hessian))
    refit = hessian_error(weight, get_algorithm("refit")(weight, format).dequantize(), diagonal)
    found = hessian_error(weight, quantized(weight, format, diagonal).dequantize(), diagonal)
    print(f"{found / refit:.3f} of refit's error")
    assert found < refit


def test_weights_whose_squares_leave_float32_are_rounded_as_by_refit(hessian) -> None:
    weight, format = random_weight(4), FORMATS["int4"]
    weight[2] = weight[2] / np.abs(weight[2]).max() * np.float32(3e38)
    found, refit = quantized(weight, format, hessian), get_algorithm("refit")(weight, format)
    assert np.array_equal(found.qdata[2], refit.qdata[2])
    assert np.array_equal(found.scale[2], refit.scale[2])
    assert not np.array_equal(found.qdata[1], refit.qdata[1])


def test_an_input_that_is_always_zero_leaves_a_grid(hessian) -> None:
    weight, format = random_weight(8), FORMATS["int4"]
    found = quantized(weight, format, np.zeros_like(hessian)).dequantize()
    assert np.abs(found - weight).max() < 0.1


@pytest.mark.parametrize(
    ("damage", "form"),
    [
        ("nan", "matrix"),
        ("negative", "matrix"),
        ("indefinite", "matrix"),
        ("nan", "diagonal"),
        ("negative", "diagonal"),
    ],
)
def test_damaged_statistics_are_refused_by_name(hessian, damage, form) -> None:
    broken = hessian.copy() if form == "matrix" else np.diagonal(hessian).copy()
    place = (3, 3) if form == "matrix" and damage != "indefinite" else (3,) if form == "diagonal" else (3, 5)
    broken[place] = {"nan": np.nan, "negative": -1.0, "indefinite": 1e9}[damage]
    if damage == "indefinite":
        broken[5, 3] = 1e9
    with pytest.raises(QuantizationError, match=r"^some input: the statistics are damaged \(.*\); calibrate again$"):
        input_statistics(broken, name="some input")


def test_the_hessians_error_is_that_of_the_layers_output() -> None:
    inputs, weight = random_inputs(), random_weight(24)
    other = get_algorithm("round")(weight, FORMATS["int4"]).dequantize()
    exact = np.square(inputs.astype(np.float64) @ (weight - other).T.astype(np.float64)).sum() / len(inputs)
    found = hessian_error(weight, other, inputs.T @ inputs / len(inputs))
    print(f"off by {abs(found / exact - 1):.1e}")
    assert found == pytest.approx(exact, rel=1e-4)
    diagonal = np.square(inputs.astype(np.float64)).mean(0)
    expected = (np.square((weight - other).astype(np.float64)) @ diagonal).sum()
    assert hessian_error(weight, other, diagonal.astype(np.float32)) == pytest.approx(expected, rel=1e-4)


def test_gptq_without_statistics_is_refused_and_fits_a_table_as_refit_does() -> None:
    weight, format = random_weight(8), FORMATS["int8"]
    with pytest.raises(QuantizationError, match="algorithm gptq needs statistics of the layers' inputs; pass --calib"):
        get_algorithm("gptq")(weight, format)
    table = get_algorithm("gptq").fitted(None)(weight, format)
    assert np.array_equal(table.qdata, get_algorithm("refit")(weight, format).qdata)
    assert get_algorithm("round").fitted(None) is get_algorithm("round")


def test_chunks_hold_what_the_stream_takes_from_them(hessian) -> None:
    """Codes, scales and zero points in a chunk are those of the whole weight, and so is the error."""
    weight, format = random_weight(24), FORMATS["int4"]
    algorithm = get_algorithm("gptq").fitted(input_statistics(hessian))
    chunk: Chunk = algorithm.rows(weight, format, Scratch(), fqn="w", rows=range(24))
    whole = algorithm(weight, format, threads=1)
    assert np.array_equal(chunk.codes_GC.T.reshape(whole.qdata.shape), whole.qdata)
    assert np.array_equal(chunk.scale_C.reshape(whole.scale.shape), whole.scale)
    exact = np.square(weight - whole.dequantize().astype(np.float64)).sum()
    assert chunk.storage_error().squared_error == pytest.approx(exact, rel=1e-4)
    assert algorithm.rows_per_chunk(WIDTH) > get_algorithm("refit").rows_per_chunk(WIDTH)
