"""How far the weights that an artifact holds are from the checkpoint's, whatever its exporter says of them.

In: the two as weight sources. Out: the artifact's, to load a model from, and as they are read, the relative error of
every row. Hop 2 has what was stored on both sides, so a weight that was stored wrongly shows here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lfm2_export.config import ModelConfig
from lfm2_export.families import Family
from lfm2_export.families.tensors import EMBEDDING, HEAD
from lfm2_export.models.loading import WeightSource
from lfm2_export.parity.control import Perturbation
from lfm2_export.parity.figures import WEIGHT_ERROR, Control, Figure

# Root of a row's squared error over its squared weights. int4 in groups of 32 leaves 0.08 of normally distributed
# weights and 0.15 of any at worst; a zero point or a scale that belongs elsewhere leaves several times the tolerance.
TOLERANCES = {"int4": 0.3, "int8": 0.02, "float16": 1e-3, "float32": 0.0}
# Of the rows' usual size.
_LEAST_ROW = 0.01


@dataclass(frozen=True, kw_only=True)
class RowError:
    """The relative error of one row (of a vector as a whole: row 0)."""

    error: float
    name: str
    row: int


class ComparedWeights:
    """``stored`` as a ``WeightSource`` that compares all that is read with ``original``.

    ``stored.tensors`` must also say each tensor's ``dtype``: float32, float16, int8 or int4.
    """

    def __init__(self, stored: WeightSource, original: WeightSource):
        self._stored, self._original = stored, original
        self._worst: dict[str, RowError] = {}

    @property
    def config(self) -> ModelConfig:
        return self._stored.config

    @property
    def family(self) -> Family:
        return self._stored.family

    @property
    def tensors(self) -> Mapping[str, Any]:
        return self._stored.tensors

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        values = self._stored.read(name, rows)
        errors = relative_errors(values, self._original.read(self._published(name), rows))
        worst = int(errors.argmax())
        first = rows.indices(self.tensors[name].shape[0])[0] if rows and values.ndim > 1 else 0
        found = RowError(error=float(errors[worst]), name=name, row=first + worst)
        dtype = self.tensors[name].dtype
        # NaN compares false: it stays once it is there, and it is never hidden by a number.
        if dtype not in self._worst or not found.error <= self._worst[dtype].error:
            self._worst[dtype] = found
        return values

    def _published(self, name: str) -> str:
        """The checkpoint's name: a program may store a tied head as a table of its own."""
        return EMBEDDING if name == HEAD and name not in self._original.tensors else name

    def worst(self) -> dict[str, RowError]:
        """The row with the largest error of each dtype, among all that was read."""
        return self._worst

    def figures(self) -> list[Figure]:
        return [
            Figure(
                name=f"{dtype} weights, worst in row {worst.row} of {worst.name}",
                measure=WEIGHT_ERROR,
                value=worst.error,
                tolerance=TOLERANCES[dtype],
            )
            for dtype, worst in sorted(self._worst.items())
        ]

    def control(self, perturbation: Perturbation) -> Control:
        """The comparison of one row that is off on purpose, by the least step that is noticed."""
        rows = slice(perturbation.row or 0, (perturbation.row or 0) + 1)
        stored = self._stored.read(perturbation.name, rows)
        original = self._original.read(self._published(perturbation.name), rows)
        for step in perturbation.steps:
            control = Control(
                change=perturbation.describe(step),
                measure=WEIGHT_ERROR,
                value=float(relative_errors(stored * np.float32(1 + step), original).max()),
                tolerance=TOLERANCES[self.tensors[perturbation.name].dtype],
            )
            if control.noticed:
                break
        return control


def relative_errors(values: np.ndarray, original: np.ndarray) -> np.ndarray:
    """Of each row; a vector is one row. Rows far smaller than the others are measured by these: what float16 rounds to
    nothing there matters to nobody."""
    shape = (1, -1) if original.ndim == 1 else (len(original), -1)
    difference = np.subtract(values, original, dtype=np.float64).reshape(shape)
    error = np.einsum("rc,rc->r", difference, difference)
    weight = np.einsum("rc,rc->r", original.reshape(shape), original.reshape(shape), dtype=np.float64)
    weight = np.maximum(weight, _LEAST_ROW**2 * weight.mean())
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0.0, 0.0, np.sqrt(error / weight))
