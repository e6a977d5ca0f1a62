"""The quantization algorithms by name; each is one file of this package, and its inner function works on one chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from lfm2_export.errors import QuantizationError
from lfm2_export.quant import refit, round_to_nearest
from lfm2_export.quant.formats import FloatArray, IntFormat, QuantizedTensor
from lfm2_export.quant.groups import Chunk, QuantizeChunk, Workspace, quantize_in_chunks


@dataclass(frozen=True)
class Algorithm:
    """Quantizes a whole weight where it is called, or rows of one for backends that take it apart at once."""

    _quantize_chunk: QuantizeChunk

    def __call__(
        self, weight: FloatArray, format: IntFormat, *, fqn: str = "weight", threads: int | None = None
    ) -> QuantizedTensor:
        """``weight`` float32 [rows, in_features] in ``format``; ``fqn`` names it in errors.

        Args:
            threads: None takes every usable core.

        Raises:
            QuantizationError: the width does not fit the group size, a weight is not finite, or a scale overflows.
        """
        return quantize_in_chunks(weight, format, self._quantize_chunk, fqn=fqn, threads=threads)

    def rows(
        self, stored: npt.NDArray[Any], format: IntFormat, workspace: Workspace, *, fqn: str, rows: range
    ) -> Chunk:
        """Some rows of a weight, in the buffers of ``workspace``.

        Args:
            stored: as in a checkpoint: float32, float16, or bfloat16's bits as uint16.
            rows: the numbers by which errors name them.

        Raises:
            QuantizationError: as for a whole weight.
        """
        return workspace.quantize(stored, format, self._quantize_chunk, fqn=fqn, rows=rows)


ALGORITHMS: dict[str, Algorithm] = {
    "refit": Algorithm(refit.quantize_chunk),
    "round": Algorithm(round_to_nearest.quantize_chunk),
}
DEFAULT_ALGORITHM = "refit"


def get_algorithm(name: str) -> Algorithm:
    """The algorithm of that name.

    Raises:
        QuantizationError: there is none of that name; the message lists those that are.
    """
    if name not in ALGORITHMS:
        raise QuantizationError(f"algorithm {name!r} is unknown; known algorithms: {', '.join(sorted(ALGORITHMS))}")
    return ALGORITHMS[name]
