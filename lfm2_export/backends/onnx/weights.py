"""Streams a checkpoint's weights through the quantizer into a program's data file, one tensor or expert at a time.

In: a checkpoint, a ``WeightPlan`` and an algorithm. Out: external data files, the place of every initializer in
them, and a record of every tensor's format and quantization error. The places follow from the plan alone, so they
are known, and the disk can be checked, before anything is read. A ledger keeps the pieces that are done.

The work is cut into pieces: some rows of a matrix, or one expert's two matrices that lie interleaved. A thread per core
takes a piece all the way from the shard to the data file, so that one reads while another computes. What is quantized
goes through the cache some hundred rows at a time. Peak memory is a piece per core, whatever the model's size.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lfm2_export.backends.onnx.packing import empty_rows, pack_chunk
from lfm2_export.backends.onnx.passes import ROPE_TABLES
from lfm2_export.backends.onnx.plan import Layout, StoredWeight, WeightPlan
from lfm2_export.background import map_in_threads
from lfm2_export.checkpoint import Checkpoint, check_finite, is_finite
from lfm2_export.config import ModelConfig
from lfm2_export.ledger import Ledger
from lfm2_export.manifest import StoredTensor
from lfm2_export.models.decoder import rope_tables
from lfm2_export.quant.algorithms import Algorithm
from lfm2_export.quant.formats import IntFormat, StorageError, storage_error, to_float
from lfm2_export.quant.groups import Workspace, rows_per_chunk
from lfm2_export.resources import usable_cores

# onnxruntime maps external tensors; a large one must start where every platform can map (Windows: 64 KiB).
LARGE, LARGE_ALIGNMENT, SMALL_ALIGNMENT = 1 << 20, 1 << 16, 64
# A browser cannot hold an ArrayBuffer of 2 GiB or more, so a data file ends before that.
MAX_FILE_BYTES = 2_000_000_000
# Rows are stored in pieces of about this many values: 8 MiB of bf16.
CHUNK_VALUES = 1 << 22

Report = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where one initializer lies: ``file`` is the index of the data file."""

    file: int
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def data_file_names(program: str, placements: Mapping[str, Placement]) -> list[str]:
    """``model_q4.onnx_data``, ``model_q4.onnx_data_1``, ...: as Transformers.js looks for them."""
    count = 1 + max(placement.file for placement in placements.values())
    return [f"{program}_data" + (f"_{index}" if index else "") for index in range(count)]


def data_file_sizes(names: Sequence[str], placements: Mapping[str, Placement]) -> dict[str, int]:
    """The bytes of each data file when it is complete."""
    return {
        name: max(there.offset + there.nbytes for there in placements.values() if there.file == index)
        for index, name in enumerate(names)
    }


