"""The types of GGUF tensors: how many bytes their blocks have, and what is in them.

In: rows of blocks as bytes. Out: float32 values; or, of the types whose grid is one of ours, the codes and scales
themselves, so that an artifact holds the very same values. Sizes and the arithmetic of every type are the gguf
package's.

    Q4_0  32 values: float16 scale, 16 bytes: value i in the lower half of byte i, value i + 16 in the upper; minus 8
    Q8_0  32 values: float16 scale, 32 int8
    Q6_K  256 values: 128 bytes of lower halves, 64 of upper two bits, 16 int8 scales, one float16 scale of those;
          minus 32. Of each 128 values, number 32 k + j has bits 4 (k // 2) of byte 32 (k % 2) + j, and bits 2 k of
          upper byte j
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lfm2_export.quant.formats import ByteArray, Codes, FloatArray, IntFormat

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

# Numbers, by the format's name for them; what else is a float type is made of blocks.
PLAIN = MappingProxyType({"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"})


class BlockType(NamedTuple):
    """``values`` of a row that lie in each block of ``nbytes``."""

    name: str
    values: int
    nbytes: int


@cache
def block_type(number: int) -> BlockType | None:
    """The type of that number; None where the gguf package does not know it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        return None
    values, nbytes = GGML_QUANT_SIZES[kind]
    return BlockType(kind.name, values, nbytes)


@cache
def is_readable(name: str) -> bool:
    """Whether tensors of a type hold numbers that can be computed: integers, and types without a decoder, do not."""
    if name in PLAIN:
        return True
    try:
        to_float32(name, np.zeros((1, _block(name)[1]), np.uint8))
    except NotImplementedError:
        return False
    return True


def values_of(name: str) -> int:
    """How many values of a row lie in a block of a type."""
    return _block(name)[0]


def _kind(name: str) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[name]


def to_float32(name: str, rows: ByteArray) -> FloatArray:
    """Rows of blocks, uint8 [rows, bytes], as float32 [rows, values]."""
    from gguf import quants

    with np.errstate(all="ignore"):  # a damaged scale may be anything: values are looked at where they are used
        return np.asarray(quants.dequantize(rows, _kind(name)), np.float32)


def exact_format(name: str) -> IntFormat | None:
    """The format of ours that holds every value of a type, bit for bit; None where there is none."""
    return _EXACT[name][0] if name in _EXACT else None


def codes(name: str, rows: ByteArray) -> Codes:
    """The codes of rows of blocks, uint8 [rows, bytes], in ``exact_format(name)``; scales may be zero or not finite."""
    values, nbytes = _block(name)
    with np.errstate(all="ignore"):
        qdata, scale, _ = _EXACT[name][1](rows.reshape(-1, nbytes))
    columns = rows.shape[1] // nbytes * values
    return Codes(qdata.reshape(-1, columns), scale.reshape(len(rows), -1))


def _block(name: str) -> tuple[int, int]:
    from gguf import GGML_QUANT_SIZES

    values, nbytes = GGML_QUANT_SIZES[_kind(name)]
    return values, nbytes


def _float16(bytes_of: ByteArray) -> FloatArray:
    return np.ascontiguousarray(bytes_of).view("<f2").astype(np.float32)


def _q4_0(blocks: ByteArray) -> Codes:
    halves = blocks[:, 2:]
    return Codes(np.concatenate([halves & 15, halves >> 4], axis=1), _float16(blocks[:, :2]))


def _q8_0(blocks: ByteArray) -> Codes:
    return Codes(blocks[:, 2:] ^ np.uint8(128), _float16(blocks[:, :2]))


def _q6_k(blocks: ByteArray) -> Codes:
    lower = blocks[:, :128].reshape(-1, 2, 1, 64) >> np.array([[0], [4]], np.uint8)
    upper = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8)
    six_bits = (lower & 15).reshape(-1, 2, 4, 32) | (upper & 3) << 4
    # Codes are minus 32 there, minus 128 here.
    inner = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return Codes(np.asarray(six_bits.reshape(-1, 256) + 96, np.uint8), inner * _float16(blocks[:, 208:]))


_EXACT: dict[str, tuple[IntFormat, Callable[[ByteArray], Codes]]] = {
    "Q4_0": (IntFormat(bits=4, group_size=32, symmetric=True, signed_scale=True, scale_dtype="float16"), _q4_0),
    "Q8_0": (IntFormat(bits=8, group_size=32, symmetric=True, signed_scale=True, scale_dtype="float16"), _q8_0),
    # The product of an int8 and a float16 number is exact in float32, and in nothing narrower.
    "Q6_K": (IntFormat(bits=8, group_size=16, symmetric=True, signed_scale=True, scale_dtype="float32"), _q6_k),
}
