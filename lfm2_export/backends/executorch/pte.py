"""Reads the container of a .pte: operators, delegates and where its data lies, without ExecuTorch.

In: the path of a .pte. Out: ``PteFile``. A .pte is a flatbuffer (``program.fbs`` of ExecuTorch) followed by segments of
bytes, with an extended header that says where those begin. Only the few tables that are needed are walked; every
offset, count and index is checked against what it leads into, so that a damaged file gives an error and no garbage.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np

from lfm2_export import files, paths
from lfm2_export.errors import ArtifactError, RunnerError
from lfm2_export.messages import named

T = TypeVar("T")

# Bytes 4 to 8: flatbuffers' file identifier, which changes with the format's major version.
IDENTIFIER, _HEADER_MAGIC = b"ET12", b"eh00"
_HEADER = struct.Struct("<4sIQQQ")  # magic, length, size of the flatbuffer, where segments begin, their size
_HEADER_OFFSET = 8
# The tables of the 24B take 5 MB; what stands in them is read as a whole.
_LARGEST_TABLES = 256 << 20
# Names of operators, delegates, methods and data; a hash has 64 characters.
_LONGEST_NAME = 1024
# Fields by their order in program.fbs.
_PLANS, _SEGMENTS, _CONSTANTS, _NAMED_DATA = 1, 4, 5, 7
_PLAN_NAME, _PLAN_OPERATORS, _PLAN_DELEGATES, _PLAN_BUFFERS = 0, 6, 7, 8


@dataclass(frozen=True)
class Place:
    """Bytes of the file. A constant's ``size`` includes the padding behind it."""

    offset: int
    size: int