def place(plan: WeightPlan, config: ModelConfig) -> dict[str, Placement]:
    """The place of every initializer, in the plan's order; weights that share bytes share their place."""
    placements: dict[str, Placement] = {}
    cursor = _Cursor()
    for weight in plan.values():
        for role, (shape, dtype) in weight.storage().items():
            if weight.same_bytes_as is None:
                placements[weight.initializer(role)] = cursor.take(shape, dtype)
    for weight in plan.values():
        if weight.same_bytes_as is not None:
            owner = plan[weight.same_bytes_as]
            for role, (shape, dtype) in weight.storage().items():
                there = placements[owner.initializer(role)]
                placements[weight.initializer(role)] = Placement(
                    file=there.file, offset=there.offset, shape=shape, dtype=dtype
                )
    if config.attention_layers:
        for name in ROPE_TABLES.values():
            shape = (config.max_position_embeddings, config.head_dim // 2)
            placements[name] = cursor.take(shape, np.dtype(plan.activation_dtype))
    return placements


class _Cursor:
    """The next free byte."""

    def __init__(self) -> None:
        self.file, self.offset = 0, 0

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> Placement:
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        alignment = LARGE_ALIGNMENT if nbytes >= LARGE else SMALL_ALIGNMENT
        start = -(-self.offset // alignment) * alignment
        if start and start + nbytes > MAX_FILE_BYTES:
            self.file, start = self.file + 1, 0
        self.offset = start + nbytes
        return Placement(file=self.file, offset=start, shape=shape, dtype=dtype)


def attach(model: ir.Model, placements: Mapping[str, Placement], files: Sequence[str]) -> int:
    """Points the graph's initializers at their places; returns how many."""
    for name, value in model.graph.initializers.items():
        if name in placements:
            there = placements[name]
            value.const_value = ir.ExternalTensor(
                location=files[there.file],
                offset=there.offset,
                length=there.nbytes,
                dtype=ir.DataType.from_numpy(there.dtype),
                shape=ir.Shape(there.shape),
                name=name,
            )
    return sum(name in placements for name in model.graph.initializers)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Part of a weight: ``rows`` of one checkpoint tensor, or two tensors (w1, w3 of an expert), rows interleaved.

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

    def stored_bytes(self, checkpoint: Checkpoint) -> int:
        """How much of the checkpoint it is made of."""
        return sum(checkpoint.tensors[source].rows(self.rows).nbytes for source in self.sources)


def pieces(plan: WeightPlan) -> list[Piece]:
    """Every piece of the weights that have bytes of their own, in file order, which is the order of the work."""
    return [piece for weight in plan.values() if weight.same_bytes_as is None for piece in _pieces(weight)]


def _pieces(weight: StoredWeight) -> Iterator[Piece]:
    rows = weight.shape[-2] if len(weight.shape) > 1 else weight.shape[0]
    if weight.layout is Layout.GATE_UP:
        for expert, pair in enumerate(zip(weight.sources[0::2], weight.sources[1::2], strict=True)):
            yield Piece(weight=weight, first_row=expert * rows, sources=pair)
        return
    for index, source in enumerate(weight.sources):
        if weight.layout in (Layout.PLAIN, Layout.TRANSPOSED):
            yield Piece(weight=weight, first_row=0, sources=(source,))
            continue
        step = max(1, CHUNK_VALUES // weight.shape[-1])
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            yield Piece(weight=weight, first_row=index * rows + start, sources=(source,), rows=part)


class WeightWriter:
    """Fills data files. ``report`` is told the bytes of checkpoint that each step has consumed. ``ledger`` makes the
    files, says which pieces are in them already, and is told of every further one."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        placements: Mapping[str, Placement],
        paths: Sequence[Path],
        algorithm: Algorithm,
        report: Report,
        ledger: Ledger,
    ):
        self.checkpoint, self.placements, self.algorithm, self.report = checkpoint, placements, algorithm, report
        self.paths, self.ledger = paths, ledger
        self._threads = _Thread()

    def write(self, plan: WeightPlan) -> tuple[StoredTensor, ...]:
        """Writes every weight of the plan and the rope tables; returns a record of each weight.

        Raises:
            CheckpointError: a tensor holds NaN or infinity, or its shard changed.
            QuantizationError: a value does not fit the stored dtype.
            OSError: the disk is full or fails.
        """
        with self.ledger:
            self._files = [os.open(path, os.O_RDWR) for path in self.paths]
            try:
                errors = self._write_pieces(plan)
                self._write_rope(plan)
            finally:
                for file in self._files:
                    os.close(file)
        return tuple(_record(weight, errors.get(weight.name)) for weight in plan.values())

    def _write_pieces(self, plan: WeightPlan) -> dict[str, StorageError]:
        """The error of every weight that has bytes of its own."""
        errors: dict[str, StorageError] = {}
        for piece, error in self._errors(pieces(plan)):
            errors[piece.weight.name] = errors.get(piece.weight.name, StorageError()) + error
            self.report(piece.stored_bytes(self.checkpoint))
        return errors

    def _errors(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, StorageError]]:
        """Every piece with its error, always in the same order: sums of floats depend on it."""
        done = [StorageError(**figures) for figures in self.ledger.done]
        yield from zip(pieces[: len(done)], done, strict=True)
        for piece, error in map_in_threads(self._write_piece, pieces[len(done) :], threads=usable_cores()):
            self.ledger.add(asdict(error))
            yield piece, error

    def _write_piece(self, piece: Piece) -> StorageError:
        if isinstance(piece.weight.format, IntFormat):
            return self._quantize(piece, piece.weight.format)
        values = self._values(piece)
        stored = to_float(values, piece.weight.format, fqn=piece.weight.name)
        self._put(piece, "weight", stored)
        return _cast_error(values, stored)

    def _values(self, piece: Piece) -> np.ndarray:
        if len(piece.sources) == 1:
            return self._read(piece.sources[0], piece.rows)
        both = np.empty(piece.weight.shape[1:], np.float32)
        for offset, source in enumerate(piece.sources):
            both[offset::2] = self._read(source)
        return both

    def _read(self, source: str, rows: slice | None = None) -> np.ndarray:
        values = self.checkpoint.read(source, rows)
        check_finite(source, values)
        return values

    def _quantize(self, piece: Piece, form: IntFormat) -> StorageError:
        """One chunk of a source at a time: it stays in the cache from the file to its packed rows."""
        columns = piece.weight.shape[-1]
        packed = empty_rows(form, piece.row_count, columns)
        error = StorageError()
        for offset, source in enumerate(piece.sources):
            rows = range(offset, piece.row_count, len(piece.sources))
            for stored in self._finite_blocks(source, piece.rows, rows_per_chunk(columns)):
                rows, these = rows[len(stored) :], rows[: len(stored)]
                chunk = self.algorithm.rows(stored, form, self._threads.workspace, fqn=piece.weight.name, rows=these)
                error += chunk.storage_error()
                pack_chunk(chunk, slice(these.start, these.stop, these.step), packed)
        for role, array in packed.items():
            self._put(piece, role, array)
        return error

    def _finite_blocks(self, source: str, rows: slice | None, step: int) -> Iterator[np.ndarray]:
        for stored in self.checkpoint.read_raw_blocks(source, rows, step):
            if not is_finite(stored):
                self._read(source, rows)  # refuses the tensor, and says where
            yield stored

    def _put(self, piece: Piece, role: str, array: np.ndarray) -> None:
        there = self.placements[piece.weight.initializer(role)]
        if piece.weight.layout is Layout.TRANSPOSED:
            array = array.T
        array = np.ascontiguousarray(array, there.dtype)
        row_bytes = array.nbytes // array.shape[0]
        _write_all(self._files[there.file], array, there.offset + piece.first_row * row_bytes)

    def _write_rope(self, plan: WeightPlan) -> None:
        config = self.checkpoint.config
        if not config.attention_layers:
            return
        for name, table in zip(ROPE_TABLES.values(), rope_tables(config), strict=True):
            there = self.placements[name]
            _write_all(self._files[there.file], table.numpy().astype(there.dtype), there.offset)


class _Thread(threading.local):
    """What each thread has for itself."""

    def __init__(self) -> None:
        self.workspace = Workspace()


def _write_all(file: int, array: np.ndarray, offset: int) -> None:
    view = np.ascontiguousarray(array).data.cast("B")
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
        granularity = f"group {form.group_size}, {kind}, {form.scale_dtype} scales"
    return StoredTensor(
        name=weight.name,
        shape=weight.shape,
        dtype=form.dtype,
        granularity=granularity,
        error=None if error is None else error.relative_rms,
        reason=reason or None,
    )
