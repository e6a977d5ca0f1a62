"""Reads the files that come with a checkpoint or an artifact, which are downloads from strangers.

In: a path, the folder that it belongs to and a limit. Out: bytes, text or JSON, or one of our errors. A regular file
only (a FIFO would hang, a device would never end), inside of its folder only (a link could put any file of this user
into an artifact), and its size is known before memory is taken for it.

The Hub's cache is made of links: ``snapshots/<commit>/name`` leads to ``blobs/<hash>`` beside ``snapshots``. Those are
allowed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from lfm2_export import json_values, paths
from lfm2_export.errors import Lfm2ExportError
from lfm2_export.messages import shown
from lfm2_export.resources import human_bytes

# The largest JSON file of the family, the manifest of the 24B with every program, is below 8 MB.
JSON_LIMIT = 16 << 20
TEXT_LIMIT = 1 << 20

# Without O_NONBLOCK opening a FIFO waits for a writer. O_NOFOLLOW: what was checked is what is opened.
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"))


class NotRegularError(OSError):
    """What was to be read is a folder, a device, a FIFO or a socket."""


@contextmanager
def open_regular(
    path: Path, folder: Path, kind: type[Lfm2ExportError], *, real: Path | None = None
) -> Iterator[FileIO]:
    """A regular file of ``folder``, open for reading without a buffer; ``real``: where ``inside`` found it before.

    Raises:
        kind: it leads out of the folder, is no regular file, or cannot be read, also while it is being read.
    """
    try:
        with open_real(inside(path, folder, kind) if real is None else real) as file:
            yield file
    except OSError as error:
        raise unreadable(path, error, kind) from error


def open_real(path: Path) -> FileIO:
    """A regular file by its path without links, without ever waiting for anything but the disk.

    Raises:
        OSError: it cannot be opened; ``NotRegularError`` where it is something else. ``unreadable`` makes it a line.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # to open some devices is to use them
        raise NotRegularError(str(path))
    descriptor = os.open(path, _FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegularError(str(path))
    return FileIO(descriptor, "rb")


def unreadable(path: Path, error: OSError, kind: type[Lfm2ExportError]) -> Lfm2ExportError:
    """The line for a file that cannot be read."""
    if paths.is_folder(path, kind):
        return kind(f"{paths.shown(path)}: is a folder where a file is needed; move it away")
    if isinstance(error, NotRegularError):
        return kind(f"{paths.shown(path)}: is not a regular file; put the file itself there")
    return kind(f"{paths.shown(path)}: cannot be read ({error.strerror or error}); check the file and its rights")


def inside(path: Path, folder: Path, kind: type[Lfm2ExportError]) -> Path:
    """The file that ``path`` leads to, without links.

    Raises:
        kind: it lies outside of ``folder`` and of the Hub's cache that the folder belongs to.
    """
    real, root = paths.real(path, kind), paths.real(folder, kind)
    if real.is_relative_to(root) or real.parent in _blobs(root):
        return real
    raise kind(
        f"{paths.shown(path)}: is a link that leaves its folder (to {paths.shown(real, 100)}); put the file itself "
        "there"
    )


def _blobs(folder: Path) -> list[Path]:
    """Where the Hub's cache keeps the files of a snapshot, or of a folder in one."""
    return [above.parent / "blobs" for above in folder.parents if above.name == "snapshots"]


def read_bytes(path: Path, folder: Path, kind: type[Lfm2ExportError], *, limit: int) -> bytes:
    """A whole file of at most ``limit`` bytes.

    Raises:
        kind: as ``open_regular``, or it is larger.
    """
    with open_regular(path, folder, kind) as file:
        _check_size(path, os.fstat(file.fileno()).st_size, kind, limit)
        # Some special files state no size, and a file may grow: what is read is bounded as well.
        data = _read_up_to(file, limit + 1)
    _check_size(path, len(data), kind, limit)
    return data


def check(path: Path, folder: Path, kind: type[Lfm2ExportError], *, limit: int) -> None:
    """Opens a file that ``read_bytes``, or another library, will read; raises as ``read_bytes``."""
    with open_regular(path, folder, kind) as file:
        _check_size(path, os.fstat(file.fileno()).st_size, kind, limit)


def _check_size(path: Path, size: int, kind: type[Lfm2ExportError], limit: int) -> None:
    if size > limit:
        raise kind(
            f"{paths.shown(path)}: has {size} bytes, more than the {limit} that such a file may have; bring back the "
            "original"
        )


def _read_up_to(file: FileIO, limit: int) -> bytes:
    pieces: list[bytes] = []
    left = limit
    while left and (piece := file.read(min(left, 1 << 20))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def read_text(path: Path, folder: Path, kind: type[Lfm2ExportError], *, limit: int = TEXT_LIMIT) -> str:
    """A UTF-8 file.

    Raises:
        kind: as ``read_bytes``, or it is not UTF-8.
    """
    data = read_bytes(path, folder, kind, limit=limit)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise kind(f"{paths.shown(path)}: byte {error.start} is not UTF-8; bring back the original") from error


def read_own_text(path: Path, kind: type[Lfm2ExportError], *, limit: int, option: str) -> str:
    """A UTF-8 file that the user named after ``option``. It may be a link to anywhere; but a device or a pipe has no
    end to wait for.

    Raises:
        kind: there is none, or as ``read_text``.
    """
    real = paths.real(path, kind)
    found = paths.status(real, kind)
    if found is None:
        raise kind(f"{paths.shown(path)}: no such file; give {option} one that is there")
    if found.st_size > limit:
        raise kind(
            f"{paths.shown(path)}: has {human_bytes(found.st_size)}, more than the {human_bytes(limit)} of text that "
            "are read; cut a piece out of it"
        )
    data = read_bytes(path, real.parent, kind, limit=limit)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise kind(
            f"{paths.shown(path)}: is not UTF-8 text ({error.reason} at byte {error.start}); convert it"
        ) from error


def read_json_object(
    path: Path, folder: Path, kind: type[Lfm2ExportError], *, limit: int = JSON_LIMIT
) -> dict[str, Any]:
    """A JSON file that must hold an object. As transformers does, NaN and Infinity are taken for numbers.

    Raises:
        kind: as ``read_bytes``, or it is not JSON, or holds something else.
    """
    data = read_bytes(path, folder, kind, limit=limit)
    try:
        value = json_values.parse(data)
    except json_values.JsonError as error:
        raise kind(f"{paths.shown(path)}: {error}; bring back the original") from error
    if not isinstance(value, dict):
        raise kind(f"{paths.shown(path)}: holds {shown(value, 40)}, not a JSON object; bring back the original")
    return value
