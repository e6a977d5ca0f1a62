"""The header of a GGUF file: what it says of the model, and where its tensors lie; checked before anything is believed.

In: an open file. Out: ``Header``: settings by key and tensors by name. The gguf package has a reader, too; it maps the
whole file and takes every count and offset in it at its word, so that a crafted header takes all memory. What the
package knows of types, keys and names is used (``blocks``, ``names``).

Format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian: "GGUF", uint32 version, uint64 number
of tensors, uint64 number of settings; settings as key, type, value; tensors as name, uint32 number of axes, uint64 axes
(innermost first), uint32 type, uint64 offset into the data, which begins at the next multiple of ``general.alignment``.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

import numpy as np

from lfm2_export import paths
from lfm2_export.config import MOST_TENSORS
from lfm2_export.errors import CheckpointError
from lfm2_export.messages import named, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Bytes and entries that a header may have. That of a model with 128,000 tokens has 9 MB and 400,000 entries.
MOST_BYTES, MOST_ENTRIES, MOST_SETTINGS = 64 << 20, 4_000_000, 4_096
_LONGEST_NAME, _LONGEST_TEXT = 256, 1 << 20
_MOST_AXES = 4
_MOST_ALIGNMENT = 1 << 20
_TEXT, _ARRAY = 8, 9
# By the format's number for them: struct's letter, numpy's dtype.
_NUMBERS = {
    0: ("B", "<u1"),
    1: ("b", "<i1"),
    2: ("H", "<u2"),
    3: ("h", "<i2"),
    4: ("I", "<u4"),
    5: ("i", "<i4"),
    6: ("f", "<f4"),
    7: ("?", "<u1"),
    10: ("Q", "<u8"),
    11: ("q", "<i8"),
    12: ("d", "<f8"),
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor as the header states it: ``shape`` rows first, ``type`` the format's number, ``offset`` from the start
    of the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """``settings``: numbers, texts, and lists of one of both. ``tensors`` are in the file's order."""

    settings: Mapping[str, Any]
    tensors: Mapping[str, Entry]


def read_header(path: Path, file: FileIO) -> Header:
    """The header of an open file.

    Raises:
        CheckpointError: it is no GGUF file, of another version, truncated, or states what no such file has.
    """
    reader = _Reader(path, file)
    if (magic := reader.take(4)) != MAGIC:
        raise reader.damaged(f"is no GGUF file (it begins with {magic!r})")
    version = reader.number("I")
    if version not in VERSIONS:
        kind = "big-endian" if version in (v << 24 for v in (1, *VERSIONS)) else f"of version {version}"
        raise CheckpointError(
            f"{paths.shown(path)}: is a GGUF file {kind}; only little-endian ones of version 2 and 3 are read, convert "
            "it again"
        )
    tensors, settings = reader.number("Q"), reader.number("Q")
    if tensors > MOST_TENSORS or settings > MOST_SETTINGS:
        raise reader.damaged(
            f"states {tensors} tensors and {settings} settings, more than the {MOST_TENSORS} and {MOST_SETTINGS} that "
            "are read"
        )
    found = reader.settings(settings)
    return Header(settings=found, tensors=reader.tensors(tensors, _alignment(reader, found)))


def _alignment(reader: _Reader, settings: Mapping[str, Any]) -> int:
    stated = settings.get("general.alignment", 32)
    if type(stated) is not int or not 8 <= stated <= _MOST_ALIGNMENT or stated & (stated - 1):
        raise reader.damaged(f"states general.alignment={shown(stated)}, which is not a power of two from 8 on")
    return stated


class _Reader:
    """Takes values off the front, as many bytes and entries as a header may have."""

    def __init__(self, path: Path, file: FileIO):
        self._path, self._size = path, os.fstat(file.fileno()).st_size
        self._file = BufferedReader(file, 1 << 18)
        self._place, self._entries = 0, 0

    def damaged(self, fault: str) -> CheckpointError:
        return CheckpointError(f"{paths.shown(self._path)}: {fault}; download it again")

    def take(self, count: int) -> bytes:
        if count > self._size - self._place:
            raise self.damaged(f"is truncated ({self._size} bytes, its header goes on)")
        if self._place + count > MOST_BYTES:
            raise self.damaged(f"has a header of more than the {MOST_BYTES} bytes that are read")
        data = self._file.read(count)
        if len(data) != count:
            raise self.damaged("ended while it was being read")
        self._place += count
        return data

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))
        return value

    def text(self, longest: int) -> str:
        length = self.number("Q")
        if length > longest:
            raise self.damaged(f"has a text of {length} bytes where at most {longest} are read")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"has a text that is not UTF-8 (byte {error.start})") from error

    def settings(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.text(_LONGEST_NAME)
            if key in found:
                raise self.damaged(f"states {named(key)} twice")
            found[key] = self._value(key, self.number("I"))
        return found

    def _value(self, key: str, kind: int) -> Any:
        if kind == _TEXT:
            return self.text(_LONGEST_TEXT)
        if kind == _ARRAY:
            return self._list(key, self.number("I"), self.number("Q"))
        if kind not in _NUMBERS:
            raise self.damaged(f"states {named(key)} in the unknown type {kind}")
        return self.number(_NUMBERS[kind][0])

    def _list(self, key: str, kind: int, count: int) -> list[Any]:
        self._entries += count
        if self._entries > MOST_ENTRIES:
            raise self.damaged(f"states {named(key)} with {count} entries; at most {MOST_ENTRIES} are read in all")
        if kind == _TEXT:
            return [self.text(_LONGEST_TEXT) for _ in range(count)]
        if kind not in _NUMBERS:  # lists in lists are of no use here
            raise self.damaged(f"states {named(key)} as a list of the unknown type {kind}")
        dtype = np.dtype(_NUMBERS[kind][1])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()

    def tensors(self, count: int, alignment: int) -> dict[str, Entry]:
        stated = [self._entry() for _ in range(count)]
        start = -(-self._place // alignment) * alignment
        found = {}
        for name, shape, kind, offset in stated:
            if name in found:
                raise self.damaged(f"lists {named(name)} twice")
            if offset % alignment or offset >= 2**62:
                raise self.damaged(f"puts {named(name)} at {offset}, which is no multiple of {alignment}")
            found[name] = Entry(name=name, shape=shape, type=kind, offset=start + offset)
        return found

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, axes = self.text(_LONGEST_NAME), self.number("I")
        if not 1 <= axes <= _MOST_AXES:
            raise self.damaged(f"gives {named(name)} {axes} axes")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        if math.prod(shape) >= 2**62 or 0 in shape:
            raise self.damaged(f"gives {named(name)} the shape {shown(list(shape))}")
        return name, shape, self.number("I"), self.number("Q")
