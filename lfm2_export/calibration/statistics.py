"""Statistics of a model's inputs as a file that can be kept: safetensors, tied to its checkpoint by hash.

In: a file, which a stranger may have written, and the checkpoint that it must belong to. Out: ``Statistics``: the
Hessian XᵀX / tokens of every input, read when it is asked for. Of a symmetric matrix [N, N] the upper triangle is
stored, row by row, float32 [N (N + 1) / 2]; where memory was short, the diagonal [N] alone. The header's metadata hold
one JSON text, ``Description``.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lfm2_export import dataclass_json, json_values, paths
from lfm2_export.calibration.inputs import Input, by_weight, inputs
from lfm2_export.checkpoint import Checkpoint
from lfm2_export.errors import ArtifactError, CalibrationError, CheckpointError
from lfm2_export.manifest import CheckpointRecord
from lfm2_export.messages import named, one_line, shown
from lfm2_export.quant.formats import FloatArray
from lfm2_export.quant.hessian import InputStatistics, input_statistics
from lfm2_export.resources import usable_cores
from lfm2_export.safetensors_file import Shard, read_shard, read_stored

VERSION = 1
METADATA = "lfm2_export.calibration"
_MOST_TOKENS = 10**12
_REMEDY = "calibrate again, or give the file that belongs to this checkpoint"


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a file of statistics says of itself.

    ``checkpoint`` is ``checkpoint_hash``; ``source``, ``sha256``, ``tokens`` as in ``text.Text``; ``seen``: of each
    input, the tokens that it is made of; ``averaged``: experts' inputs that saw too few and have their layer's mean.
    """

    checkpoint: str
    source: str
    sha256: str
    tokens: int
    seen: Mapping[str, int]
    averaged: tuple[str, ...] = ()
    version: int = VERSION


def checkpoint_hash(record: CheckpointRecord) -> str:
    """One hash for config and weights."""
    meaning = [record.config_sha256, sorted(record.shards.items())]
    return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()


class Statistics:
    """The statistics of one checkpoint; safe for several threads. ``inputs`` are those of the checkpoint.

    Raises:
        CalibrationError: the file is missing, damaged, or of another checkpoint.
    """

    def __init__(self, path: Path, checkpoint: Checkpoint, record: CheckpointRecord):
        self.path = path
        self._shard = _read_shard(path)
        self.description = _description(path, self._shard)
        self._check_origin(checkpoint, record)
        self.inputs = inputs(checkpoint.config, checkpoint.model_tensors)
        self._check_inputs()
        self._by_weight = by_weight(self.inputs)
        self._factors = _Factors()

    @cached_property
    def key(self) -> str:
        """What exports that were made with it follow from: its header, and the file's size and times."""
        status = os.stat(self.path)
        meaning = [repr(self.description), status.st_size, status.st_mtime_ns]
        return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()

    def has(self, weight: str) -> bool:
        """Whether a weight, by its published name, has an input that was measured."""
        return weight in self._by_weight

    def input_of(self, weight: str) -> str:
        """The name of a weight's input, which weights may share."""
        return self._by_weight[weight]

    def hessian(self, weight: str) -> FloatArray:
        """H of a weight's input, float32 [N, N], or its diagonal [N].

        Raises:
            CalibrationError: the file changed or cannot be read.
        """
        return self._read(self._by_weight[weight])

    def of(self, weight: str) -> InputStatistics | None:
        """What an algorithm needs of a weight's input; None for one that is not multiplied with any. The last ones are
        kept, as weights that share an input follow one another.

        Raises:
            CalibrationError: the file changed or cannot be read.
            QuantizationError: the values cannot be statistics.
        """
        name = self._by_weight.get(weight)
        if name is None:
            return None
        return self._factors.of(name, lambda: input_statistics(self._read(name), name=self._place(name)))

    def record(self) -> dict[str, Any]:
        """What a manifest says of it."""
        told = self.description
        return {
            "text": {"source": told.source, "sha256": told.sha256, "tokens": told.tokens},
            "averaged": len(told.averaged),
            "diagonal": sum(map(self._is_diagonal, self.inputs.values())),
        }

    def _is_diagonal(self, one: Input) -> bool:
        return self._shard.tensors[one.name].count == one.width and one.width > 1

    def _read(self, name: str) -> FloatArray:
        try:
            stored = read_stored(self._shard, self._shard.tensors[name])
        except CheckpointError as error:
            raise _damaged(self.path, error) from error
        width = self.inputs[name].width
        return stored if self._is_diagonal(self.inputs[name]) else unpacked(stored, width)

    def _place(self, name: str) -> str:
        return f"{paths.shown(self.path, 80)}: {name}"

    def _check_origin(self, checkpoint: Checkpoint, record: CheckpointRecord) -> None:
        if self.description.checkpoint != checkpoint_hash(record):
            raise CalibrationError(
                f"{paths.shown(self.path)}: holds statistics of another checkpoint than {one_line(str(record), 60)} "
                f"(the sha256 differs); {_REMEDY}"
            )

    def _check_inputs(self) -> None:
        """Every input is there with its size, and nothing else."""
        stored, told = self._shard.tensors, self.description
        for names in (stored.keys(), told.seen.keys()):
            if names != self.inputs.keys():
                odd = next(iter(sorted(names ^ self.inputs.keys())))
                raise _damaged(self.path, f"{named(odd)} is {'missing' if odd in self.inputs else 'unknown'}")
        for name, one in self.inputs.items():
            info = stored[name]
            if info.dtype != "F32" or info.shape not in ((packed_size(one.width),), (one.width,)):
                raise _damaged(
                    self.path,
                    f"{named(name)} is {info.dtype} {shown(list(info.shape))}, not F32 [{packed_size(one.width)}]",
                )
        if unknown := set(told.averaged) - self.inputs.keys():
            raise _damaged(self.path, f"{named(min(unknown))} is unknown")


