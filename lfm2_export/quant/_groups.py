"""Runs an algorithm over a matrix: some thousand groups at a time, in threads, in buffers that are used again.

In: a weight [rows, in_features] and an algorithm's inner function. Out: the ``QuantizedTensor``. The inner function is
given chunks of groups turned on their side, one group per column: a sum over a group is then an addition of long
vectors, which numpy does ten times faster than sums of 32 neighbours. numpy releases the interpreter lock inside each
pass over a chunk. Handing it over costs as much as a pass over 256 KB, so that two threads on chunks of that size are
slower than one; with 2 MB they are 1.5 to 2 times as fast, and all buffers still fit the L3 cache.

Shape suffixes: G group_size, C groups in the chunk (columns).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np

from lfm2_export.errors import QuantizationError
from lfm2_export.quant.formats import ByteArray, FloatArray, IntFormat, QuantizedTensor
from lfm2_export.resources import usable_cores

_CHUNK_WEIGHTS = 1 << 19  # float32: 2 MB a buffer, three buffers a thread


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """``values_GC`` may be overwritten. The inner function fills ``codes_GC``, ``scale_C`` and ``zero_point_C``; these
    two are float32 numbers that their stored dtypes hold exactly."""

    format: IntFormat
    values_GC: FloatArray
    scratch_GC: tuple[FloatArray, FloatArray]
    codes_GC: ByteArray
    scale_C: FloatArray
    zero_point_C: FloatArray

    def columns(self, count: int) -> Chunk:
        """The first ``count`` columns."""
        return Chunk(
            format=self.format,
            values_GC=self.values_GC[:, :count],
            scratch_GC=(self.scratch_GC[0][:, :count], self.scratch_GC[1][:, :count]),
            codes_GC=self.codes_GC[:, :count],
            scale_C=self.scale_C[:count],
            zero_point_C=self.zero_point_C[:count],
        )


QuantizeChunk = Callable[[Chunk], None]


def quantize_in_chunks(
    weight: FloatArray, format: IntFormat, quantize_chunk: QuantizeChunk, *, fqn: str, threads: int | None
) -> QuantizedTensor:
    """Applies ``quantize_chunk`` to every group of ``weight`` [rows, in_features]."""
    if weight.ndim != 2:
        raise QuantizationError(f"{fqn}: has shape {list(weight.shape)}; only a matrix can be quantized in groups")
    workers = threads or usable_cores()
    out = _empty(weight.shape[0], format.groups(weight.shape[1], fqn), format)
    values = np.ascontiguousarray(weight, np.float32).reshape(-1, format.group_size)
    step = _chunk_length(len(values), format.group_size, workers)
    starts = range(0, len(values), step)
    buffers: SimpleQueue[Chunk] = SimpleQueue()
    for _ in range(min(workers, len(starts))):
        buffers.put(_new_chunk(format, step))

    def run(start: int) -> None:
        part = slice(start, min(start + step, len(values)))
        buffer = buffers.get()
        try:
            chunk = buffer.columns(part.stop - start)
            np.copyto(chunk.values_GC, values[part].T)
            quantize_chunk(chunk)
            _store(chunk, out, part)
        except UnfitGroupError as error:
            row = (start + error.column) // out.scale.shape[1]
            raise QuantizationError(f"{fqn}: row {row} {error}") from None
        finally:
            buffers.put(buffer)

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


def write_codes(scaled_GC: FloatArray, chunk: Chunk) -> None:
    """Rounds ``scaled_GC`` (values over scale; overwritten) to the grid and fills ``chunk.codes_GC``."""
    np.rint(scaled_GC, out=scaled_GC)
    np.add(scaled_GC, chunk.zero_point_C, out=scaled_GC)
    np.clip(scaled_GC, 0, chunk.format.greatest_code, out=scaled_GC)
    np.copyto(chunk.codes_GC, scaled_GC, casting="unsafe")


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


def _empty(rows: int, groups: int, format: IntFormat) -> QuantizedTensor:
    scale_dtype = np.float16 if format.scale_dtype == "float16" else np.float32
    return QuantizedTensor(
        qdata=np.empty((rows, groups * format.group_size), np.uint8),
        scale=np.empty((rows, groups), scale_dtype),
        zero_point=None if format.symmetric else np.empty((rows, groups), np.uint8),
        format=format,
    )


def _store(chunk: Chunk, out: QuantizedTensor, part: slice) -> None:
    """Puts the chunk's columns where groups ``part`` of the whole tensor belong."""
    np.copyto(out.qdata.reshape(-1, chunk.format.group_size)[part], chunk.codes_GC.T)
    out.scale.reshape(-1)[part] = chunk.scale_C
    if out.zero_point is not None:
        np.copyto(out.zero_point.reshape(-1)[part], chunk.zero_point_C, casting="unsafe")


def _new_chunk(format: IntFormat, columns: int) -> Chunk:
    shape = (format.group_size, columns)
    return Chunk(
        format=format,
        values_GC=np.empty(shape, np.float32),
        scratch_GC=(np.empty(shape, np.float32), np.empty(shape, np.float32)),
        codes_GC=np.empty(shape, np.uint8),
        scale_C=np.empty(columns, np.float32),
        zero_point_C=np.empty(columns, np.float32),
    )


def _chunk_length(groups: int, group_size: int, workers: int) -> int:
    """Groups per chunk, so that every worker has as many chunks as the others."""
    chunks = -(-groups * group_size // _CHUNK_WEIGHTS)
    chunks = max(1, -(-chunks // workers) * workers if chunks > 1 else chunks)
    return max(1, -(-groups // chunks))


def _run_in_threads(run: Callable[[int], None], starts: range, workers: int) -> None:
    if workers == 1 or len(starts) < 2:
        for start in starts:
            run(start)
        return
    with ThreadPoolExecutor(min(workers, len(starts))) as pool:
        for _ in pool.map(run, starts):
            pass
