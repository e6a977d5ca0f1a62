"""Streams a checkpoint's weights through the quantizer into a program's files, one tensor or expert at a time.

In: a checkpoint, a ``WeightPlan``, an algorithm, the place of every tensor and a backend's ``Packing``. Out: the files,
and a record of every weight's format and error. The places follow from the plan alone, so they are known, and the disk
can be checked, before anything is read. A ledger keeps the pieces that are done.

A thread per core takes a piece all the way from the shard to its file, so that one reads while another computes. What
is quantized goes through the cache some hundred rows at a time, whole rows always: an algorithm may use what it sees of
a row, and of the input that its columns meet, for all of it. Peak memory is a piece per core, whatever the model's
size.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lfm2_export.backends.weights.pieces import Piece, Placement, pieces
from lfm2_export.backends.weights.plan import StoredWeight, WeightPlan
from lfm2_export.background import map_in_threads
from lfm2_export.checkpoint import Checkpoint, check_finite, is_finite
from lfm2_export.ledger import Ledger
from lfm2_export.manifest import StoredTensor
from lfm2_export.quant.algorithms import Algorithm
from lfm2_export.quant.formats import IntFormat, StorageError, storage_error, to_float
from lfm2_export.quant.groups import Chunk, Scratch, rows_per_chunk
from lfm2_export.quant.hessian import InputStatistics, one_thread_products
from lfm2_export.resources import usable_cores

Report = Callable[[int], None]
UNMEASURED = "refit: no input is multiplied with it"
Arrays = Mapping[str, np.ndarray]

# What a ledger says of each piece.
FIGURES = tuple(one.name for one in fields(StorageError))


class Packing(Protocol):
    """Between what the stream computes and the bytes of a backend's tensors."""

    def empty(self, weight: StoredWeight, form: IntFormat, rows: int) -> Any:
        """Room for so many rows of a quantized weight."""

    def pack(self, chunk: Chunk, rows: slice, room: Any) -> None:
        """Puts a chunk of whole rows into the room; may overwrite the chunk's scratch buffers."""

    def packed(self, weight: StoredWeight, room: Any) -> Arrays:
        """By role: what goes into the weight's tensors, the first axis as in its place."""

    def numbers(self, weight: StoredWeight, values: np.ndarray) -> Arrays:
        """The same of a weight that is not quantized, in its format's dtype."""


class InputSource(Protocol):
    """Statistics of what weights are multiplied with."""

    def of(self, weight: str) -> InputStatistics | None:
        """Those of a weight's input, by its published name; None for one that is multiplied with nothing."""

    def has(self, weight: str) -> bool:
        """Whether there are any."""


