"""The kernels through their C interface, without ExecuTorch's runtime."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import numpy.typing as npt

from lfm2_export.kernels import build

FloatArray = npt.NDArray[np.float32]
_Pointer, _Size = ctypes.c_void_p, ctypes.c_int64


@cache
def library() -> ctypes.CDLL:
    path = build.library_path()
    assert path is not None
    found = ctypes.CDLL(str(path))
    found.lfm2_runnable_kernels.restype = ctypes.POINTER(ctypes.c_char_p)
    found.lfm2_moe_ffn.argtypes = [
        *(ctypes.c_char_p, ctypes.c_int),
        *[_Pointer] * 5,
        *[_Size] * 5,
        *(ctypes.c_int, ctypes.c_float, _Pointer),
    ]
    return found


def runnable_kernels() -> list[str]:
    """Those that this processor runs, fastest first; the last is "scalar"."""
    names = library().lfm2_runnable_kernels()
    found: list[str] = []
    while (name := names[len(found)]) is not None:
        found.append(name.decode())
    return found


def moe_ffn(
    kernels: str,
    x: FloatArray,
    logits: FloatArray,
    expert_bias: FloatArray | None,
    gate_up: npt.NDArray[np.uint8],
    down: npt.NDArray[np.uint8],
    *,
    top_k: int,
    normalize: bool = True,
    scale: float = 1.0,
    threads: int = 1,
) -> FloatArray:
    """x [M, D], logits [M, E] -> [M, D]."""
    out = np.full_like(x, 7.0)
    bias = None if expert_bias is None else expert_bias.ctypes.data
    arrays = [x.ctypes.data, logits.ctypes.data, bias, gate_up.ctypes.data, down.ctypes.data]
    sizes = [*x.shape, down.shape[2] * 32, logits.shape[1], top_k]
    failure = library().lfm2_moe_ffn(kernels.encode(), threads, *arrays, *sizes, normalize, scale, out.ctypes.data)
    assert failure == 0, failure
    return out