class PteFile:
    """The container. Opening it checks identifier and size.

    Raises:
        ArtifactError: there is no such file.
        RunnerError: it is no .pte of this format, or not all of one.
    """

    def __init__(self, path: Path):
        if not paths.is_file(path, ArtifactError):
            raise ArtifactError(f"{paths.shown(path)}: no such program; export the scheme again")
        self.path = path
        try:
            with files.open_real(paths.real(path, ArtifactError)) as file:
                self._size = os.fstat(file.fileno()).st_size
                self._open(file)
        except OSError as error:
            raise files.unreadable(path, error, ArtifactError) from error
        self._names: dict[int, str] = {}
        self._root = self._offset(0)

    def _open(self, file: FileIO) -> None:
        head = file.read(_HEADER_OFFSET + _HEADER.size)
        if len(head) < _HEADER_OFFSET + _HEADER.size or head[4:6] != b"ET":
            raise RunnerError(f"{paths.shown(self.path)}: is not an ExecuTorch program; export again")
        if head[4:8] != IDENTIFIER:
            raise RunnerError(
                f"{paths.shown(self.path)}: is of format {head[4:8].decode('ascii', 'replace')}, this version reads "
                f"{IDENTIFIER.decode()}; export again, or install the executorch that wrote it"
            )
        magic, length, tables_size, self._segment_base, segments_size = _HEADER.unpack_from(head, _HEADER_OFFSET)
        if magic != _HEADER_MAGIC or length < _HEADER.size:
            raise RunnerError(
                f"{paths.shown(self.path)}: has no extended header; it was made by an executorch before 1.0, export "
                "again"
            )
        wanted = max(tables_size, self._segment_base + segments_size if self._segment_base else 0)
        if self._size < wanted:
            raise RunnerError(
                f"{paths.shown(self.path)}: has {self._size} bytes of {wanted}; it was cut off, copy or export it again"
            )
        if tables_size > _LARGEST_TABLES:
            self._refuse(f"its tables have {tables_size} bytes, more than {_LARGEST_TABLES}")
        file.seek(0)
        self._data = file.read(tables_size)

    def operators(self, method: str) -> list[str]:
        """What a method calls, as the runtime names it: "llama::update_cache.out"."""
        names = []
        for table in self._tables(self._plan(method), _PLAN_OPERATORS):
            name, overload = (self._string(table, index) for index in (0, 1))
            names.append(f"{name}.{overload}" if overload else name)
        return names

    def delegates(self, method: str) -> list[str]:
        """The delegates' names, one for each partition."""
        return [self._string(table, 0) for table in self._tables(self._plan(method), _PLAN_DELEGATES)]

    def planned_bytes(self, method: str) -> int:
        """Memory that the runtime takes when it loads a method: its state, and activations of the longest prompt."""
        start, count = self._vector(self._plan(method), _PLAN_BUFFERS)
        return sum(self._unpack("<q", start + 8 * index) for index in range(count))

    def methods(self) -> list[str]:
        return [self._string(plan, _PLAN_NAME) for plan in self._tables(self._root, _PLANS)]

    @cached_property
    def named_data(self) -> dict[str, Place]:
        """Blobs by key; XNNPACK's weights are keyed by the SHA-256 of their bytes."""
        found = {}
        for table in self._tables(self._root, _NAMED_DATA):
            found[self._string(table, 0)] = self._segment(table, 1)
        return found

    @cached_property
    def constants(self) -> list[Place]:
        """Constant tensors of the program itself."""
        table = self._table(self._root, _CONSTANTS)
        if table is None:
            return []
        segment = self._segment(table, 0)
        start, count = self._vector(table, 1)
        offsets = [*sorted({self._unpack("<Q", start + 8 * index) for index in range(count)}), segment.size]
        if max(offsets) > segment.size:
            self._refuse(f"a constant lies at byte {max(offsets)} of a segment of {segment.size}")
        return [Place(segment.offset + at, following - at) for at, following in pairwise(offsets)]

    def read(self, place: Place, dtype: np.dtype, count: int, skip: int = 0) -> np.ndarray:
        """``count`` values of a blob from its byte ``skip`` on."""
        inside = skip >= 0 and count >= 0 and skip + count * dtype.itemsize <= place.size
        if not inside or place.offset + place.size > self._size:
            raise RunnerError(f"{paths.shown(self.path)}: a weight reaches beyond its segment; export again")
        try:
            return np.fromfile(self.path, dtype, count, offset=place.offset + skip)
        except OSError as error:
            raise files.unreadable(self.path, error, ArtifactError) from error

    def _segment(self, table: int, field: int) -> Place:
        return self._item(self._segments, self._number(table, field, "<I"), "segment")

    def _item(self, items: Sequence[T], index: int, what: str) -> T:
        """What a table refers to by its number."""
        if not 0 <= index < len(items):
            self._refuse(f"it speaks of {what} {index} of {len(items)}")
        return items[index]

    @cached_property
    def _segments(self) -> list[Place]:
        tables = self._tables(self._root, _SEGMENTS)
        return [Place(self._segment_base + self._number(t, 0, "<Q"), self._number(t, 1, "<Q")) for t in tables]

    def _plan(self, method: str) -> int:
        for plan in self._tables(self._root, _PLANS):
            if self._string(plan, _PLAN_NAME) == method:
                return plan
        raise RunnerError(f"{paths.shown(self.path)}: has no method {named(method)}; export again")

    def _refuse(self, fault: str) -> NoReturn:
        raise RunnerError(f"{paths.shown(self.path)}: its program is damaged ({fault}); copy or export it again")

    # Flatbuffers: a table begins with the distance back to its vtable, which lists where its fields are.

    def _unpack(self, form: str, at: int) -> int:
        size = struct.calcsize(form)
        if not 0 <= at <= len(self._data) - size:
            self._refuse(f"{size} bytes at {at} are wanted of {len(self._data)}")
        value: int = struct.unpack_from(form, self._data, at)[0]
        return value

    def _offset(self, at: int) -> int:
        return at + self._unpack("<I", at)

    def _field(self, table: int, index: int) -> int | None:
        vtable = table - self._unpack("<i", table)
        if 4 + 2 * index >= self._unpack("<H", vtable):
            return None
        where = self._unpack("<H", vtable + 4 + 2 * index)
        return table + where if where else None

    def _number(self, table: int, index: int, form: str) -> int:
        at = self._field(table, index)
        return 0 if at is None else self._unpack(form, at)

    def _table(self, table: int, index: int) -> int | None:
        at = self._field(table, index)
        return None if at is None else self._offset(at)

    def _vector(self, table: int, index: int) -> tuple[int, int]:
        """(place of the first element, how many)."""
        at = self._table(table, index)
        return (0, 0) if at is None else (at + 4, self._unpack("<I", at))

    def _tables(self, table: int, index: int) -> Iterator[int]:
        start, count = self._vector(table, index)
        return (self._offset(start + 4 * place) for place in range(count))

    def _string(self, table: int, index: int) -> str:
        """A name, each place's once: many tables may share one."""
        start, count = self._vector(table, index)
        if start not in self._names:
            if count > _LONGEST_NAME or start + count > len(self._data):
                self._refuse(f"a name of {count} bytes at {start}")
            self._names[start] = self._data[start : start + count].decode("utf-8", "replace")
        return self._names[start]
