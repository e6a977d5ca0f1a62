"""Runs an algorithm over a matrix: some thousand groups at a time, in buffers that are used again.

In: rows of a weight as they are stored, and an algorithm's inner function. Out: a ``Chunk`` whose codes, scales and
error a backend takes from there, or the whole ``QuantizedTensor``. The inner function is given the groups turned on
their side, one per column: a sum over a group is then an addition of long vectors, which numpy does ten times faster
than sums of 32 neighbours. numpy releases the interpreter lock inside each pass over a chunk; handing it over costs as
much as a pass over 256 KB, so smaller chunks would keep two threads from working side by side. Twice as large ones take
longer to turn, for their columns no longer fit the cache.

Shape suffixes: G group_size, C groups in the chunk (columns).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2_export.errors import QuantizationError
from lfm2_export.quant.formats import Codes, FloatArray, IntFormat, QuantizedTensor, StorageError
from lfm2_export.resources import usable_cores

CHUNK_WEIGHTS = 1 << 18  # float32: 1 MB a buffer, four buffers a thread


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some groups of a weight. The inner function reads ``values_GC``, may write to ``scratch_GC``, and fills
    ``codes_GC``, ``scale_C`` and ``zero_point_C``: whole numbers, and scales that their stored dtype holds exactly."""

    format: IntFormat
    values_GC: FloatArray
    codes_GC: FloatArray
    scratch_GC: tuple[FloatArray, FloatArray]
    scale_C: FloatArray
    zero_point_C: FloatArray

    @property
    def group_size(self) -> int:
        return len(self.values_GC)

    def storage_error(self) -> StorageError:
        """What storing these groups costs; call it once they are quantized. Overwrites ``scratch_GC``.

        Sums over a row of ``values_GC`` are float32, their sum is float64: six digits, whatever the number of cores.
        """
        difference_GC = np.subtract(self.codes_GC, self.zero_point_C, out=self.scratch_GC[0])
        np.multiply(difference_GC, self.scale_C, out=difference_GC)
        np.subtract(self.values_GC, difference_GC, out=difference_GC)
        return StorageError(
            squared_error=_sum_of_squares(difference_GC),
            squared_weight=_sum_of_squares(self.values_GC),
            greatest_error=float(max(difference_GC.max(), -difference_GC.min())),
        )


def _sum_of_squares(values_GC: FloatArray) -> float:
    with np.errstate(over="ignore"):  # weights above 1e19 have no error to speak of
        return float(np.vecdot(values_GC, values_GC).sum(dtype=np.float64))


QuantizeChunk = Callable[[Chunk], None]


