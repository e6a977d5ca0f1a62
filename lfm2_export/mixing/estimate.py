"""What each format of each unit will cost the model, estimated matrix by matrix.

In: a checkpoint, the units of its plan, and ``Evidence`` of what errors do: the weights alone (``WithoutData``), or
statistics (``informed``). Out: damages by unit and format: the relative squared error of a matrix, times what such an
error does there. Rows are sampled, so that the largest models take seconds. No sum depends on a processor's vector
width: every machine finds the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from lfm2_export.backends.weights.plan import StoredWeight
from lfm2_export.background import map_in_threads
from lfm2_export.checkpoint import Checkpoint, check_finite, is_finite
from lfm2_export.errors import QuantizationError
from lfm2_export.families.tensors import in_feed_forward
from lfm2_export.mixing.prior import PRIOR, weight_of
from lfm2_export.mixing.shares import Block, Shares, block_shares
from lfm2_export.mixing.units import Space, UnitShape
from lfm2_export.quant.algorithms import Algorithm
from lfm2_export.quant.formats import IntFormat
from lfm2_export.quant.groups import Scratch
from lfm2_export.resources import usable_cores

Damages = dict[str, dict[IntFormat, float]]


# Weights of a matrix that are looked at, in so many places of it; and experts of a layer.
_SAMPLED, _PLACES, _EXPERTS = 1 << 15, 4, 4


class Evidence(Protocol):
    """What errors of a matrix do."""

    def sensitivity(self, weight: StoredWeight) -> float:
        """The damage of a relative squared error of 1; only ratios mean something."""


class WithoutData:
    """By the class of a matrix (``prior``), and how much of the stream its block makes (``shares``).

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
    """

    def __init__(self, checkpoint: Checkpoint):
        self._shares = block_shares(checkpoint)

    def sensitivity(self, weight: StoredWeight) -> float:
        return weight_of(PRIOR, weight.part, weight.matrix) * share_of(weight, self._shares)


def estimate_damages(checkpoint: Checkpoint, space: Space, algorithm: Algorithm, evidence: Evidence) -> Damages:
    """The damage of every format of every unit, by the unit's name; only ratios mean something.

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
    """
    found = map_in_threads(lambda unit: _errors(checkpoint, unit, algorithm), space.units, threads=usable_cores())
    return {unit.name: _damages(unit, errors, evidence) for unit, errors in found}


def _errors(checkpoint: Checkpoint, unit: UnitShape, algorithm: Algorithm) -> list[dict[IntFormat, float]]:
    return [relative_errors(checkpoint, unit, weight, algorithm) for weight in unit.weights]


def _damages(
    unit: UnitShape, errors: Sequence[Mapping[IntFormat, float]], evidence: Evidence
) -> dict[IntFormat, float]:
    factors = [evidence.sensitivity(weight) for weight in unit.weights]
    return {form: sum(factor * one[form] for factor, one in zip(factors, errors, strict=True)) for form in unit.formats}


def relative_errors(
    checkpoint: Checkpoint, unit: UnitShape, weight: StoredWeight, algorithm: Algorithm
) -> dict[IntFormat, float]:
    """Of a weight of the unit, quantized: squared error over squared size, of what was sampled."""
    scratch = Scratch()
    errors = {form: np.zeros(2) for form in unit.formats}
    for name, values in _samples(checkpoint, weight):
        for form in unit.formats:
            try:
                errors[form] += squared_error(values, form, algorithm, scratch, fqn=name)
            except QuantizationError:  # does not fit; the export names it where no other format is chosen
                errors[form] += np.inf
    return {form: _ratio(lost, energy) for form, (lost, energy) in errors.items()}


def _ratio(lost: float, energy: float) -> float:
    """1, all is lost, where a format does not fit."""
    if not math.isfinite(energy):
        return 1.0
    return float(lost / energy) if energy else 0.0


def share_of(weight: StoredWeight, shares: Shares) -> float:
    """Of the stream that a weight's block makes; 1 of what belongs to no layer."""
    return 1.0 if weight.layer is None else shares[Block(weight.layer, in_feed_forward(weight.part))]


def sources_to_look_at(checkpoint: Checkpoint, weight: StoredWeight) -> list[str]:
    """A weight's sources; of experts those of some."""
    tensors = [checkpoint.model_tensors[source] for source in weight.sources]
    looked_at = set(_spread(sorted({one.expert for one in tensors if one.expert is not None}), _EXPERTS))
    return [one.name for one in tensors if one.expert is None or one.expert in looked_at]


def _samples(checkpoint: Checkpoint, weight: StoredWeight) -> Iterator[tuple[str, np.ndarray]]:
    """Rows of a weight's sources, as they are stored."""
    for source in sources_to_look_at(checkpoint, weight):
        rows, columns = checkpoint.model_tensors[source].shape
        each = max(1, _SAMPLED // columns // _PLACES)
        starts = (
            range(0, rows, each)
            if each * _PLACES >= rows
            else range(0, rows - each + 1, (rows - each) // (_PLACES - 1))
        )
        for start in starts:
            for values in checkpoint.read_raw_blocks(source, slice(start, min(start + each, rows)), each):
                if not is_finite(values):
                    check_finite(source, checkpoint.read(source))
                yield source, values


def _spread(items: Sequence[int], count: int) -> list[int]:
    if len(items) <= count:
        return list(items)
    return [items[index * (len(items) - 1) // (count - 1)] for index in range(count)]


def squared_error(
    values: np.ndarray, form: IntFormat, algorithm: Algorithm, scratch: Scratch, *, fqn: str
) -> np.ndarray:
    """Float64 [2]: the squared error of quantizing ``values`` (rows as they are stored), and their squared size."""
    chunk = algorithm.rows(values, form, scratch, fqn=fqn, rows=range(len(values)))
    difference_GC = (chunk.codes_GC - chunk.zero_point_C) * chunk.scale_C - chunk.values_GC
    return np.array([_sum_of_squares(difference_GC), _sum_of_squares(chunk.values_GC)])


def _sum_of_squares(values_GC: np.ndarray) -> float:
    """In one order on every machine: rows are added to rows, then halves to halves."""
    sums_C = np.zeros(values_GC.shape[1], np.float64)
    for row_C in values_GC:
        sums_C += np.square(row_C, dtype=np.float64)
    while len(sums_C) > 1:
        half = len(sums_C) // 2
        rest_C = sums_C[2 * half :]
        sums_C = sums_C[:half] + sums_C[half : 2 * half]
        if len(rest_C):
            sums_C[0] += rest_C[0]
    return float(sums_C[0])
