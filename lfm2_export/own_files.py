"""Writes a file that a user named: all of it, or nothing; only this user may read it.

In: a path and the bytes. Out: the file in place of what was there, by a rename. A link is followed to the file that it
leads to.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from lfm2_export import paths
from lfm2_export.errors import Lfm2ExportError, ResourceError
from lfm2_export.resources import is_disk_full

_MODE = 0o600


def write(path: Path, pieces: Iterable[bytes | memoryview], kind: type[Lfm2ExportError]) -> None:
    """Puts a file of these bytes at ``path``.

    Raises:
        ResourceError: the disk is full.
        kind: the file cannot be written there.
    """
    place = paths.real(path, kind)
    unfinished = place.with_name(f".{place.name[:200]}.{os.getpid()}.partial")
    try:
        if place.is_dir():
            raise IsADirectoryError(None, "is a folder")
        _write_new(unfinished, pieces)
        os.replace(unfinished, place)
    except OSError as error:
        raised = ResourceError if is_disk_full(error) else kind
        reason = error.strerror or error
        raise raised(f"{paths.shown(path)}: cannot be written ({reason}); give another file") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _write_new(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    path.unlink(missing_ok=True)  # of a killed process that had this number
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), _MODE)
    with open(descriptor, "wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())


def check_place(path: Path, kind: type[Lfm2ExportError]) -> None:
    """Whether a file can be put there, as far as it can be known beforehand.

    Raises:
        kind: its folder is missing or may not be written, or it is a folder.
    """
    place = paths.real(path, kind)
    if paths.is_folder(place, kind):
        raise kind(f"{paths.shown(path)}: is a folder; give the name of a file in it")
    if not paths.is_folder(place.parent, kind):
        raise kind(f"{paths.shown(path)}: there is no folder {paths.shown(place.parent, 80)}; make it first")
    if not os.access(place.parent, os.W_OK):
        raise kind(f"{paths.shown(path)}: nothing may be written into its folder; give another file")
