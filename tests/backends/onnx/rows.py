"""Whole matrices in the layouts of ``backends/onnx/packing.py`` and back, for tests to compare with."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lfm2_export.backends.onnx.packing import pack_codes
from lfm2_export.quant.formats import ByteArray, IntFormat, QuantizedTensor, ScaleArray


def pack_rows(tensor: QuantizedTensor) -> dict[str, npt.NDArray[Any]]:
    """Initializers by role: ``qdata`` uint8 [N, K*bits/8], ``scale`` [N, K/g] in the format's dtype, and unless the
    format is symmetric ``zero_point`` uint8 [N, ceil(K/g*bits/8)]."""
    bits = tensor.format.bits
    packed: dict[str, npt.NDArray[Any]] = {"qdata": pack_codes(tensor.qdata, bits), "scale": tensor.scale}
    if tensor.zero_point is not None:
        packed["zero_point"] = pack_codes(tensor.zero_point, bits)
    return packed


def unpack_rows(
    format: IntFormat, *, qdata: ByteArray, scale: ScaleArray, zero_point: ByteArray | None = None
) -> QuantizedTensor:
    """The inverse of ``pack_rows``, of initializers in any of the three operators' shapes; experts come out one below
    the other: [E * N, K]."""
    groups = scale.shape[-1]
    scale = scale.reshape(-1, groups)
    rows = len(scale)
    points = None if zero_point is None else unpack_codes(zero_point.reshape(rows, -1), format.bits, groups)
    return QuantizedTensor(
        qdata=unpack_codes(qdata.reshape(rows, -1), format.bits, groups * format.group_size),
        scale=scale,
        zero_point=points,
        format=format,
    )


def interleave_gate_up(gate: npt.NDArray[Any], up: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """w1 (gate) and w3 (up), both [I, ...], as QMoE's and MoE's fc1 [2I, ...] with ``swiglu_fusion=1``."""
    assert gate.shape == up.shape
    return np.stack([gate, up], axis=1).reshape(-1, *gate.shape[1:])


def split_gate_up(fc1: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The inverse of ``interleave_gate_up``, as views."""
    return fc1[0::2], fc1[1::2]


def unpack_codes(packed: ByteArray, bits: Literal[4, 8], count: int) -> ByteArray:
    """The inverse of ``pack_codes``: the first ``count`` codes of each row."""
    if bits == 8:
        return packed[..., :count]
    pairs = packed.astype("<u2")
    pairs |= pairs << 4
    pairs &= 0x0F0F
    return pairs.view(np.uint8)[..., :count]
