"""``gptq``: the least error of a layer's output, given statistics of its input.

In: a chunk of whole rows and the ``InputStatistics`` of their columns. The grid is ``refit``'s. Columns are rounded one
after the other, those with the largest inputs first, and each makes good what the ones before it have spoilt (GPTQ,
arXiv:2210.17323). Then, twice, group by group: the scale that suits the codes best, and every code once more, with all
others as they are. Neither step can raise the error of a row. Zero points stay what they are.

The error of a row is e H eᵀ for e = weight - stored weight (``hessian``). Rows do not know of each other, so the
result depends on nothing but the row and the statistics.

Shape suffixes: N in_features, R rows, G group_size, S groups of a row. Arrays are turned on their side, a column of the
weight being one line of R numbers: a step over a column is a step over neighbours.
"""

from __future__ import annotations

import numpy as np

from lfm2_export.quant import refit
from lfm2_export.quant.formats import FloatArray
from lfm2_export.quant.groups import Chunk
from lfm2_export.quant.hessian import InputStatistics

# What is gained by another round is below the standard error of the KL (measured on the bundled checkpoints).
ROUNDS = 2
# Of a chunk: its steps are Python's, column by column, and must be long, as threads wait for each other between them:
# with 1 << 20 two threads are 1.2 times as fast as one, with this 1.4 to 1.8 times. Buffers of 16 MB; where a whole row
# is one group, the peak is 11 of them, else 8 (tracemalloc).
CHUNK_WEIGHTS, BUFFERS = 1 << 22, 11
# Columns whose errors are carried on by one product to the columns behind them, which pays the more of them there are;
# and those among them whose errors are carried on one by one, as long as that takes no longer than a product.
_BLOCK, _STRIDE = 128, 16


def quantize_chunk(chunk: Chunk, statistics: InputStatistics) -> None:
    """Quantizes the groups of ``chunk``, which are all groups of some rows.

    Raises:
        UnfitGroupError: a weight is not finite, or a scale overflows.
    """
    refit.quantize_chunk(chunk)
    rows = _Rows(chunk, statistics)
    with np.errstate(over="ignore", invalid="ignore"):
        rows.round_in_order()
        for _ in range(ROUNDS):
            rows.descend()
        rows.store(chunk)


