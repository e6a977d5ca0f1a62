"""What errors of a matrix do, by statistics of the inputs: the second-order estimate trace(dW H dWᵀ) of what becomes of
its outputs, as a share of the residual stream.

In: a checkpoint and its ``Statistics``. Out: ``Evidence`` for ``estimate``, where the weights are fitted by ``gptq``.
By itself that trace says little (Spearman's rank correlation with the measured KL of quantizing one unit alone: -0.1,
0.7, 0.8 and 0.6 on four trained models), since outputs of a size do more where the stream is small. Over the outputs'
energy, times the block's share of the stream and a factor for the class of matrix that was fitted to the other three
models, it ranks as a measurement does (``benchmarks/sensitivity.py``, figures in ``prior.py``).
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from lfm2_export.backends.weights.plan import StoredWeight
from lfm2_export.calibration.statistics import Statistics
from lfm2_export.checkpoint import Checkpoint
from lfm2_export.mixing.estimate import share_of, sources_to_look_at
from lfm2_export.mixing.prior import INFORMED_PRIOR, weight_of
from lfm2_export.mixing.shares import Shares, block_shares, some_rows
from lfm2_export.quant.hessian import energy, energy_of_rounding

# A figure's, so that those of two machines, whose models differ in the last bits, are the same.
_DIGITS = 3
_ROWS = 256


class Informed:
    """Evidence of a checkpoint with statistics. Methods raise what ``Statistics.hessian`` does."""

    def __init__(self, checkpoint: Checkpoint, statistics: Statistics):
        self._checkpoint, self._statistics = checkpoint, statistics
        self._roundings: dict[str, float] = {}

    @cached_property
    def _shares(self) -> Shares:
        return block_shares(self._checkpoint, self._statistics)

    def sensitivity(self, weight: StoredWeight) -> float:
        prior, share = weight_of(INFORMED_PRIOR, weight.part, weight.matrix), share_of(weight, self._shares)
        return float(f"{prior * share * self.growth_of(weight):.{_DIGITS - 1}e}")

    def growth_of(self, weight: StoredWeight) -> float:
        """The relative squared error of a weight's outputs over that of its values."""
        sources = sources_to_look_at(self._checkpoint, weight)
        return sum(self._growth(source, weight.multiplied(source)) for source in sources) / len(sources)

    def _growth(self, source: str, multiplied: str) -> float:
        if not self._statistics.has(multiplied):
            return 1.0  # it is looked up
        rows_RN, hessian = some_rows(self._checkpoint, source, _ROWS), self._statistics.hessian(multiplied)
        outputs = energy(rows_RN, hessian)
        rounding = self._rounding(multiplied, hessian)
        return float(np.square(rows_RN, dtype=np.float64).sum()) * rounding / outputs if outputs else 1.0

    def _rounding(self, source: str, hessian: np.ndarray) -> float:
        """``energy_of_rounding``, once for all weights that share an input."""
        name = self._statistics.input_of(source)
        if name not in self._roundings:
            self._roundings[name] = energy_of_rounding(hessian, name=name)
        return self._roundings[name]
