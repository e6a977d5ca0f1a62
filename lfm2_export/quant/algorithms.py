"""The quantization algorithms by name; each is one file of this package, and its inner function works on one chunk: of
the weight alone, or with statistics of the weight's input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from lfm2_export.errors import QuantizationError
from lfm2_export.quant import gptq, refit, round_to_nearest
from lfm2_export.quant.formats import FloatArray, IntFormat, QuantizedTensor
from lfm2_export.quant.groups import CHUNK_WEIGHTS, Chunk, QuantizeChunk, Scratch, quantize_in_chunks
from lfm2_export.quant.hessian import InputStatistics

QuantizeFitted = Callable[[Chunk, InputStatistics], None]


@dataclass(frozen=True)
class Algorithm:
    """Quantizes a whole weight where it is called, or rows of one for backends that take it apart at once.

    ``needs_statistics``: it is one only once it is ``fitted`` to those of a weight's input.
    """

    _quantize_chunk: QuantizeChunk
    _quantize_fitted: QuantizeFitted | None = None
    _chunk_weights: int = CHUNK_WEIGHTS

    @property
    def needs_statistics(self) -> bool:
        return self._quantize_fitted is not None

    def fitted(self, statistics: InputStatistics | None) -> Algorithm:
        """The algorithm for weights with such an input; ``refit``'s where there is none: a token table's rows are
        looked up, not multiplied. One that needs no statistics stays what it is."""
        if self._quantize_fitted is None:
            return self
        if statistics is None:
            return ALGORITHMS[DEFAULT_ALGORITHM]
        return Algorithm(_Fitted(self._quantize_fitted, statistics), _chunk_weights=self._chunk_weights)

    def rows_per_chunk(self, in_features: int) -> int:
        """How many rows of a matrix are best quantized at once."""
        return max(1, self._chunk_weights // max(1, in_features))

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

    def rows(self, stored: npt.NDArray[Any], format: IntFormat, scratch: Scratch, *, fqn: str, rows: range) -> Chunk:
        """Some rows of a weight, in the buffers of ``scratch``.

        Args:
            stored: as in a checkpoint: float32, float16, or bfloat16's bits as uint16.
            rows: the numbers by which errors name them.

        Raises:
            QuantizationError: as for a whole weight.
        """
        return scratch.quantize(stored, format, self._quantize_chunk, fqn=fqn, rows=rows)


@dataclass(frozen=True)
class _Fitted:
    quantize: QuantizeFitted
    statistics: InputStatistics

    def __call__(self, chunk: Chunk) -> None:
        self.quantize(chunk, self.statistics)


def _without_statistics(chunk: Chunk) -> None:
    raise QuantizationError(
        "algorithm gptq needs statistics of the layers' inputs; pass --calibrate default, or --statistics FILE"
    )


ALGORITHMS: dict[str, Algorithm] = {
    "gptq": Algorithm(_without_statistics, gptq.quantize_chunk, gptq.CHUNK_WEIGHTS),
    "refit": Algorithm(refit.quantize_chunk),
    "round": Algorithm(round_to_nearest.quantize_chunk),
}
DEFAULT_ALGORITHM, CALIBRATED_ALGORITHM = "refit", "gptq"


def get_algorithm(name: str) -> Algorithm:
    """The algorithm of that name.

    Raises:
        QuantizationError: there is none of that name; the message lists those that are.
    """
    if name not in ALGORITHMS:
        raise QuantizationError(f"algorithm {name!r} is unknown; known algorithms: {', '.join(sorted(ALGORITHMS))}")
    return ALGORITHMS[name]
