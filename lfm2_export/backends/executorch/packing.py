"""Between experts' ``QuantizedTensor``s and the bytes that ``llama::quantized_moe_ffn`` reads, both ways.

In: int4 codes with a scale per group, symmetric. Out: one blob of bytes per matrix. The operator that packs them is not
in ExecuTorch's x86 wheels; the layout is torchao's "universal" one (``weight_packing.h`` and ``bitpack.h`` in torchao
0.18):

    64 bytes: 16 int32: magic 6712, type 1, then 4 bits, no zero points, no bias, nr 8, kr 16, sr 2, zeros
    for every 8 rows, for every group of columns:
        for every 16 columns: 8 bytes of each row for the first 8 columns, then for the last 8; of these 128 codes (+8)
        each run of 32 becomes 16 bytes, code i in the lower and code i + 16 in the upper half
        8 float32 scales; 8 int32 sums of the codes

Rows are filled up to a multiple of 8.
"""

from __future__ import annotations

import numpy as np

from lfm2_export.errors import QuantizationError
from lfm2_export.quant.formats import ByteArray, FloatArray, IntFormat, QuantizedTensor

_ROWS, _CHUNK, _HALF = 8, 16, 8
_HEADER = (6712, 1, 4, 0, 0, _ROWS, _CHUNK, 2)
HEADER_BYTES = 64


def stock_bytes(rows: int, columns: int, group_size: int) -> int:
    """Bytes of a matrix."""
    padded = -(-rows // _ROWS) * _ROWS
    return HEADER_BYTES + padded * (columns // 2 + 8 * (columns // group_size))


def check_stock(form: IntFormat) -> int:
    """The group size of a format; refuses what the operator does not take.

    Raises:
        QuantizationError: it is not symmetric int4, or a group is no multiple of 16 columns.
    """
    if form.bits != 4 or not form.symmetric or form.group_size is None or form.group_size % _CHUNK:
        raise QuantizationError(
            f"experts in {form.to_json()}: llama::quantized_moe_ffn takes symmetric int4 in groups of a multiple of "
            f"{_CHUNK}; pass --group-size 32"
        )
    return form.group_size


def pack_stock(*tensors: QuantizedTensor) -> ByteArray:
    """The blob of matrices [rows, columns] one below the other.

    Raises:
        QuantizationError: the format is not symmetric int4, or a group is no multiple of 16 columns.
    """
    group_size = check_stock(tensors[0].format)
    form = tensors[0].format
    codes = _padded(np.concatenate([tensor.qdata for tensor in tensors]), form.middle_code)
    scale = _padded(np.concatenate([tensor.scale for tensor in tensors]).astype("<f4"), 0)
    blocks, groups = len(codes) // _ROWS, scale.shape[1]
    # [block, row, group, chunk, half, 8] -> [block, group, chunk, half, row, 8], then runs of 32
    split = codes.reshape(blocks, _ROWS, groups, group_size // _CHUNK, 2, _HALF)
    runs = split.transpose(0, 2, 3, 4, 1, 5).reshape(blocks, groups, -1, 32)
    packed = (runs[..., :16] | runs[..., 16:] << 4).reshape(blocks, groups, -1)
    sums = split.sum(axis=(3, 4, 5), dtype="<i4") - form.middle_code * group_size
    parts = (packed, *(_as_bytes(x.reshape(blocks, _ROWS, groups)) for x in (scale, sums.astype("<i4"))))
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[: len(_HEADER)] = _HEADER
    return np.concatenate([header.view(np.uint8), np.concatenate(parts, axis=-1).ravel()])


def unpack_stock(blob: ByteArray, columns: int, group_size: int) -> FloatArray:
    """What the operator computes with, float32 [rows, columns]; rows that fill up are zero."""
    if tuple(blob[:HEADER_BYTES].view("<i4")[: len(_HEADER)]) != _HEADER:
        raise QuantizationError("a blob of experts does not begin with torchao's header; export again")
    groups, packed_bytes = columns // group_size, group_size * _ROWS // 2
    body = blob[HEADER_BYTES:].reshape(-1, groups, packed_bytes + 8 * _ROWS)
    runs = body[..., :packed_bytes].reshape(*body.shape[:2], -1, 16)
    codes = np.concatenate([runs & 15, runs >> 4], axis=-1).astype(np.float32) - 8
    values = codes.reshape(*body.shape[:2], group_size // _CHUNK, 2, _ROWS, _HALF).transpose(0, 4, 1, 2, 3, 5)
    scale = np.ascontiguousarray(body[..., packed_bytes : packed_bytes + 4 * _ROWS]).view("<f4").transpose(0, 2, 1)
    out: FloatArray = (values.reshape(-1, groups, group_size) * scale.reshape(-1, groups, 1)).reshape(-1, columns)
    return out


def _padded(rows: np.ndarray, value: int) -> np.ndarray:
    return np.pad(rows, ((0, -len(rows) % _ROWS), (0, 0)), constant_values=value)


def _as_bytes(values: np.ndarray) -> ByteArray:
    """[block, row, group] four-byte values as uint8 [block, group, 4 * row]."""
    return np.ascontiguousarray(values.transpose(0, 2, 1)).view(np.uint8)
