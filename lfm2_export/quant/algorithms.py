"""The quantization algorithms by name; each is one file of this package.

All share one signature, ``quantize(weight, format, *, fqn, threads) -> QuantizedTensor``, so that one may replace
another, or be replaced by a compiled one.
"""

from __future__ import annotations

from typing import Protocol

from lfm2_export.errors import QuantizationError
from lfm2_export.quant import refit, round_to_nearest
from lfm2_export.quant.formats import FloatArray, IntFormat, QuantizedTensor


class Algorithm(Protocol):
    """``weight`` float32 [rows, in_features]; ``fqn`` names it in errors; ``threads`` None takes every usable core."""

    def __call__(
        self, weight: FloatArray, format: IntFormat, *, fqn: str = ..., threads: int | None = ...
    ) -> QuantizedTensor: ...


ALGORITHMS: dict[str, Algorithm] = {"refit": refit.quantize, "round": round_to_nearest.quantize}
DEFAULT_ALGORITHM = "refit"


def get_algorithm(name: str) -> Algorithm:
    """The algorithm's ``quantize``.

    Raises:
        QuantizationError: there is none of that name; the message lists those that are.
    """
    if name not in ALGORITHMS:
        raise QuantizationError(f"algorithm {name!r} is unknown; known algorithms: {', '.join(sorted(ALGORITHMS))}")
    return ALGORITHMS[name]