class Scratch:
    """The buffers of one thread. The chunk of one call is overwritten by the next."""

    def __init__(self) -> None:
        self._buffers: list[FloatArray] = []

    def quantize(
        self,
        stored: npt.NDArray[Any],
        format: IntFormat,
        quantize_chunk: QuantizeChunk,
        *,
        fqn: str,
        rows: range | None = None,
    ) -> Chunk:
        """Applies ``quantize_chunk`` to every group of ``stored``, whole rows of a weight [rows, in_features]: float32,
        float16, or bfloat16's bits as uint16. ``rows`` are their numbers in error messages, if not 0, 1, ...

        Raises:
            QuantizationError: names the row of a group that cannot be stored.
        """
        groups = format.groups(stored.shape[1], fqn)
        chunk = self._chunk(format, len(stored) * groups, stored.shape[1] // groups)
        _turn(stored, chunk)
        try:
            quantize_chunk(chunk)
        except UnfitGroupError as error:
            row = error.column // groups
            raise QuantizationError(f"{fqn}: row {row if rows is None else rows[row]} {error}") from None
        return chunk

    def take_over(self, codes: Codes, format: IntFormat) -> Chunk:
        """A chunk of what is quantized already, in the format's groups, its scales finite and exact in the format's
        dtype. Its values are theirs, so it has no error.

        A scale of zero, which no kernel need bear, becomes a small one of zeros.
        """
        chunk = self._chunk(format, codes.scale.size, codes.qdata.size // codes.scale.size)
        is_zero_C = codes.scale.reshape(-1) == 0
        np.copyto(chunk.codes_GC, codes.qdata.reshape(-1, chunk.group_size).T)
        chunk.zero_point_C[:] = format.middle_code if codes.zero_point is None else codes.zero_point.reshape(-1)
        chunk.codes_GC[:, is_zero_C] = chunk.zero_point_C[is_zero_C]
        small_C = format.representable_scale(np.ones_like(chunk.scale_C))
        chunk.scale_C[:] = np.where(is_zero_C, small_C, codes.scale.reshape(-1))
        np.subtract(chunk.codes_GC, chunk.zero_point_C, out=chunk.values_GC)
        np.multiply(chunk.values_GC, chunk.scale_C, out=chunk.values_GC)
        return chunk

    def _chunk(self, format: IntFormat, groups: int, group_size: int) -> Chunk:
        """Contiguous views of the buffers, which grow where they are too small."""
        size = groups * group_size
        if not self._buffers or self._buffers[0].size < size:
            self._buffers = [np.empty(size, np.float32) for _ in range(4)]
        shape = (group_size, groups)
        values_GC, codes_GC, *scratch_GC = (buffer[:size].reshape(shape) for buffer in self._buffers)
        return Chunk(
            format=format,
            values_GC=values_GC,
            codes_GC=codes_GC,
            scratch_GC=(scratch_GC[0], scratch_GC[1]),
            scale_C=np.empty(groups, np.float32),
            zero_point_C=np.empty(groups, np.float32),
        )


def rows_per_chunk(in_features: int) -> int:
    """How many rows of a matrix make a chunk of the best size."""
    return max(1, CHUNK_WEIGHTS // max(1, in_features))


def _turn(stored: npt.NDArray[Any], chunk: Chunk) -> None:
    """Fills ``values_GC``."""
    groups = stored.reshape(-1, chunk.group_size)
    if stored.dtype != np.uint16:
        np.copyto(chunk.values_GC, groups.T)
        return
    # Turning is what costs: pairs of bfloat16 are half as many numbers. The earlier one is the lower half.
    pairs = chunk.scratch_GC[0][: len(chunk.values_GC) // 2].view(np.uint32)
    np.copyto(pairs, groups.view("<u4").T)
    bits_GC = chunk.values_GC.view(np.uint32)
    np.left_shift(pairs, 16, out=bits_GC[0::2])
    np.bitwise_and(pairs, 0xFFFF0000, out=bits_GC[1::2])


def quantize_in_chunks(
    weight: FloatArray, format: IntFormat, quantize_chunk: QuantizeChunk, *, fqn: str, threads: int | None
) -> QuantizedTensor:
    """Applies ``quantize_chunk`` to every group of ``weight`` [rows, in_features], in threads."""
    if weight.ndim != 2:
        raise QuantizationError(f"{fqn}: has shape {list(weight.shape)}; only a matrix can be quantized in groups")
    workers = threads or usable_cores()
    out = empty_tensor((weight.shape[0], weight.shape[1]), format, fqn=fqn)
    step = _rows_per_worker(weight.shape, workers)
    starts = range(0, len(weight), step)
    scratches: SimpleQueue[Scratch] = SimpleQueue()
    for _ in range(min(workers, len(starts))):
        scratches.put(Scratch())

    def run(start: int) -> None:
        rows = range(start, min(start + step, len(weight)))
        values = np.ascontiguousarray(weight[start : rows.stop], np.float32)
        scratch = scratches.get()
        try:
            chunk = scratch.quantize(values, format, quantize_chunk, fqn=fqn, rows=rows)
            store_chunk(chunk, out.rows(slice(start, rows.stop)))
        finally:
            scratches.put(scratch)

    _run_in_threads(run, starts, workers)
    return out


class UnfitGroupError(ValueError):
    """The group in ``column`` of a chunk cannot be stored; the message goes on after the row's number."""

    def __init__(self, column: int, message: str):
        super().__init__(message)
        self.column = column


def fit_range(values_GC: FloatArray, format: IntFormat) -> tuple[FloatArray, FloatArray]:
    """Scale and zero point per column that cover its least and greatest value and zero; as they will be stored.

    The zero point is the ROUNDED place of zero on the grid of the stored scale: codes must be computed with it, or the
    error of rounding it is added to every weight.

    Raises:
        UnfitGroupError: a value is not finite, or the scale is beyond what its dtype holds.
    """
    least_C = np.minimum(np.minimum.reduce(values_GC, axis=0), np.float32(0))
    greatest_C = np.maximum(np.maximum.reduce(values_GC, axis=0), np.float32(0))
    if format.symmetric:
        exact_C = _symmetric_scale(least_C, greatest_C, format)
    else:  # two divisions: the difference itself may overflow
        exact_C = greatest_C / np.float32(format.greatest_code) - least_C / np.float32(format.greatest_code)
    _check_fits(exact_C, least_C, greatest_C, format)
    scale_C = format.representable_scale(exact_C)
    if format.symmetric:
        return scale_C, np.full_like(scale_C, format.middle_code)
    return scale_C, np.clip(np.rint(-least_C / scale_C), 0, format.greatest_code, dtype=np.float32)


def write_codes(values_GC: FloatArray, scale_C: FloatArray, chunk: Chunk) -> None:
    """Fills ``chunk.codes_GC`` with the points of the grid that are nearest to ``values_GC`` over ``scale_C``."""
    codes_GC = np.multiply(values_GC, 1 / scale_C, out=chunk.codes_GC)
    np.rint(codes_GC, out=codes_GC)
    np.add(codes_GC, chunk.zero_point_C, out=codes_GC)
    np.clip(codes_GC, 0, chunk.format.greatest_code, out=codes_GC)


def _symmetric_scale(least_C: FloatArray, greatest_C: FloatArray, format: IntFormat) -> FloatArray:
    longer, shorter = np.float32(format.middle_code), np.float32(format.middle_code - 1)
    if format.signed_scale:
        return np.divide(np.where(greatest_C > -least_C, -greatest_C, -least_C), longer)
    return np.maximum(greatest_C / shorter, -least_C / longer)


def _check_fits(scale_C: FloatArray, least_C: FloatArray, greatest_C: FloatArray, format: IntFormat) -> None:
    finite = np.isfinite(least_C) & np.isfinite(greatest_C)
    if not finite.all():
        raise UnfitGroupError(int(np.argmin(finite)), "holds NaN or infinity; the checkpoint is damaged")
    worst = int(np.argmax(np.abs(scale_C)))
    if abs(scale_C[worst]) > format.greatest_scale:
        raise UnfitGroupError(
            worst,
            f"needs a scale of {abs(scale_C[worst]):.6g}, above the {format.greatest_scale:.6g} of "
            f"{format.scale_dtype}; use float32 scales or exclude this layer",
        )


def empty_tensor(shape: tuple[int, int], format: IntFormat, *, fqn: str = "weight") -> QuantizedTensor:
    """Room for a matrix [rows, in_features], to be filled by ``store_chunk``.

    Raises:
        QuantizationError: the width does not fit the group size.
    """
    rows, groups = shape[0], format.groups(shape[1], fqn)
    scale_dtype = np.float16 if format.scale_dtype == "float16" else np.float32
    return QuantizedTensor(
        qdata=np.empty(shape, np.uint8),
        scale=np.empty((rows, groups), scale_dtype),
        zero_point=None if format.symmetric else np.empty((rows, groups), np.uint8),
        format=format,
    )


def store_chunk(chunk: Chunk, out: QuantizedTensor) -> None:
    """Puts a chunk into the rows that it is made of."""
    np.copyto(out.qdata.reshape(-1, chunk.group_size), chunk.codes_GC.T, casting="unsafe")
    out.scale[...] = chunk.scale_C.reshape(out.scale.shape)
    if out.zero_point is not None:
        np.copyto(out.zero_point, chunk.zero_point_C.reshape(out.scale.shape), casting="unsafe")


def _rows_per_worker(shape: tuple[int, ...], workers: int) -> int:
    """Rows per chunk, so that every worker has as many chunks as the others."""
    rows, in_features = shape
    chunks = -(-rows // rows_per_chunk(in_features))
    chunks = max(1, -(-chunks // workers) * workers if chunks > 1 else chunks)
    return max(1, -(-rows // chunks))


def _run_in_threads(run: Callable[[int], None], starts: range, workers: int) -> None:
    if workers == 1 or len(starts) < 2:
        for start in starts:
            run(start)
        return
    with ThreadPoolExecutor(min(workers, len(starts))) as pool:
        for _ in pool.map(run, starts):
            pass
