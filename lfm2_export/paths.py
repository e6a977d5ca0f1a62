"""What lies at a path, said by one of our errors where the system cannot say it.

In: a path as a user, an index or a manifest gives it. Out: whether something is there. ``Path.is_dir()`` and
``exists()`` raise where a folder may not be searched or a name is too long, and ``realpath`` raises where it holds a
NUL; here each of these is one line of the kind that the caller names.
"""

from __future__ import annotations

import heapq
import itertools
import os
import stat
from collections.abc import Callable
from pathlib import Path

from lfm2_export.errors import Lfm2ExportError
from lfm2_export.messages import printable

_SHOWN = 200
# Looking at so many takes less than a second.
MOST_NAMES = 500_000


def status(path: str | Path, kind: type[Lfm2ExportError]) -> os.stat_result | None:
    """``os.stat``, links followed; None where nothing is there.

    Raises:
        kind: the path is no possible name, or what is there may not be looked at.
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise unusable(path, error, kind) from error


def exists(path: str | Path, kind: type[Lfm2ExportError]) -> bool:
    """Whether anything is there; raises as ``status``."""
    return status(path, kind) is not None


def is_folder(path: str | Path, kind: type[Lfm2ExportError]) -> bool:
    """Whether a folder is there; raises as ``status``."""
    found = status(path, kind)
    return found is not None and stat.S_ISDIR(found.st_mode)


def is_file(path: str | Path, kind: type[Lfm2ExportError]) -> bool:
    """Whether a regular file is there; raises as ``status``."""
    found = status(path, kind)
    return found is not None and stat.S_ISREG(found.st_mode)


def names(
    folder: Path, kind: type[Lfm2ExportError], wanted: Callable[[str], object] = bool, most: int = MOST_NAMES
) -> list[str]:
    """The first ``most`` names in a folder, sorted, of those that are ``wanted`` (default: all).

    Raises:
        kind: it may not be read, or holds more names than can be looked at.
    """
    try:
        with os.scandir(folder) as entries:
            found = [entry.name for entry in itertools.islice(entries, MOST_NAMES) if wanted(entry.name)]
            more = next(entries, None) is not None
    except OSError as error:
        raise unusable(folder, error, kind) from error
    if more:
        raise kind(f"{shown(folder)}: holds more than {MOST_NAMES} files; give the folder of one model alone")
    return heapq.nsmallest(most, found)


def real(path: str | Path, kind: type[Lfm2ExportError]) -> Path:
    """The path without links; raises as ``status``."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise unusable(path, error, kind) from error


def unusable(path: str | Path, error: OSError | ValueError, kind: type[Lfm2ExportError]) -> Lfm2ExportError:
    """The line for a path that the system takes no look at."""
    reason = error.strerror if isinstance(error, OSError) else error
    return kind(f"{shown(path)}: cannot be looked at ({reason}); check the name and the rights of its folders")


def shown(path: str | Path, limit: int = _SHOWN) -> str:
    """A path for a message: whole unless it is absurdly long, on one line whatever it holds."""
    return printable(str(path), limit)
