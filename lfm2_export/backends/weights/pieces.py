"""How the work of storing weights is cut up, and where the bytes of each part go.

In: a ``WeightPlan``. Out: ``Piece``s in the order of the work: some rows of a matrix, or what has to be made at once;
and ``Placement``s, the places of a program's tensors in its files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from lfm2_export.backends.weights.plan import StoredWeight, WeightPlan
from lfm2_export.checkpoint import Checkpoint

# Rows are stored in pieces of about this many values: 8 MiB of bf16.
CHUNK_VALUES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where one tensor lies: ``file`` is the index of the file. ``step``: bytes from one entry of its first axis to the
    next where they do not follow one another."""

    file: int
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    step: int | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """The offset after its last byte."""
        return self.offset + (self.nbytes if self.step is None else self._end_of_steps(self.step))

    def _end_of_steps(self, step: int) -> int:
        return (self.shape[0] - 1) * step + self.nbytes // self.shape[0]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Part of a weight: ``rows`` of one checkpoint tensor (None: all), or several tensors whose rows alternate.

    ``first_row``: where they go; the rows of stacked experts are numbered through.
    """

    weight: StoredWeight
    first_row: int
    sources: tuple[str, ...]
    rows: slice | None = None

    @property
    def row_count(self) -> int:
        """Rows of the stored matrix that it makes."""
        return self.weight.shape[-2] if self.rows is None else self.rows.stop - self.rows.start

    @property
    def values(self) -> int:
        """How many values it holds in memory."""
        if self.rows is not None:
            return self.row_count * self.weight.shape[-1]
        return prod(self.weight.shape) * len(self.sources) // len(self.weight.sources)

    def stored_bytes(self, checkpoint: Checkpoint) -> int:
        """How much of the checkpoint it is made of."""
        return sum(checkpoint.tensors[source].rows(self.rows).nbytes for source in self.sources)


def pieces(plan: WeightPlan) -> list[Piece]:
    """Every piece of the weights that have bytes of their own, in the plan's order, which is that of the work."""
    return [piece for weight in plan.values() if weight.same_bytes_as is None for piece in _pieces(weight)]


def _pieces(weight: StoredWeight) -> Iterator[Piece]:
    together = weight.layout.interleaved
    if weight.layout.is_whole or together > 1:
        rows = weight.shape[-2] if together > 1 else 0
        for index, sources in enumerate(zip(*[iter(weight.sources)] * together, strict=True)):
            yield Piece(weight=weight, first_row=index * rows, sources=sources)
        return
    rows, step = weight.shape[-2], max(1, CHUNK_VALUES // weight.shape[-1])
    for index, source in enumerate(weight.sources):
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            yield Piece(weight=weight, first_row=index * rows + start, sources=(source,), rows=part)
