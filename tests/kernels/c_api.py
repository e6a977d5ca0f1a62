"""The kernels through their C interface, without a runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2_export.kernels import build

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
WRONG_SIZES = 2
_Pointer, _Size, _Name = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p


class RowFormat(ctypes.Structure):
    _fields_ = (("bits", ctypes.c_int), ("half_scales", ctypes.c_int), ("group", _Size))


class RowWeights(ctypes.Structure):
    _fields_ = (("codes", _Pointer), ("scales", _Pointer), ("zero_points", _Pointer))


_Weights, _Format = ctypes.POINTER(RowWeights), ctypes.POINTER(RowFormat)


class KernelError(Exception):
    """What a function of the C interface returned."""


@cache
def library() -> ctypes.CDLL:
    """ExecuTorch's, for lfm2_moe_ffn."""
    path = build.library_path()
    assert path is not None
    found = ctypes.CDLL(str(path))
    found.lfm2_runnable_kernels.restype = ctypes.POINTER(ctypes.c_char_p)
    found.lfm2_moe_ffn.argtypes = [
        *(_Name, ctypes.c_int),
        *[_Pointer] * 5,
        *[_Size] * 5,
        *(ctypes.c_int, ctypes.c_float, _Pointer),
    ]
    return found


@cache
def onnx_library() -> ctypes.CDLL:
    """ONNX Runtime's, for what multiplies with its weights."""
    path = build.onnx_library_path()
    assert path is not None
    found = ctypes.CDLL(str(path))
    found.lfm2_runnable_row_kernels.restype = ctypes.POINTER(ctypes.c_char_p)
    found.lfm2_matmul_nbits.argtypes = [
        *(_Name, ctypes.c_int, _Pointer),
        *(_Pointer, _Pointer, ctypes.c_int, _Pointer, _Pointer),
        *(_Size, _Size, _Size, ctypes.c_int, _Size, _Pointer),
    ]
    found.lfm2_feed_forward.argtypes = [
        *(_Name, ctypes.c_int, _Pointer),
        *(_Weights, _Weights, _Weights, _Format),
        *(_Size, _Size, _Size, _Pointer),
    ]
    found.lfm2_sparse_moe_nbits.argtypes = [
        *(_Name, ctypes.c_int, _Pointer, _Pointer, _Pointer),
        *(_Weights, _Weights, _Format),
        *[_Size] * 5,
        *(ctypes.c_int, ctypes.c_float, _Pointer),
    ]
    return found


def runnable_kernels() -> list[str]:
    """Those that this processor runs, fastest first; the last is "scalar"."""
    return _names(library().lfm2_runnable_kernels)


def runnable_row_kernels() -> list[str]:
    """The same of those for ONNX Runtime's weights."""
    return _names(onnx_library().lfm2_runnable_row_kernels)


def _names(function: Callable[[], Any]) -> list[str]:
    names = function()
    found: list[str] = []
    while (name := names[len(found)]) is not None:
        found.append(name.decode())
    return found


def moe_ffn(
    kernels: str,
    x: FloatArray,
    logits: FloatArray,
    expert_bias: FloatArray | None,
    gate_up: ByteArray,
    down: ByteArray,
    *,
    top_k: int,
    normalize: bool = True,
    scale: float = 1.0,
    threads: int = 1,
) -> FloatArray:
    """x [M, D], logits [M, E] -> [M, D]."""
    out = np.full_like(x, 7.0)
    arrays = [x.ctypes.data, logits.ctypes.data, _address(expert_bias), gate_up.ctypes.data, down.ctypes.data]
    sizes = [*x.shape, down.shape[2] * 32, logits.shape[1], top_k]
    failure = library().lfm2_moe_ffn(kernels.encode(), threads, *arrays, *sizes, normalize, scale, out.ctypes.data)
    assert failure == 0, failure
    return out


@dataclass(frozen=True, kw_only=True)
class RowMatrix:
    """[N, K] as MatMulNBits stores it: codes uint8 [N, K * bits / 8], scales float32 or float16 [N, K / group].

    ``zero_points``: uint8 [N, ceil(K / group / 2)], two in a byte; None for 8 or 128.
    """

    codes: ByteArray
    scales: npt.NDArray[Any]
    zero_points: ByteArray | None
    bits: int
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.bits

    def rows(self, chosen: slice) -> RowMatrix:
        """Some rows, copied: in memory nothing follows them."""
        points = None if self.zero_points is None else self.zero_points[chosen].copy()
        codes, scales = self.codes[chosen].copy(), self.scales[chosen].copy()
        return RowMatrix(codes=codes, scales=scales, zero_points=points, bits=self.bits, group=self.group)

    @property
    def half_scales(self) -> bool:
        return self.scales.dtype == np.float16

    def _weights(self) -> RowWeights:
        return RowWeights(self.codes.ctypes.data, self.scales.ctypes.data, _address(self.zero_points))

    def _format(self) -> RowFormat:
        return RowFormat(self.bits, self.half_scales, self.group)


def matmul_nbits(
    kernels: str | None, x: FloatArray, w: RowMatrix, bias: FloatArray | None = None, *, threads: int = 1
) -> FloatArray:
    """x [M, K] times w [N, K], transposed -> [M, N]. ``kernels`` None: those that a program would take."""
    out = np.full((len(x), w.shape[0]), 7.0, np.float32)
    weights = [w.codes.ctypes.data, w.scales.ctypes.data, w.half_scales, _address(w.zero_points), _address(bias)]
    sizes = [len(x), *w.shape, w.bits, w.group]
    name = None if kernels is None else kernels.encode()
    _check(onnx_library().lfm2_matmul_nbits(name, threads, x.ctypes.data, *weights, *sizes, out.ctypes.data))
    return out


def feed_forward(
    kernels: str, x: FloatArray, gate: RowMatrix, up: RowMatrix, down: RowMatrix, *, threads: int = 1
) -> FloatArray:
    """x [M, D] -> [M, D], by matrices of one format."""
    out = np.full_like(x, 7.0)
    weights = [ctypes.byref(w._weights()) for w in (gate, up, down)]
    sizes = [*x.shape, gate.shape[0]]
    function = onnx_library().lfm2_feed_forward
    _check(
        function(kernels.encode(), threads, x.ctypes.data, *weights, gate._format(), *sizes, out.ctypes.data),
    )
    return out


def sparse_moe_nbits(
    kernels: str,
    x: FloatArray,
    logits: FloatArray,
    expert_bias: FloatArray | None,
    gate_up: RowMatrix,
    down: RowMatrix,
    *,
    top_k: int,
    normalize: bool = True,
    scale: float = 1.0,
    threads: int = 1,
) -> FloatArray:
    """x [M, D], logits [M, E], gate_up [E * 2 * I, D], down [E * D, I] -> [M, D]."""
    out = np.full_like(x, 7.0)
    arrays = [x.ctypes.data, logits.ctypes.data, _address(expert_bias)]
    weights = [ctypes.byref(gate_up._weights()), ctypes.byref(down._weights()), gate_up._format()]
    sizes = [*x.shape, down.shape[1], logits.shape[1], top_k]
    function = onnx_library().lfm2_sparse_moe_nbits
    _check(function(kernels.encode(), threads, *arrays, *weights, *sizes, normalize, scale, out.ctypes.data))
    return out


def _address(array: npt.NDArray[Any] | None) -> int | None:
    return None if array is None else array.ctypes.data


def _check(failure: int) -> None:
    if failure:
        raise KernelError(failure)
