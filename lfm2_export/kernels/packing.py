"""Between experts' ``QuantizedTensor``s and the bytes that ``lfm2::moe_ffn`` reads, both ways.

In: int4 codes and float16 scales in groups of 32, symmetric (signed scales are fine). Out: one uint8 tensor for the
gate and up matrices of all experts and one for the down matrices, filled expert by expert, which the kernels read in
place from the program's memory map. ``src/layout.h`` says why the layout is what it is:

    matrix [rows, k] -> [rows/32, k/32, 576]: 32 float16 scales, then codes [quad 4, row 32, byte 4], where the low
                        nibble holds input 4*quad + byte of the group and the high nibble input 16 + 4*quad + byte
    gate_up          -> [experts, 2*inner/32, width/32, 576], row blocks alternate: 32 rows of w1, the same 32 of w3
    down             -> [experts, width/32, inner/32, 576]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2_export.errors import QuantizationError
from lfm2_export.quant.formats import ByteArray, IntFormat, QuantizedTensor

GROUP_SIZE = 32
TILE_ROWS = 32
TILE_BYTES = TILE_ROWS * 2 + TILE_ROWS * GROUP_SIZE // 2
EXPERT_FORMAT = IntFormat(bits=4, group_size=GROUP_SIZE, symmetric=True, signed_scale=True, scale_dtype="float16")

Codes = npt.NDArray[np.uint8]


def _empty(shape: tuple[int, ...]) -> ByteArray:
    return np.empty(shape, np.uint8)


class PackedExperts:
    """The weights of one layer's experts, to be filled by ``set_expert``; ``allocate`` gives the memory for them.

    ``gate_up`` uint8 [experts, 2*inner/32, width/32, 576] and ``down`` uint8 [experts, width/32, inner/32, 576].
    """

    def __init__(self, experts: int, width: int, inner: int, *, allocate: Callable[[tuple[int, ...]], Any] = _empty):
        for name, size in (("hidden_size", width), ("moe_intermediate_size", inner)):
            if size % GROUP_SIZE or size <= 0:
                raise QuantizationError(
                    f"{name}={size} is not a multiple of {GROUP_SIZE}, which lfm2::moe_ffn needs; pass --moe-op stock"
                )
        self.gate_up: ByteArray = allocate((experts, 2 * inner // TILE_ROWS, width // GROUP_SIZE, TILE_BYTES))
        self.down: ByteArray = allocate((experts, width // TILE_ROWS, inner // GROUP_SIZE, TILE_BYTES))

    def set_expert(self, expert: int, w1: QuantizedTensor, w3: QuantizedTensor, w2: QuantizedTensor) -> None:
        """Packs one expert: w1 (gate) and w3 (up) [inner, width], w2 (down) [width, inner]."""
        self.gate_up[expert, 0::2] = pack_matrix(w1)
        self.gate_up[expert, 1::2] = pack_matrix(w3)
        self.down[expert] = pack_matrix(w2)


def pack_matrix(tensor: QuantizedTensor) -> ByteArray:
    """Tiles uint8 [rows/32, k/32, 576] of a matrix [rows, k].

    Raises:
        QuantizationError: the format is not symmetric int4 in groups of 32 with scales that float16 holds.
    """
    check_format(tensor.format)
    _check_values(tensor)
    tiles = np.empty(tiles_shape(*tensor.shape), np.uint8)
    blocks, groups, _ = tiles.shape
    scales = np.ascontiguousarray(tensor.scale.astype("<f2").reshape(blocks, TILE_ROWS, groups).swapaxes(1, 2))
    tiles[..., : 2 * TILE_ROWS] = scales.view(np.uint8)
    halves = tensor.qdata.reshape(blocks, TILE_ROWS, groups, 2, 4, 4)
    nibbles = halves[:, :, :, 0] | halves[:, :, :, 1] << 4
    tiles[..., 2 * TILE_ROWS :] = nibbles.transpose(0, 2, 3, 1, 4).reshape(blocks, groups, -1)
    return tiles


def unpack_matrix(tiles: ByteArray) -> QuantizedTensor:
    """The inverse of ``pack_matrix``: parity needs to know what is really in a file."""
    blocks, groups, _ = tiles.shape
    scales = np.ascontiguousarray(tiles[..., : 2 * TILE_ROWS]).view("<f2").swapaxes(1, 2)
    nibbles = tiles[..., 2 * TILE_ROWS :].reshape(blocks, groups, 4, TILE_ROWS, 4).transpose(0, 3, 1, 2, 4)
    codes = np.stack([nibbles & 15, nibbles >> 4], axis=3)
    return QuantizedTensor(
        qdata=codes.reshape(blocks * TILE_ROWS, groups * GROUP_SIZE),
        scale=scales.reshape(blocks * TILE_ROWS, groups).astype(np.float16),
        zero_point=None,
        format=EXPERT_FORMAT,
    )


def unpack_expert(
    gate_up: ByteArray, down: ByteArray, expert: int
) -> tuple[QuantizedTensor, QuantizedTensor, QuantizedTensor]:
    """w1, w3 and w2 of one expert."""
    return (
        unpack_matrix(gate_up[expert, 0::2]),
        unpack_matrix(gate_up[expert, 1::2]),
        unpack_matrix(down[expert]),
    )


def tiles_shape(rows: int, columns: int) -> tuple[int, int, int]:
    """The shape of a matrix's tiles, uint8."""
    return rows // TILE_ROWS, columns // GROUP_SIZE, TILE_BYTES


def check_format(form: IntFormat) -> None:
    """Refuses a format that ``lfm2::moe_ffn`` cannot take.

    Raises:
        QuantizationError: it is not symmetric int4 in groups of 32.
    """
    if (form.bits, form.group_size, form.symmetric) != (4, GROUP_SIZE, True):
        raise QuantizationError(
            f"experts in {form.to_json()}: lfm2::moe_ffn takes symmetric int4 in groups of {GROUP_SIZE}; "
            "pass --group-size 32 or --moe-op stock"
        )


def _check_values(tensor: QuantizedTensor) -> None:
    if tensor.shape[0] % TILE_ROWS:
        raise QuantizationError(f"{tensor.shape[0]} rows are not a multiple of {TILE_ROWS}; pass --moe-op stock")
    if tensor.scale.dtype != np.float16 and np.any(tensor.scale.astype(np.float16) != tensor.scale):
        raise QuantizationError("lfm2::moe_ffn stores float16 scales; quantize with scale_dtype='float16'")
