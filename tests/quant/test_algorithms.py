"""What every algorithm must keep to, and what refit gains over rounding and over onnxruntime's k_quant."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lfm2_export.errors import QuantizationError
from lfm2_export.quant import groups
from lfm2_export.quant.algorithms import ALGORITHMS, DEFAULT_ALGORITHM, get_algorithm
from lfm2_export.quant.formats import IntFormat, QuantizedTensor, storage_error

FORMATS = {
    "int4": IntFormat(bits=4, symmetric=False),
    "int4-fp16": IntFormat(bits=4, symmetric=False, group_size=16, scale_dtype="float16"),
    "int4-signed": IntFormat(bits=4, symmetric=True, signed_scale=True, scale_dtype="float16"),
    "int4-positive": IntFormat(bits=4, symmetric=True, scale_dtype="bfloat16"),
    "int8": IntFormat(bits=8, symmetric=False),
    "int8-signed": IntFormat(bits=8, symmetric=True, signed_scale=True, group_size=64),
}
DATA_FREE = {name: algorithm for name, algorithm in ALGORITHMS.items() if not algorithm.needs_statistics}
every_algorithm = pytest.mark.parametrize("quantize", DATA_FREE.values(), ids=DATA_FREE.keys())
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())


def random_weight(rows: int, in_features: int, *, kind: str = "gauss", seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    draw = {
        "gauss": lambda: rng.standard_normal((rows, in_features)),
        "laplace": lambda: rng.laplace(size=(rows, in_features)),
        "heavy-tailed": lambda: rng.standard_t(4, size=(rows, in_features)),
    }
    return (draw[kind]() * 0.02).astype(np.float32)


def group_errors(weight: np.ndarray, tensor: QuantizedTensor) -> np.ndarray:
    """Sum of squared errors per group, in float64."""
    groups = (weight.shape[0], -1, tensor.format.group_size)
    return np.square(weight.astype(np.float64) - tensor.dequantize()).reshape(groups).sum(-1)


@every_algorithm
@every_format
def test_every_weight_goes_to_the_nearest_point_of_the_grid_that_is_stored(quantize, format):
    weight = random_weight(16, 256)
    tensor = quantize(weight, format)
    scale = np.repeat(tensor.scale.astype(np.float64), format.group_size, axis=1)
    zero = format.middle_code if tensor.zero_point is None else tensor.zero_point.astype(np.float64)
    zero = np.repeat(np.broadcast_to(zero, tensor.scale.shape), format.group_size, axis=1)
    points = (np.arange(format.greatest_code + 1) - zero[..., None]) * scale[..., None]
    nearest = np.abs(points - weight[..., None]).min(-1)
    stored = np.abs(tensor.dequantize() - weight)
    assert np.all(stored <= nearest + 1e-7 * format.greatest_code * np.abs(scale))  # float32 has 24 bits
    assert tensor.qdata.max() <= format.greatest_code


@every_format
def test_rounding_is_off_by_half_a_step_or_one_where_the_grid_is_cut(format):
    weight = random_weight(16, 256, kind="laplace")
    tensor = get_algorithm("round")(weight, format)
    steps = np.abs(tensor.dequantize() - weight) / np.repeat(np.abs(tensor.scale), format.group_size, axis=1)
    allowed = 0.5 if format.symmetric and not format.signed_scale else 1.0
    print(f"greatest error in steps: {steps.max():.4f}, mean {steps.mean():.4f}")
    assert 0.2 < steps.mean() < 0.3
    assert steps.max() <= allowed * (1 + 2**-7)


# Least float32 subnormal to greatest: all that a checkpoint can hold, as one magnitude per group of 16.
magnitudes = st.integers(min_value=-140, max_value=120)
mantissas = arrays(np.float32, (3, 32), elements=st.floats(min_value=-1, max_value=1, width=32))


@settings(max_examples=150, deadline=None)
@given(mantissas, st.lists(magnitudes, min_size=6, max_size=6), st.sampled_from(sorted(FORMATS)))
def test_refit_is_never_worse_than_rounding_in_any_group(mantissa, exponents, name):
    format = IntFormat(**{**vars(FORMATS[name]), "group_size": 16})
    if format.scale_dtype == "float16":
        exponents = [min(exponent, 15) for exponent in exponents]
    weight = np.ldexp(mantissa, np.repeat(np.array(exponents).reshape(3, 2), 16, axis=1)).astype(np.float32)
    rounded = group_errors(weight, get_algorithm("round")(weight, format))
    refitted = group_errors(weight, get_algorithm("refit")(weight, format))
    squares = np.square(weight.astype(np.float64)).reshape(3, 2, 16).sum(-1)
    assert np.all(refitted <= rounded + 1e-13 * squares)
    # and rounding itself stays within a step of a grid that spans the group, or of the least scale that can be stored
    span = np.abs(weight).astype(np.float64).reshape(3, 2, 16).max(-1)
    least = 2.0**-24 if format.scale_dtype == "float16" else 2.0**-100
    step = np.maximum(span / (format.middle_code - 1), least) * (1 + 2**-7)
    assert np.all(rounded <= 16 * step**2)


@every_algorithm
@every_format
def test_zero_constant_and_lopsided_groups(quantize, format):
    size = format.group_size
    weight = np.zeros((6, size), np.float32)
    weight[1] = 0.5
    weight[2] = -3.0
    weight[3, 7] = 100.0
    weight[4] = np.linspace(1.0, 2.0, size)
    weight[5] = -np.linspace(1.0, 2.0, size)
    tensor = quantize(weight, format)
    assert np.all(np.isfinite(tensor.scale) & (tensor.scale != 0))
    assert np.all(tensor.scale > 0) or format.signed_scale
    found = tensor.dequantize()
    assert np.array_equal(found[0], np.zeros(size))
    assert np.allclose(found[1:4], weight[1:4], rtol=2**-7, atol=0)
    assert np.abs(found[4:] - weight[4:]).max() <= 2.0 / (format.middle_code - 1)


@every_algorithm
def test_tiny_weights_survive_float16_scales(quantize):
    format = IntFormat(bits=4, symmetric=False, scale_dtype="float16")
    sizes = {1e-4: 0.1, 1e-5: 0.11, 1e-6: 0.2}  # standard deviation, tolerated relative error: scales run out of digits
    for size, tolerance in sizes.items():
        weight = random_weight(64, 64) * np.float32(size / 0.02)
        error = storage_error(weight, quantize(weight, format)).relative_rms
        print(f"std {size}: relative error {error:.4f}")
        assert error < tolerance


@every_algorithm
def test_scale_beyond_float16_is_refused_by_name_and_row(quantize):
    weight = random_weight(8, 64)
    weight[5, 40] = 2e6
    with pytest.raises(QuantizationError) as error:
        quantize(weight, IntFormat(bits=4, symmetric=False, scale_dtype="float16"), fqn="model.layers.3.w1.weight")
    assert str(error.value) == (
        "model.layers.3.w1.weight: row 5 needs a scale of 133333, above the 65504 of float16; "
        "use float32 scales or exclude this layer"
    )
    assert quantize(weight, IntFormat(bits=4, symmetric=False)).dequantize()[5, 40] == pytest.approx(2e6, rel=0.1)


@every_algorithm
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_broken_weights_are_refused_by_name_and_row(quantize, broken, recwarn):
    weight = random_weight(300, 512)
    weight[217, 13] = broken
    with pytest.raises(QuantizationError, match=r"model\.w: row 217 holds NaN or infinity; the checkpoint is damaged"):
        quantize(weight, FORMATS["int4"], fqn="model.w", threads=2)
    assert not recwarn.list


@every_algorithm
def test_greatest_float32_weights_do_not_overflow(quantize):
    weight = np.full((2, 32), 3e38, np.float32)
    weight[:, ::2] *= -1
    tensor = quantize(weight, FORMATS["int4"])
    assert np.abs(tensor.dequantize() / weight - 1).max() < 0.1


@every_algorithm
def test_indivisible_width_and_non_matrices_are_refused(quantize):
    with pytest.raises(QuantizationError, match=r"w: in_features=48 is not a multiple of group_size=32; pass --group"):
        quantize(np.zeros((2, 48), np.float32), FORMATS["int4"], fqn="w")
    with pytest.raises(QuantizationError, match=r"w: has shape \[2, 3, 32\]; only a matrix"):
        quantize(np.zeros((2, 3, 32), np.float32), FORMATS["int4"], fqn="w")


@every_algorithm
@every_format
def test_result_depends_neither_on_threads_nor_on_chunks_nor_on_the_other_rows(quantize, format, monkeypatch):
    weight = random_weight(37, 256)
    kept = weight.copy()
    whole = group_errors(weight, quantize(weight, format))
    monkeypatch.setattr(groups, "CHUNK_WEIGHTS", 7 * format.group_size)
    one, three = (quantize(weight, format, threads=threads) for threads in (1, 3))
    assert np.array_equal(one.qdata, three.qdata)
    assert np.array_equal(one.scale, three.scale)
    alone = group_errors(weight[11:12], quantize(weight[11:12], format))
    # Sums are taken in another order, which may decide between scales that are equally good.
    assert group_errors(weight, one) == pytest.approx(whole, rel=1e-2)
    assert alone == pytest.approx(whole[11:12], rel=1e-2)
    assert np.array_equal(weight, kept)


@every_algorithm
def test_views_are_quantized_as_what_they_show(quantize):
    weight = random_weight(64, 64)
    tensor = quantize(weight.T[::2], FORMATS["int4"])
    assert np.array_equal(tensor.qdata, quantize(weight.T[::2].copy(), FORMATS["int4"]).qdata)


@every_algorithm
@every_format
def test_rows_as_they_are_stored_give_what_the_whole_weight_gives(quantize, format):
    bits = (random_weight(24, 256).view(np.uint32) >> 16).astype(np.uint16)
    weight = (bits.astype(np.uint32) << 16).view(np.float32)
    half = random_weight(24, 256).astype(np.float16)
    scratch = groups.Scratch()
    for stored, values in ((bits, weight), (weight, weight), (half, half.astype(np.float32))):
        whole, kept = quantize(values, format), stored.copy()
        for start, stop in ((0, 16), (16, 24)):
            part = whole.rows(slice(start, stop))
            chunk = quantize.rows(stored[start:stop], format, scratch, fqn="w", rows=range(start, stop))
            assert np.array_equal(chunk.codes_GC.T.reshape(part.shape), part.qdata)
            assert np.array_equal(chunk.scale_C.reshape(part.scale.shape), part.scale)
            found, expected = chunk.storage_error(), storage_error(values[start:stop], part)
            assert found.squared_error == pytest.approx(expected.squared_error, rel=1e-5)
            assert found.squared_weight == pytest.approx(expected.squared_weight, rel=1e-5)
            assert found.greatest_error == expected.greatest_error
        assert np.array_equal(stored, kept)


@every_algorithm
def test_rows_that_do_not_fit_are_named_by_the_numbers_that_they_are_given(quantize):
    weight = random_weight(8, 64)
    weight[5, 40] = 2e6
    format = IntFormat(bits=4, symmetric=False, scale_dtype="float16")
    with pytest.raises(QuantizationError, match=r"model\.w: row 111 needs a scale of 133333"):
        quantize.rows(weight, format, groups.Scratch(), fqn="model.w", rows=range(101, 117, 2))


def test_sums_of_an_error_have_six_digits():
    weight = random_weight(128, 2048)
    chunk = get_algorithm("round").rows(weight, FORMATS["int4"], groups.Scratch(), fqn="w", rows=range(len(weight)))
    whole = get_algorithm("round")(weight, FORMATS["int4"]).dequantize()
    error = chunk.storage_error()
    exact = np.square(weight.astype(np.float64) - whole).sum()
    print(f"squared error off by {abs(error.squared_error / exact - 1):.1e}")
    assert error.squared_error == pytest.approx(exact, rel=1e-6)
    assert error.squared_weight == pytest.approx(np.square(weight.astype(np.float64)).sum(), rel=1e-6)


@every_format
@pytest.mark.parametrize("kind", ["gauss", "laplace", "heavy-tailed"])
def test_refit_lessens_the_squared_error(format, kind):
    weight = random_weight(256, 512, kind=kind)
    rounded, refitted = (
        storage_error(weight, get_algorithm(name)(weight, format)).squared_error for name in ("round", "refit")
    )
    print(f"{kind}: refit has {refitted / rounded:.4f} of rounding's squared error")
    assert 0.80 < refitted / rounded < 0.96  # measured: 0.87 to 0.95


@pytest.mark.parametrize(("group_size", "tolerance"), [(32, 0.91), (128, 0.94)])
@pytest.mark.parametrize("kind", ["gauss", "laplace", "heavy-tailed"])
def test_refit_beats_onnxruntimes_k_quant(kind, group_size, tolerance):
    weight_only = pytest.importorskip("onnxruntime.quantization.neural_compressor.weight_only")
    weight = random_weight(256, 512, kind=kind)
    codes, scale, zero_point = weight_only.quant_tensor_k_quant_cpu(weight, 4, group_size)
    theirs = ((codes - zero_point.astype(np.float64)) * scale).reshape(weight.shape)
    tensor = get_algorithm("refit")(weight, IntFormat(bits=4, group_size=group_size, symmetric=False))
    ratio = group_errors(weight, tensor).sum() / np.square(weight - theirs).sum()
    print(f"{kind}, group {group_size}: refit has {ratio:.4f} of k_quant's squared error")
    assert ratio < tolerance  # measured: 0.87 to 0.90 at 32, 0.92 to 0.93 at 128


def test_unknown_algorithm_lists_the_known_ones():
    assert DEFAULT_ALGORITHM == "refit"
    with pytest.raises(QuantizationError, match="algorithm 'gptqq' is unknown; known algorithms: gptq, refit, round"):
        get_algorithm("gptqq")


def exhaustive_squared_error(weight: np.ndarray, tensor: QuantizedTensor) -> float:
    """The least squared error over a dense search of scales and zero points around plain rounding's."""
    groups = weight.reshape(-1, tensor.format.group_size).astype(np.float64)
    scale, zero_point = tensor.scale.reshape(-1, 1).astype(np.float64), tensor.zero_point.reshape(-1, 1).astype(int)
    best = np.full(len(groups), np.inf)
    for shift in (-2, -1, 0, 1, 2):
        lower = -np.clip(zero_point + shift, 0, 15)
        for ratio in np.linspace(0.7, 1.15, 40):
            fitted = scale * ratio
            for _ in range(2):
                codes = np.clip(np.rint(groups / fitted), lower, 15 + lower)
                fitted = np.sum(codes * groups, 1, keepdims=True) / np.maximum(np.sum(codes**2, 1, keepdims=True), 1)
                fitted = np.where(fitted > 0, fitted, scale)
            best = np.minimum(best, np.square(groups - codes * fitted).sum(1))
    return float(best.sum())


@pytest.mark.parametrize("group_size", [32, 128])
def test_refit_is_close_to_an_exhaustive_search(group_size):
    weight = random_weight(64, 512, kind="laplace")
    format = IntFormat(bits=4, group_size=group_size, symmetric=False)
    least = exhaustive_squared_error(weight, get_algorithm("round")(weight, format))
    found = storage_error(weight, get_algorithm("refit")(weight, format)).squared_error
    print(f"group {group_size}: refit is {found / least - 1:.3%} above the least squared error")
    assert found / least < 1.006  # measured: 0.4 and 0.3 %
