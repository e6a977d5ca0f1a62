import numpy as np
import pytest

from lfm2_export.errors import QuantizationError
from lfm2_export.kernels.packing import PackedExperts, pack_matrix, unpack_expert, unpack_matrix
from lfm2_export.quant.formats import IntFormat, QuantizedTensor
from tests.kernels.toy_program import random_matrix


def test_matrices_come_back_as_they_were():
    rng = np.random.default_rng(0)
    for rows, columns in ((32, 32), (64, 160), (96, 32)):
        matrix = random_matrix(rng, rows, columns)
        tiles = pack_matrix(matrix)
        assert tiles.shape == (rows // 32, columns // 32, 576)
        back = unpack_matrix(tiles)
        np.testing.assert_array_equal(back.qdata, matrix.qdata)
        np.testing.assert_array_equal(back.scale, matrix.scale)


def test_a_code_lies_where_the_layout_says():
    matrix = random_matrix(np.random.default_rng(0), 64, 64)
    tiles = pack_matrix(matrix)
    for row, column in ((0, 0), (5, 3), (31, 15), (33, 16), (63, 63), (40, 45)):
        tile, place = tiles[row // 32, column // 32], column % 32
        pair = tile[64 + (place % 16 // 4 * 32 + row % 32) * 4 + place % 4]
        assert matrix.qdata[row, column] == (pair & 15 if place < 16 else pair >> 4)
        assert tile[2 * (row % 32) : 2 * (row % 32) + 2].view("<f2")[0] == matrix.scale[row, column // 32]


def test_experts_come_back_as_they_were():
    rng = np.random.default_rng(1)
    packed = PackedExperts(3, 64, 96)
    experts = [(random_matrix(rng, 96, 64), random_matrix(rng, 96, 64), random_matrix(rng, 64, 96)) for _ in range(3)]
    for number, (w1, w3, w2) in enumerate(experts):
        packed.set_expert(number, w1, w3, w2)
    assert packed.gate_up.shape == (3, 6, 2, 576)
    assert packed.down.shape == (3, 2, 3, 576)
    for number, matrices in enumerate(experts):
        for matrix, back in zip(matrices, unpack_expert(packed.gate_up, packed.down, number), strict=True):
            np.testing.assert_array_equal(back.dequantize(), matrix.dequantize())


@pytest.mark.parametrize(
    ("width", "inner", "named"), [(48, 64, "hidden_size=48"), (64, 80, "moe_intermediate_size=80")]
)
def test_sizes_that_do_not_fit_are_refused(width: int, inner: int, named: str):
    with pytest.raises(QuantizationError, match=f"{named} is not a multiple of 32.*--moe-op stock"):
        PackedExperts(2, width, inner)


def test_formats_that_do_not_fit_are_refused():
    def zeros(form: IntFormat, scale: float = 1.0) -> QuantizedTensor:
        scales = np.full((32, 64 // form.group_size), scale, form.scale_dtype)
        points = None if form.symmetric else np.zeros(scales.shape, np.uint8)
        return QuantizedTensor(qdata=np.zeros((32, 64), np.uint8), scale=scales, zero_point=points, format=form)

    with pytest.raises(QuantizationError, match="symmetric int4 in groups of 32"):
        pack_matrix(zeros(IntFormat(bits=4, group_size=64, symmetric=True)))
    with pytest.raises(QuantizationError, match="symmetric int4 in groups of 32"):
        pack_matrix(zeros(IntFormat(bits=4, symmetric=False)))
    with pytest.raises(QuantizationError, match="float16 scales"):
        pack_matrix(zeros(IntFormat(bits=4, symmetric=True), scale=1.0001))
    pack_matrix(zeros(IntFormat(bits=4, symmetric=True), scale=0.5))
