"""``refit``: the least squared error that a search over scales finds, without data.

The zero point is rounded first and then left alone; the scale adapts to it. A few scales, from one that cuts the
extremes off to one that has room to spare, each give codes; the best scale for given codes is a least squares
fit. The winner is fitted once more with its new codes, stored, and taken only where it beats plain rounding, group by
group. Fitting scale and minimum first and rounding the zero point afterwards, as onnxruntime's ``k_quant`` does,
costs an eighth more (onnxruntime #32814).

Everything is computed in units of plain rounding's scale, so that no weight is too small or too large to be squared.

Shape suffixes: G group_size, C groups in the chunk (columns).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lfm2_export.quant.formats import FloatArray
from lfm2_export.quant.groups import Chunk, fit_range, write_codes

# How much longer or shorter the grid may get, in its own steps: shorter cuts the extremes off. On Gaussian, Laplace and
# Student-t weights in groups of 32 and 128 this is within 0.5 % of an exhaustive search over scales and zero points.
_STEPS = (1.5, 1.0, 0.5, -0.6, -1.2, -2.0)
# In groups of no more codes a sum of their squares is exact whatever the order, a whole number below 2^24.
_EXACT = 256
# A gain below this share is within the rounding errors of the comparison.
_LEAST_GAIN = np.float32(1e-4)


def quantize_chunk(chunk: Chunk) -> None:
    """Quantizes the groups of ``chunk``.

    Raises:
        UnfitGroupError: a weight is not finite, or a scale overflows.
    """
    rounded_scale_C, chunk.zero_point_C[:] = fit_range(chunk.values_GC, chunk.format)
    values_GC = np.multiply(chunk.values_GC, 1 / rounded_scale_C, out=chunk.scratch_GC[0])
    search = _Search(chunk, values_GC)
    rounding_error_C, ratio_C = search.best_of(1 + step / chunk.format.greatest_code for step in _STEPS)
    ratio_C = search.refit(ratio_C)
    chunk.scale_C[:] = chunk.format.representable_scale(rounded_scale_C * ratio_C)
    rounding_wins_C = search.squared_error(chunk.scale_C / rounded_scale_C) >= rounding_error_C * (1 - _LEAST_GAIN)
    np.copyto(chunk.scale_C, rounded_scale_C, where=rounding_wins_C)
    write_codes(values_GC, chunk.scale_C / rounded_scale_C, chunk)


class _Search:
    """Looks for the scale, in units of plain rounding's, of each column of ``values_GC`` (in the same units)."""

    def __init__(self, chunk: Chunk, values_GC: FloatArray):
        self.values_GC = values_GC
        self.codes_GC, self.product_GC = chunk.codes_GC, chunk.scratch_GC[1]
        self.least_C = -chunk.zero_point_C
        self.greatest_C = chunk.format.greatest_code - chunk.zero_point_C

    def best_of(self, ratios: Iterable[float]) -> tuple[FloatArray, FloatArray]:
        """Plain rounding's squared error, and the least squares scale for the codes of that ratio, 1 or one of
        ``ratios``, whose codes explain most of the values."""
        np.rint(self.values_GC, out=self.codes_GC)
        self._clamp()
        best_C, best_gain_C = self._fit()
        np.subtract(self.values_GC, self.codes_GC, out=self.product_GC)
        rounding_error_C = self._sum_of_squares()
        for ratio in ratios:
            self._encode(ratio)
            fitted_C, gain_C = self._fit()
            best_C = np.where(gain_C > best_gain_C, fitted_C, best_C)
            np.maximum(gain_C, best_gain_C, out=best_gain_C)
        return rounding_error_C, _positive(best_C)

    def refit(self, ratio_C: FloatArray) -> FloatArray:
        """One more round: codes for the scale, then the scale for the codes. The error cannot grow."""
        self._encode(ratio_C)
        return _positive(self._fit()[0])

    def squared_error(self, ratio_C: FloatArray) -> FloatArray:
        self._encode(ratio_C)
        np.multiply(self.codes_GC, ratio_C, out=self.product_GC)
        np.subtract(self.values_GC, self.product_GC, out=self.product_GC)
        return self._sum_of_squares()

    def _fit(self) -> tuple[FloatArray, FloatArray]:
        """The scale of least squared error for the codes, and the squared values that it explains."""
        np.multiply(self.codes_GC, self.values_GC, out=self.product_GC)
        along_C = np.add.reduce(self.product_GC, axis=0)
        square_C = self._squares()
        np.maximum(square_C, np.float32(1e-30), out=square_C)
        fitted_C = np.divide(along_C, square_C, out=square_C)
        return fitted_C, np.multiply(fitted_C, along_C, out=along_C)

    def _squares(self) -> FloatArray:
        """Of the codes, summed; overwrites ``product_GC``."""
        if len(self.codes_GC) <= _EXACT:
            return np.einsum("gc,gc->c", self.codes_GC, self.codes_GC)
        np.multiply(self.codes_GC, self.codes_GC, out=self.product_GC)
        return np.add.reduce(self.product_GC, axis=0)

    def _encode(self, ratio_C: FloatArray | float) -> None:
        np.multiply(self.values_GC, 1 / ratio_C, out=self.codes_GC)
        np.rint(self.codes_GC, out=self.codes_GC)
        self._clamp()

    def _clamp(self) -> None:
        np.maximum(self.codes_GC, self.least_C, out=self.codes_GC)
        np.minimum(self.codes_GC, self.greatest_C, out=self.codes_GC)

    def _sum_of_squares(self) -> FloatArray:
        """Of ``product_GC``, which is overwritten."""
        np.multiply(self.product_GC, self.product_GC, out=self.product_GC)
        return np.add.reduce(self.product_GC, axis=0)


def _positive(ratio_C: FloatArray) -> FloatArray:
    """Plain rounding's scale where no codes explain anything."""
    return np.where(ratio_C > 0, ratio_C, np.float32(1))
