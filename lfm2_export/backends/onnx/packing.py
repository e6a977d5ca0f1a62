"""From a quantizer's chunks to the byte layouts of ONNX Runtime's operators.

In: codes, scales and zero points per group. Out: the initializers of MatMulNBits, QMoE and GatherBlockQuantized (domain
com.microsoft). Layouts: the operators' schemas in onnxruntime 1.31, proven by running them. What is really in a file is
read back by ``stored.py``, which shares nothing with this.

All three operators read the same bytes: N rows of K codes, the earlier code of a byte in its lower half; the same for
the zero points of a row, where an odd count leaves the last upper half unused. The shapes differ (g: group size,
b: bits, E: experts, I: moe_intermediate_size):

    MatMulNBits           B [N, K/g, g*b/8]           scales [N, K/g]     zero_points [N, ceil(K/g*b/8)]
    GatherBlockQuantized  data [N, K*b/8]             scales [N, K/g]     zero_points [N, ceil(K/g*b/8)]
    QMoE                  weights [E, N, K*b/8]       scales [E, N, K/g]  zero_points [E, N, ceil(K/g*b/8)]
                          fc1: N = 2I, row 2i is w1's (gate) row i, row 2i+1 is w3's (up); fc2: w2

so a tied embedding and head can be two initializers on the same bytes of the data file. MatMulNBits' scales have its
activations' dtype, GatherBlockQuantized's that of its output: where those are float32, a Cast stands between the
float16 initializer and the node. QMoE would take float16 scales as they are, but onnxruntime then inserts Casts of its
own, too late to fold them below full optimization. Our operators read either dtype.
MatMulNBits calls our group_size "block_size"; rename only here.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lfm2_export.quant.formats import ByteArray, FloatArray, IntFormat
from lfm2_export.quant.groups import Chunk


def empty_rows(format: IntFormat, rows: int, in_features: int) -> dict[str, npt.NDArray[Any]]:
    """Initializers by role, to be filled by ``pack_chunk``: ``qdata`` uint8 [N, K*bits/8], ``scale`` [N, K/g] in the
    format's dtype, and unless the format is symmetric ``zero_point`` uint8 [N, ceil(K/g*bits/8)]."""
    groups, bits = in_features // format.group_of(in_features), format.bits
    packed: dict[str, npt.NDArray[Any]] = {
        "qdata": np.empty((rows, in_features * bits // 8), np.uint8),
        "scale": np.empty((rows, groups), np.float16 if format.scale_dtype == "float16" else np.float32),
    }
    if not format.symmetric:
        packed["zero_point"] = np.empty((rows, -(-groups * bits // 8)), np.uint8)
    return packed


def pack_chunk(chunk: Chunk, rows: slice, packed: dict[str, npt.NDArray[Any]]) -> None:
    """Puts a chunk of whole rows where ``rows`` of ``packed`` are; overwrites the chunk's scratch buffers."""
    groups = packed["scale"].shape[1]
    words = _words(chunk)
    there = packed["qdata"].view("<u2").reshape(-1, groups, len(words))[rows]
    np.copyto(there, words.reshape(len(words), -1, groups).transpose(1, 2, 0), casting="unsafe")
    packed["scale"][rows] = chunk.scale_C.reshape(-1, groups)
    if "zero_point" in packed:
        points = chunk.zero_point_C.reshape(-1, groups).astype(np.uint8)
        packed["zero_point"][rows] = pack_codes(points, chunk.format.bits)


def _words(chunk: Chunk) -> FloatArray:
    """Neighbouring codes of a group as one number of 16 bits, the earlier ones in its lower bits: [g*b/16, groups].

    Sums of long vectors, exact in float32, and a quarter (with 8 bits: half) of the numbers to turn and to convert.
    """
    bytes_GC, words_GC = chunk.scratch_GC
    codes_GC, bits = chunk.codes_GC, chunk.format.bits
    return _pairs(codes_GC if bits == 8 else _pairs(codes_GC, 4, bytes_GC), 8, words_GC)


def _pairs(codes_GC: FloatArray, bits: int, out_GC: FloatArray) -> FloatArray:
    pairs_GC = np.multiply(codes_GC[1::2], np.float32(1 << bits), out=out_GC[: len(codes_GC) // 2])
    return np.add(pairs_GC, codes_GC[0::2], out=pairs_GC)


def pack_codes(codes: ByteArray, bits: Literal[4, 8]) -> ByteArray:
    """Codes uint8 [..., n], one per byte, as [..., ceil(n * bits / 8)]."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], axis=-1)
    pairs = np.ascontiguousarray(codes).view("<u2")  # the earlier code is the lower byte
    return np.bitwise_or(pairs, pairs >> 4).astype(np.uint8)
