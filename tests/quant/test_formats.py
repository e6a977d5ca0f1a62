"""How weights are stored: values, sizes, errors that say what to do."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm2_export.errors import QuantizationError
from lfm2_export.quant import formats
from lfm2_export.quant.algorithms import get_algorithm
from lfm2_export.quant.formats import (
    FloatFormat,
    IntFormat,
    QuantizedTensor,
    StorageError,
    storage_error,
    to_float,
)

RNG = np.random.default_rng(0)


def some_tensor(format: IntFormat, rows: int, in_features: int) -> QuantizedTensor:
    groups = in_features // format.group_size
    zero_point = RNG.integers(0, format.greatest_code + 1, (rows, groups), dtype=np.uint8)
    return QuantizedTensor(
        qdata=RNG.integers(0, format.greatest_code + 1, (rows, in_features), dtype=np.uint8),
        scale=RNG.uniform(0.01, 0.02, (rows, groups)).astype(np.float16).astype(np.float32),
        zero_point=None if format.symmetric else zero_point,
        format=format,
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_dequantize_is_code_minus_zero_point_times_scale(bits, symmetric, monkeypatch):
    monkeypatch.setattr(formats, "_PIECE", 200)  # several pieces, the last one shorter
    tensor = some_tensor(IntFormat(bits=bits, group_size=32, symmetric=symmetric), 7, 96)
    expected = np.empty((7, 96), np.float32)
    for row in range(7):
        for column in range(96):
            zero = 1 << (bits - 1) if tensor.zero_point is None else int(tensor.zero_point[row, column // 32])
            expected[row, column] = (int(tensor.qdata[row, column]) - zero) * tensor.scale[row, column // 32]
    assert np.array_equal(tensor.dequantize(), expected)
    assert np.array_equal(tensor.rows(slice(2, 5)).dequantize(), expected[2:5])


@pytest.mark.parametrize(
    ("format", "bits"),
    [
        (IntFormat(bits=4, symmetric=False), 5.125),
        (IntFormat(bits=4, symmetric=False, scale_dtype="float16"), 4.625),
        (IntFormat(bits=4, symmetric=False, group_size=128, scale_dtype="float16"), 4.15625),
        (IntFormat(bits=4, symmetric=True, scale_dtype="float16"), 4.5),
        (IntFormat(bits=8, symmetric=True), 9.0),
        (IntFormat(bits=8, symmetric=True, group_size=None), 8.0625),
        (FloatFormat(dtype="float16"), 16.0),
    ],
)
def test_bits_per_weight_count_scales_and_zero_points(format, bits):
    assert format.bits_per_weight(512) == bits


@pytest.mark.parametrize("algorithm", ["refit", "round"])
def test_a_row_that_is_a_group_is_one_whatever_its_width(algorithm):
    weight = np.random.default_rng(0).standard_normal((6, 256), np.float32)
    rows, groups = (IntFormat(bits=8, symmetric=True, group_size=size) for size in (None, 256))
    found, expected = (get_algorithm(algorithm)(weight, form) for form in (rows, groups))
    assert np.array_equal(found.qdata, expected.qdata)
    assert np.array_equal(found.scale, expected.scale)
    odd = get_algorithm(algorithm)(weight[:, :250], rows)  # a width that no group size divides
    assert odd.scale.shape == (6, 1)
    assert np.abs(odd.dequantize() - weight[:, :250]).max() < np.abs(weight).max() / 127
    assert rows.groups(250, "w") == 1
    with pytest.raises(QuantizationError, match="in_features=0 is not a multiple"):
        rows.groups(0, "w")


def test_width_that_is_no_multiple_of_the_group_says_what_to_pass():
    format = IntFormat(bits=4, group_size=128, symmetric=False)
    with pytest.raises(QuantizationError) as error:
        format.groups(1792 + 32, "model.layers.0.feed_forward.w2.weight")
    assert str(error.value) == (
        "model.layers.0.feed_forward.w2.weight: in_features=1824 is not a multiple of group_size=128; "
        "pass --group-size 32 or exclude this layer"
    )
    with pytest.raises(QuantizationError, match=r"in_features=33 .* group_size=128; pass exclude this layer|33"):
        format.groups(33, "w")
    assert format.groups(1792, "w") == 14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 3, "symmetric": True}, "bits=3 is not supported; use 4 or 8"),
        ({"bits": 4, "group_size": 48, "symmetric": True}, "group_size=48 is not supported; use one of 16, 32"),
        ({"bits": 4, "symmetric": True, "scale_dtype": "float64"}, "scale_dtype='float64' is not supported"),
        ({"bits": 4, "symmetric": False, "signed_scale": True}, "signed_scale=True needs symmetric=True"),
    ],
)
def test_formats_that_nothing_can_run_are_refused(arguments, message):
    with pytest.raises(QuantizationError, match=message):
        IntFormat(**arguments)


positive_floats = st.floats(min_value=0.0, max_value=2.0**127, width=32)


@given(st.lists(positive_floats, min_size=1, max_size=20), st.booleans())
def test_scales_become_representable_and_are_never_zero_or_infinite(sizes, negative):
    scale = np.array(sizes, np.float32) * np.float32(-1 if negative else 1)
    for dtype, mantissa in (("float32", 23), ("float16", 10), ("bfloat16", 7)):
        format = IntFormat(bits=4, symmetric=True, scale_dtype=dtype)
        stored = format.representable_scale(scale)
        assert stored.dtype == np.float32
        assert np.all(np.isfinite(stored) & (stored != 0))
        assert np.array_equal(np.signbit(stored), scale < 0)  # of either zero: XNNPACK takes no negative ones
        assert np.array_equal(format.representable_scale(stored), stored)
        if dtype == "float16":
            assert np.array_equal(stored.astype(np.float16).astype(np.float32), stored)
        if dtype == "bfloat16":
            assert not np.any(stored.view(np.uint32) & 0xFFFF)
        normal = (np.abs(scale) > 2.0**-14) & (np.abs(scale) < format.greatest_scale)
        assert np.all(np.abs(stored - scale)[normal] <= 2.0 ** -(mantissa + 1) * np.abs(scale)[normal])


@given(st.lists(st.floats(min_value=2.0**-60, max_value=2.0**100, width=32), min_size=1, max_size=20))
def test_bfloat16_scales_round_as_ml_dtypes_does(sizes):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    scale = np.array(sizes, np.float32)
    stored = IntFormat(bits=4, symmetric=True, scale_dtype="bfloat16").representable_scale(scale)
    assert np.array_equal(stored, scale.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_float16_subnormal_scales_are_rounded_up_so_that_the_range_still_fits():
    format = IntFormat(bits=4, symmetric=False, scale_dtype="float16")
    scale = np.array([1.3 * 2**-24, 2.4 * 2**-24, 3.0 * 2**-24], np.float32)
    assert np.array_equal(format.representable_scale(scale) * 2**24, [2, 3, 3])


def test_storage_error_adds_up_over_parts_and_notices_one_changed_code():
    weight = RNG.standard_normal((8, 64)).astype(np.float32)
    tensor = some_tensor(IntFormat(bits=4, symmetric=False), 8, 64)
    exact = storage_error(tensor.dequantize(), tensor)
    assert exact.relative_rms == 0.0
    whole = storage_error(weight, tensor)
    parts = sum(
        (storage_error(weight[i : i + 3], tensor.rows(slice(i, i + 3))) for i in range(0, 8, 3)), StorageError()
    )
    assert parts.squared_error == pytest.approx(whole.squared_error, rel=1e-5)
    assert parts.greatest_error == whole.greatest_error
    assert whole.relative_rms == pytest.approx(
        np.linalg.norm(weight - tensor.dequantize()) / np.linalg.norm(weight), rel=1e-6
    )
    tensor.qdata[5, 5] ^= 1
    assert storage_error(weight, tensor).squared_error != pytest.approx(whole.squared_error, rel=1e-5)


def test_float16_weights_beyond_its_range_are_refused_by_name():
    weight = np.array([[1.0, -70000.0]], np.float32)
    with pytest.raises(QuantizationError, match=r"model\.w: holds 70000, beyond float16's 65504; use another scheme"):
        to_float(weight, FloatFormat(dtype="float16"), fqn="model.w")
    for broken in (np.nan, np.inf):
        weight[0, 1] = broken
        with pytest.raises(QuantizationError, match=r"model\.w: holds NaN or infinity; the checkpoint is damaged"):
            to_float(weight, FloatFormat(dtype="float32"), fqn="model.w")
    weight[0, 1] = 65504
    assert np.array_equal(to_float(weight, FloatFormat(dtype="float16")), weight)