@dataclass(frozen=True, kw_only=True)
class WeightStream:
    """Fills files. ``report`` is told the bytes of checkpoint that each step has consumed. ``ledger`` makes the files
    (at ``paths``), says which pieces are in them already, and is told of every further one. ``statistics``: for an
    algorithm that needs them."""

    checkpoint: Checkpoint
    placements: Mapping[str, Placement]
    paths: Sequence[Path]
    packing: Packing
    algorithm: Algorithm
    report: Report
    ledger: Ledger
    statistics: InputSource | None = None
    _own: _Thread = field(default_factory=lambda: _Thread(), init=False)

    def write(self, plan: WeightPlan, computed: Mapping[str, Callable[[], np.ndarray]]) -> tuple[StoredTensor, ...]:
        """Writes every weight of the plan, and the tensors of ``computed``, which come from no checkpoint; returns a
        record of each weight.

        Raises:
            CheckpointError: a tensor holds NaN or infinity, or its shard changed.
            QuantizationError: a value does not fit the stored dtype.
            OSError: the disk is full or fails.
        """
        with self.ledger, one_thread_products() if self.statistics else contextlib.nullcontext():
            files = [os.open(path, os.O_RDWR) for path in self.paths]
            try:
                errors = self._write_pieces(plan, files)
                for name, compute in computed.items():
                    _write(files, self.placements[name], compute(), first_row=0)
            finally:
                for file in files:
                    os.close(file)
        return tuple(self._record(weight, errors.get(weight.name)) for weight in plan.values())

    def _write_pieces(self, plan: WeightPlan, files: Sequence[int]) -> dict[str, StorageError]:
        """The error of every weight that has bytes of its own."""
        errors: dict[str, StorageError] = {}
        for piece, error in self._errors(pieces(plan), files):
            errors[piece.weight.name] = errors.get(piece.weight.name, StorageError()) + error
            self.report(piece.stored_bytes(self.checkpoint))
        return errors

    def _errors(self, pieces: Sequence[Piece], files: Sequence[int]) -> Iterator[tuple[Piece, StorageError]]:
        """Every piece with its error, always in the same order: sums of floats depend on it."""
        done = [StorageError(**figures) for figures in self.ledger.done]
        yield from zip(pieces[: len(done)], done, strict=True)
        write = map_in_threads(
            lambda piece: self.write_piece(piece, files), pieces[len(done) :], threads=usable_cores()
        )
        for piece, error in write:
            self.ledger.add(asdict(error))
            yield piece, error

    def write_piece(self, piece: Piece, files: Sequence[int]) -> StorageError:
        """From the shard to the files; for any thread."""
        weight = piece.weight
        if isinstance(weight.format, IntFormat):
            arrays, error = self._quantized(piece, weight.format)
        else:
            values = self._values(piece)
            stored = to_float(values, weight.format, fqn=weight.name)
            arrays, error = self.packing.numbers(weight, stored), _cast_error(values, stored)
        for role, array in arrays.items():
            _write(files, self.placements[weight.tensor(role)], array, piece.first_row)
        return error

    def _values(self, piece: Piece) -> np.ndarray:
        if len(piece.sources) == 1:
            return self._read(piece.sources[0], piece.rows)
        all_rows = np.empty((piece.row_count, piece.weight.shape[-1]), np.float32)
        for offset, source in enumerate(piece.sources):
            all_rows[offset :: len(piece.sources)] = self._read(source, piece.rows)
        return all_rows

    def _read(self, source: str, rows: slice | None) -> np.ndarray:
        values = self.checkpoint.read(source, rows)
        if not is_finite(values):
            self._refuse(source)
        return values

    def _refuse(self, source: str) -> None:
        """Says how many values of the tensor are not finite, and where the first one is."""
        check_finite(source, self.checkpoint.read(source))

    def _quantized(self, piece: Piece, form: IntFormat) -> tuple[Arrays, StorageError]:
        """One chunk of a source at a time: it stays in the cache from the file to its packed rows."""
        room = self.packing.empty(piece.weight, form, piece.row_count)
        error, first = StorageError(), piece.rows.start if piece.rows else 0
        for offset, source in enumerate(piece.sources):
            rows = range(offset, piece.row_count, len(piece.sources))
            for chunk in self._chunks(piece, source, form, range(first + offset, first + piece.row_count, rows.step)):
                count = chunk.scale_C.size // form.groups(piece.weight.shape[-1], piece.weight.name)
                rows, these = rows[count:], rows[:count]
                error += chunk.storage_error()
                self.packing.pack(chunk, slice(these.start, these.stop, these.step), room)
        return self.packing.packed(piece.weight, room), error

    def _chunks(self, piece: Piece, source: str, form: IntFormat, named: range) -> Iterator[Chunk]:
        """The rows of one source as chunks of whole rows; ``named``: their numbers in errors. What the checkpoint holds
        in this format already is taken over."""
        columns, scratch = piece.weight.shape[-1], self._own.scratch
        there = self.checkpoint.exact_formats.get(source)
        if there is not None and form.holds(there):
            for codes in self.checkpoint.read_code_blocks(source, piece.rows, rows_per_chunk(columns)):
                yield scratch.take_over(codes, form)
            return
        algorithm = self._algorithm(piece.weight, source)
        for stored in self._blocks(source, piece.rows, algorithm.rows_per_chunk(columns)):
            these, named = named[: len(stored)], named[len(stored) :]
            yield algorithm.rows(stored, form, scratch, fqn=piece.weight.name, rows=these)

    def _algorithm(self, weight: StoredWeight, source: str) -> Algorithm:
        """The algorithm for the input that a source is multiplied with."""
        if self.statistics is None:
            return self.algorithm
        return self.algorithm.fitted(self.statistics.of(weight.multiplied(source)))

    def _record(self, weight: StoredWeight, error: StorageError | None) -> StoredTensor:
        record = _record(weight, error)
        own_bytes = isinstance(weight.format, IntFormat) and weight.same_bytes_as is None
        if self.statistics is None or not own_bytes or self.statistics.has(weight.multiplied(weight.sources[0])):
            return record
        return replace(record, reason=f"{record.reason}; {UNMEASURED}" if record.reason else UNMEASURED)

    def _blocks(self, source: str, rows: slice | None, step: int) -> Iterator[np.ndarray]:
        for stored in self.checkpoint.read_raw_blocks(source, rows, step):
            if not is_finite(stored):
                self._refuse(source)
            yield stored


class _Thread(threading.local):
    """What each thread has for itself."""

    def __init__(self) -> None:
        self.scratch = Scratch()


def bytes_on_disk(path: Path) -> int:
    """What a file that an export left unfinished takes of the disk: it has holes."""
    try:
        return 512 * getattr(path.stat(), "st_blocks", 0)
    except FileNotFoundError:
        return 0


def _write(files: Sequence[int], there: Placement, array: np.ndarray, first_row: int) -> None:
    """Puts rows of a tensor, numbered from ``first_row``, into its place."""
    array = np.ascontiguousarray(array, there.dtype)
    if there.step is None:
        _write_all(files[there.file], array, there.offset + first_row * (array.nbytes // array.shape[0]))
        return
    for number, row in enumerate(array, first_row):
        _write_all(files[there.file], row, there.offset + number * there.step)


def _write_all(file: int, array: np.ndarray, offset: int) -> None:
    view = array.data.cast("B")
    while view:
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done


def _cast_error(values: np.ndarray, stored: np.ndarray) -> StorageError:
    if stored.dtype == values.dtype:
        return StorageError()
    return storage_error(values.reshape(values.shape[0], -1), stored.reshape(values.shape[0], -1))


def _record(weight: StoredWeight, error: StorageError | None) -> StoredTensor:
    form, reason = weight.format, weight.reason
    if weight.same_bytes_as is not None:
        reason = f"shares the bytes of {weight.same_bytes_as}"
    granularity = None
    if isinstance(form, IntFormat):
        kind = "symmetric" if form.symmetric else "with zero points"
        groups = "rows" if form.group_size is None else f"group {form.group_size}"
        granularity = f"{groups}, {kind}, {form.scale_dtype} scales"
    return StoredTensor(
        name=weight.name,
        shape=weight.shape,
        dtype=form.dtype,
        granularity=granularity,
        error=None if error is None else error.relative_rms,
        reason=reason or None,
    )