class _Factors:
    """The statistics that were made last, each once however many threads ask; as many as there are threads at work."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._making: dict[str, threading.Lock] = {}
        self._kept: OrderedDict[str, InputStatistics] = OrderedDict()

    def of(self, name: str, make: Any) -> InputStatistics:
        with self._lock:
            mine = self._making.setdefault(name, threading.Lock())
        with mine:
            with self._lock:
                if name in self._kept:
                    self._kept.move_to_end(name)
                    return self._kept[name]
            made: InputStatistics = make()
            with self._lock:
                self._kept[name] = made
                while len(self._kept) > usable_cores():
                    self._making.pop(self._kept.popitem(last=False)[0], None)
            return made


def packed_size(width: int) -> int:
    """Values of an upper triangle."""
    return width * (width + 1) // 2


def packed(matrix_NN: np.ndarray) -> FloatArray:
    """The upper triangle, row by row."""
    width = len(matrix_NN)
    out = np.empty(packed_size(width), np.float32)
    start = 0
    for row in range(width):
        out[start : start + width - row] = matrix_NN[row, row:]
        start += width - row
    return out


def unpacked(triangle: np.ndarray, width: int) -> FloatArray:
    """The symmetric matrix [N, N] of a triangle."""
    out = np.empty((width, width), np.float32)
    start = 0
    for row in range(width):
        part = triangle[start : start + width - row]
        out[row, row:] = part
        out[row:, row] = part
        start += width - row
    return out


@dataclass(frozen=True, kw_only=True)
class StatisticsLayout:
    """Where everything lies in a file that is not there yet: its size follows from the model alone.

    ``diagonal`` names the inputs of which only the diagonal is kept.
    """

    inputs: Mapping[str, Input]
    diagonal: Collection[str] = ()
    source: str = ""
    offsets: Mapping[str, int] = field(init=False)
    data_start: int = field(init=False)
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        largest = Description(
            checkpoint="0" * 64,
            source=self.source,
            sha256="0" * 64,
            tokens=_MOST_TOKENS,
            seen=dict.fromkeys(self.inputs, _MOST_TOKENS),
            averaged=tuple(self.inputs),
        )
        start = 8 + -(-len(self._header(largest)) // 8) * 8
        offsets, end = {}, start
        for name in self.inputs:
            offsets[name] = end
            end += 4 * self.count(name)
        for attribute, value in (("offsets", offsets), ("data_start", start), ("nbytes", end)):
            object.__setattr__(self, attribute, value)

    def count(self, name: str) -> int:
        """Values of one input."""
        width = self.inputs[name].width
        return width if name in self.diagonal else packed_size(width)

    def header(self, description: Description) -> bytes:
        """The bytes before the data."""
        text = self._header(description).ljust(self.data_start - 8)
        return len(text).to_bytes(8, "little") + text

    def _header(self, description: Description) -> bytes:
        entries: dict[str, Any] = {"__metadata__": {METADATA: json.dumps(dataclass_json.encode(description))}}
        begin = 0
        for name in self.inputs:
            end = begin + 4 * self.count(name)
            entries[name] = {"dtype": "F32", "shape": [self.count(name)], "data_offsets": [begin, end]}
            begin = end
        return json.dumps(entries).encode()


def _read_shard(path: Path) -> Shard:
    if not paths.exists(path, CalibrationError):
        raise CalibrationError(
            f"{paths.shown(path)}: no such file; make it with --calibrate default --statistics {paths.shown(path, 60)}"
        )
    try:
        return read_shard(paths.real(path, CalibrationError))
    except CheckpointError as error:
        raise _damaged(path, error) from error


def _description(path: Path, shard: Shard) -> Description:
    text = shard.metadata.get(METADATA) if isinstance(shard.metadata, dict) else None
    if not isinstance(text, str):
        raise CalibrationError(f"{paths.shown(path)}: is no file of statistics; {_REMEDY}")
    try:
        raw = json_values.parse(text)
        if not isinstance(raw, dict) or raw.get("version") != VERSION:
            raise ArtifactError(f"it is of version {shown(raw.get('version') if isinstance(raw, dict) else raw)}")
        told = dataclass_json.decode(Description, raw)
        counts = {"tokens": told.tokens, **told.seen}
        for name, count in counts.items():
            if not 0 <= count <= _MOST_TOKENS:
                raise ArtifactError(f"{named(name)}: {shown(count)} is no number of tokens")
    except (json_values.JsonError, ArtifactError) as error:
        raise _damaged(path, error) from error
    return told


def _damaged(path: Path, fault: object) -> CalibrationError:
    reason = str(fault).removeprefix(f"{paths.shown(path)}: ").removesuffix("; download it again")
    return CalibrationError(f"{paths.shown(path)}: cannot be used as statistics ({one_line(reason, 160)}); {_REMEDY}")
