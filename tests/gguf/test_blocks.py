"""What is in blocks: codes and scales say the same numbers as the gguf package's own decoder."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from lfm2_export.gguf import blocks
from lfm2_export.quant.groups import Scratch


def random_blocks(kind: Type, rows: int, columns: int) -> np.ndarray:
    """Any bytes, with scales that are finite."""
    values, nbytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    found = rng.integers(0, 256, (rows * columns // values, nbytes), dtype=np.uint8)
    scale = (rng.standard_normal(len(found)) * 0.01).astype("<f2")
    scale[::7] = 0
    place = slice(208, 210) if kind is Type.Q6_K else slice(0, 2)
    found[:, place] = scale.view(np.uint8).reshape(-1, 2)
    return found.reshape(rows, -1)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q8_0, Type.Q6_K], ids=lambda kind: kind.name)
def test_codes_and_scales_are_the_values_bit_for_bit(kind: Type) -> None:
    stored = random_blocks(kind, rows=5, columns=512)
    expected = gguf.quants.dequantize(stored, kind)
    form = blocks.exact_format(kind.name)
    assert form is not None
    codes = blocks.codes(kind.name, stored)
    assert codes.qdata.max() <= form.greatest_code
    values = (codes.qdata.reshape(5, -1, form.group_size).astype(np.float32) - form.middle_code) * codes.scale[
        ..., None
    ]
    assert np.array_equal(values.reshape(5, -1), expected)
    assert np.array_equal(form.representable_scale(codes.scale[codes.scale != 0]), codes.scale[codes.scale != 0])
    assert np.array_equal(blocks.to_float32(kind.name, stored), expected)

    chunk = Scratch().take_over(codes, form)
    assert chunk.storage_error().squared_error == 0
    taken = ((chunk.codes_GC - chunk.zero_point_C) * chunk.scale_C).T.reshape(5, -1)
    assert np.array_equal(taken, expected)
    assert (chunk.scale_C != 0).all()


def test_other_types_have_no_grid_of_ours() -> None:
    for kind in (Type.Q4_1, Type.Q5_0, Type.Q4_K, Type.Q5_K, Type.IQ4_XS, Type.F16):
        assert blocks.exact_format(kind.name) is None
        assert blocks.is_readable(kind.name)
    assert not blocks.is_readable("I32")
    assert blocks.block_type(10_000) is None