class _Rows:
    """The rows of a chunk on their way: ``steps_NR`` are codes less their zero point, whole numbers."""

    def __init__(self, chunk: Chunk, statistics: InputStatistics):
        self.format, self.statistics = chunk.format, statistics
        self.group_size = chunk.group_size
        self.groups = statistics.in_features // chunk.group_size
        self.weight_NR = _lines(chunk.values_GC, self.groups)
        self.scale_SR = chunk.scale_C.reshape(-1, self.groups).T.copy()
        self.least_SR = -chunk.zero_point_C.reshape(-1, self.groups).T
        self.greatest_SR = self.least_SR + np.float32(chunk.format.greatest_code)
        self.steps_NR = np.empty_like(self.weight_NR)
        self.error_NR = np.empty_like(self.weight_NR)

    def round_in_order(self) -> None:
        """Every column in turn, in activation order."""
        order_N, factor_NN = self.statistics.order_N, self.statistics.factor_NN
        done_NR = np.empty_like(self.weight_NR)  # the errors in that order
        for start in range(0, len(order_N), _BLOCK):
            stop = min(start + _BLOCK, len(order_N))
            owed_BR = factor_NN[:start, start:stop].T @ done_NR[:start]
            for first in range(start, stop, _STRIDE):
                last = min(first + _STRIDE, stop)
                for place in range(first, last):
                    error_R = self._round(order_N[place], owed_BR[place - start])
                    done_NR[place] = error_R
                    owed_BR[place + 1 - start : last - start] += factor_NN[place, place + 1 : last, None] * error_R
                owed_BR[last - start :] += factor_NN[first:last, last:stop].T @ done_NR[first:last]

    def _round(self, column: int, owed_R: FloatArray) -> FloatArray:
        """The error of a column that is rounded with what the earlier ones owe added to it."""
        group = column // self.group_size
        steps_R, error_R = self.steps_NR[column], self.error_NR[column]
        np.add(self.weight_NR[column], owed_R, out=steps_R)
        np.divide(steps_R, self.scale_SR[group], out=steps_R)
        _to_codes(steps_R, self.least_SR[group], self.greatest_SR[group])
        np.multiply(steps_R, self.scale_SR[group], out=error_R)
        return np.subtract(self.weight_NR[column], error_R, out=error_R)

    def descend(self) -> None:
        """One round over all groups: each one's scale, then its codes."""
        size = self.group_size
        span = max(_BLOCK, size)
        for first in range(0, len(self.error_NR), span):
            behind = min(first + span, len(self.error_NR))
            slope_SR = self.statistics.hessian_NN[first:behind] @ self.error_NR
            for start in range(first, behind, size):
                stop = start + size
                columns, rest = slice(start, stop), slice(stop, behind)
                before_GR = self.error_NR[columns].copy()
                self._improve(start // size, columns, slope_SR[start - first : stop - first])
                change_GR = np.subtract(before_GR, self.error_NR[columns], out=before_GR)
                slope_SR[stop - first :] -= self.statistics.hessian_NN[rest, columns] @ change_GR

    def _improve(self, group: int, columns: slice, slope_GR: FloatArray) -> None:
        inner_GG = self.statistics.hessian_NN[columns, columns]
        self._fit_scale(group, columns, slope_GR, inner_GG)
        for start in range(0, self.group_size, _STRIDE):
            self._fit_codes(group, columns, slice(start, start + _STRIDE), slope_GR, inner_GG)

    def _fit_scale(self, group: int, columns: slice, slope_GR: FloatArray, inner_GG: FloatArray) -> None:
        """The stored scale with the least error for the codes, where it has a smaller one than the scale so far."""
        steps_GR, scale_R = self.steps_NR[columns], self.scale_SR[group]
        felt_GR = inner_GG @ steps_GR
        along_R = np.einsum("gr,gr->r", steps_GR, slope_GR)
        square_R = np.einsum("gr,gr->r", steps_GR, felt_GR)
        fitted_R = scale_R + along_R / np.maximum(square_R, np.float32(1e-30))
        change_R = self.format.representable_scale(fitted_R) - scale_R
        gains_R = change_R * (change_R * square_R - 2 * along_R) < 0
        change_R = np.where(gains_R & (fitted_R * scale_R > 0), change_R, np.float32(0))
        scale_R += change_R
        self.error_NR[columns] = self.weight_NR[columns] - scale_R * steps_GR
        slope_GR -= change_R * felt_GR

    def _fit_codes(self, group: int, columns: slice, block: slice, slope_GR: FloatArray, inner_GG: FloatArray) -> None:
        """Coordinate descent on a block of the group: each column's best codes, all else being as it is. Of
        ``slope_GR`` only what is still needed is kept up: the block's column by column, what is behind it at once."""
        scale_R, least_R, greatest_R = self.scale_SR[group], self.least_SR[group], self.greatest_SR[group]
        slope_BR, inner_BB = slope_GR[block], inner_GG[block, block]
        first = columns.start + block.start
        is_last = block.stop >= self.group_size
        before_BR = None if is_last else self.error_NR[first : first + len(slope_BR)].copy()
        for place, column in enumerate(range(first, first + len(slope_BR))):
            steps_R = self.steps_NR[column]
            better_R = slope_BR[place] / (inner_BB[place, place] * scale_R)
            better_R += steps_R
            _to_codes(better_R, least_R, greatest_R)
            change_R = (better_R - steps_R) * scale_R
            self.steps_NR[column] = better_R
            self.error_NR[column] -= change_R
            slope_BR[place + 1 :] -= inner_BB[place + 1 :, place, None] * change_R
        if before_BR is not None:
            change_BR = before_BR - self.error_NR[first : first + len(slope_BR)]
            slope_GR[block.stop :] -= inner_GG[block.stop :, block] @ change_BR

    def store(self, chunk: Chunk) -> None:
        """Puts codes and scales into the chunk; rows whose sums left float32 keep what ``refit`` gave them."""
        sound_R = np.isfinite(np.add.reduce(self.error_NR, axis=0))
        sound_R &= np.isfinite(np.add.reduce(self.scale_SR, axis=0))
        steps = self.steps_NR.reshape(self.groups, self.group_size, -1).transpose(1, 2, 0)
        codes_GRS = chunk.codes_GC.reshape(self.group_size, -1, self.groups)
        np.copyto(codes_GRS, steps - self.least_SR.T, where=sound_R[:, None])
        np.copyto(chunk.scale_C.reshape(-1, self.groups), self.scale_SR.T, where=sound_R[:, None])


def _to_codes(steps_R: FloatArray, least_R: FloatArray, greatest_R: FloatArray) -> None:
    """Rounds in place. ``np.clip`` takes longer on so few numbers (1.2 to 2.8 times)."""
    np.rint(steps_R, out=steps_R)
    np.maximum(steps_R, least_R, out=steps_R)
    np.minimum(steps_R, greatest_R, out=steps_R)


def _lines(values_GC: FloatArray, groups: int) -> FloatArray:
    """A chunk's values [G, R S] as [S G, R]."""
    size = len(values_GC)
    return np.ascontiguousarray(values_GC.reshape(size, -1, groups).transpose(2, 0, 1)).reshape(groups * size, -1)
