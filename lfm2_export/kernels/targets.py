"""Which instruction set our kernels use on this processor, and what LFM2_KERNELS has to say about it.

In: a built library. Out: names, as ``src/dispatch.cpp`` has them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

from lfm2_export.errors import RunnerError

PLAIN = "scalar"  # without instructions of its own: the reference, and too slow to be chosen
VARIABLE = "LFM2_KERNELS"
WANTED = "x86-64: AVX2 with FMA or more; aarch64: NEON with dot products"


def runnable(library: Path) -> list[str]:
    """The kernels that this processor runs, fastest first, the plain ones last."""
    function = ctypes.CDLL(str(library)).lfm2_runnable_kernels
    function.restype = ctypes.POINTER(ctypes.c_char_p)
    names: list[str] = []
    for name in function():
        if name is None:
            break
        names.append(name.decode())
    return names


def chosen(names: Sequence[str]) -> str:
    """Of what runs here the fastest, or what LFM2_KERNELS names.

    Raises:
        RunnerError: it names something else.
    """
    asked = os.environ.get(VARIABLE)
    if not asked:
        return names[0]
    if asked not in names:
        raise RunnerError(f"{VARIABLE}={asked}: this processor runs {', '.join(names)}; unset it, or name one of them")
    return asked
