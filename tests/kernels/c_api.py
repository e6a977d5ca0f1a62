"""The kernels through their C interface (``kernels/src/c_api.h``), without a runtime."""

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
UNKNOWN_KERNELS, FAULT, NO_MEMORY = 1, 2, 3
_Size, _Name = ctypes.c_int64, ctypes.c_char_p


class Array(ctypes.Structure):
    """Address and number of elements; null: an optional one that is left out."""

    _fields_ = (("data", ctypes.c_void_p), ("count", _Size))

    @classmethod
    def of(cls, array: npt.NDArray[Any] | None) -> Array:
        return cls(None, 0) if array is None else cls(array.ctypes.data, array.size)


class RowFormat(ctypes.Structure):
    _fields_ = (("bits", ctypes.c_int), ("half_scales", ctypes.c_int), ("group", _Size))


class RowWeights(ctypes.Structure):
    _fields_ = (("codes", Array), ("scales", Array), ("zero_points", Array))


_Weights, _Format = ctypes.POINTER(RowWeights), ctypes.POINTER(RowFormat)


class KernelError(Exception):
    """What a function of the C interface returned, and what it says of it."""

    def __init__(self, code: int, fault: str):
        super().__init__(f"{code} {fault}")
        self.code = code


@cache
def library() -> ctypes.CDLL:
    """ExecuTorch's, for lfm2_moe_ffn."""
    path = build.library_path()
    assert path is not None
    found = _declared(path)
    found.lfm2_moe_ffn.argtypes = [
        *(_Name, ctypes.c_int),
        *[Array] * 5,
        *[_Size] * 5,
        *(ctypes.c_int, ctypes.c_float, Array),
    ]
    return found


@cache
def onnx_library() -> ctypes.CDLL:
    """ONNX Runtime's, for what multiplies with its weights."""
    path = build.onnx_library_path()
    assert path is not None
    found = _declared(path)
    found.lfm2_matmul_nbits.argtypes = [
        *(_Name, ctypes.c_int, Array),
        *(_Weights, _Format, Array),
        *(_Size, _Size, _Size, Array),
    ]
    found.lfm2_feed_forward.argtypes = [
        *(_Name, ctypes.c_int, Array),
        *(_Weights, _Weights, _Weights, _Format),
        *(_Size, _Size, _Size, Array),
    ]
    found.lfm2_sparse_moe_nbits.argtypes = [
        *(_Name, ctypes.c_int, Array, Array, Array),
        *(_Weights, _Weights, _Format),
        *[_Size] * 4,
        *(ctypes.c_int, ctypes.c_float, Array),
    ]
    return found


def _declared(path: Any) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    found.lfm2_runnable_kernels.restype = ctypes.POINTER(ctypes.c_char_p)
    found.lfm2_last_fault.restype = ctypes.c_char_p
    return found


def runnable_kernels() -> list[str]:
    """Those that this processor runs, fastest first; the last is "scalar"."""
    return _names(onnx_library().lfm2_runnable_kernels)


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
    arrays = [Array.of(array) for array in (x, logits, expert_bias, gate_up, down)]
    sizes = [*x.shape, down.shape[2] * 32, logits.shape[1], top_k]
    function = library().lfm2_moe_ffn
    _check(library(), function(kernels.encode(), threads, *arrays, *sizes, normalize, scale, Array.of(out)))
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
        return RowWeights(Array.of(self.codes), Array.of(self.scales), Array.of(self.zero_points))

    def _format(self) -> RowFormat:
        return RowFormat(self.bits, self.half_scales, self.group)


def matmul_nbits(
    kernels: str | None, x: FloatArray, w: RowMatrix, bias: FloatArray | None = None, *, threads: int = 1
) -> FloatArray:
    """x [M, K] times w [N, K], transposed -> [M, N]. ``kernels`` None: those that a program would take."""
    out = np.full((len(x), w.shape[0]), 7.0, np.float32)
    weights = [w._weights(), w._format(), Array.of(bias)]
    name = None if kernels is None else kernels.encode()
    function = onnx_library().lfm2_matmul_nbits
    _check(onnx_library(), function(name, threads, Array.of(x), *weights, len(x), *w.shape, Array.of(out)))
    return out


def feed_forward(
    kernels: str | None, x: FloatArray, gate: RowMatrix, up: RowMatrix, down: RowMatrix, *, threads: int = 1
) -> FloatArray:
    """x [M, D] -> [M, D], by matrices of one format."""
    out = np.full_like(x, 7.0)
    weights = [w._weights() for w in (gate, up, down)]
    sizes = [*x.shape, gate.shape[0]]
    name = None if kernels is None else kernels.encode()
    function = onnx_library().lfm2_feed_forward
    _check(onnx_library(), function(name, threads, Array.of(x), *weights, gate._format(), *sizes, Array.of(out)))
    return out


def sparse_moe_nbits(
    kernels: str | None,
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
    arrays = [Array.of(array) for array in (x, logits, expert_bias)]
    weights = [gate_up._weights(), down._weights(), gate_up._format()]
    sizes = [*x.shape, logits.shape[1], top_k]
    name = None if kernels is None else kernels.encode()
    function = onnx_library().lfm2_sparse_moe_nbits
    _check(onnx_library(), function(name, threads, *arrays, *weights, *sizes, normalize, scale, Array.of(out)))
    return out


def _check(of: ctypes.CDLL, code: int) -> None:
    if code:
        raise KernelError(code, of.lfm2_last_fault().decode() if code == FAULT else "")
