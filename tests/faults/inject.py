"""Faults of disk, memory and clock, from within the process that meets them.

In: a ``Fault`` and the folder in which it strikes. Out: the same process, whose ``os`` functions fail or kill it when
their turn comes. Files are read and written by Python's own implementation of ``io`` (``_pyio``), which goes through
``os.read`` and ``os.write``: so every call that reaches the system from Python is counted, and nothing has to be
preloaded, mounted or traced. What a library does in its own code (a session that maps its data file, torch's caches)
is not seen.
"""

from __future__ import annotations

import _pyio
import builtins
import errno
import functools
import io
import itertools
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What changes files, by the name of a function in ``os``. The clean-up after a failure (rmdir, unlink) needs no space.
GROWING = (
    "write",
    "pwrite",
    "mkdir",
    "ftruncate",
    "truncate",
    "sendfile",
    "copy_file_range",
    "posix_fallocate",
    "fsync",
)
CHANGING = (*GROWING, "replace", "rename", "unlink", "rmdir", "link", "symlink", "utime", "chmod")
READING = ("read", "pread", "preadv", "readv")
_TARGET_FIRST = {"sendfile": 0, "copy_file_range": 1}
YEAR = 365 * 24 * 3600


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong. ``at``: the number of the call, from 0; None: never, the calls are only counted.

    ``kind``: "full" (ENOSPC at a call that needs space), "unreadable" (EIO at a read), "killed" (SIGKILL before a call
    that changes something), "read-only" (EROFS at any change below ``place``), "memory" (``at`` more MB of address
    space than now), "clock" (each look at it is years away from the last).
    """

    kind: str
    at: int | None = None
    place: str = ""


def use_python_io() -> None:
    """Before anything imports ``io``'s classes by name."""
    io.FileIO = _pyio.FileIO  # type: ignore[misc]


class Injector:
    """``install`` puts a fault in place; ``count`` says how often its turn could have come."""

    def __init__(self, fault: Fault, root: str):
        self._fault, self._root = fault, os.path.realpath(root) + os.sep
        self.count = 0

    def install(self) -> None:
        builtins.open = io.open = _pyio.open  # type: ignore[assignment]
        match self._fault.kind:
            case "full":
                self._watch(GROWING, self._fails(errno.ENOSPC))
                self._watch_open(self._fails(errno.ENOSPC))
            case "unreadable":
                self._watch(READING, self._fails(errno.EIO))
            case "killed":
                self._watch(CHANGING, self._kills)
                self._watch_open(self._kills)
            case "read-only":
                self._root = os.path.realpath(self._fault.place)
                self._watch(CHANGING, self._refuses)
                self._watch_open(self._refuses)
            case "memory":
                assert self._fault.at is not None
                held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
                resource.setrlimit(resource.RLIMIT_AS, (held + (self._fault.at << 20),) * 2)
            case "clock":
                jumps = itertools.cycle((0, 3 * YEAR, -2 * YEAR, 3600, -5 * YEAR))
                now, now_ns = time.time, time.time_ns
                time.time = lambda: now() + next(jumps)
                time.time_ns = lambda: now_ns() + next(jumps) * 10**9
            case kind:
                raise ValueError(kind)

    # What happens at a call

    def _fails(self, code: int) -> Callable[[str], None]:
        def strike(path: str) -> None:
            if self._is_its_turn():
                raise OSError(code, os.strerror(code), path)

        return strike

    def _kills(self, path: str) -> None:
        if self._is_its_turn():
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

    def _refuses(self, path: str) -> None:
        self.count += 1
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    def _is_its_turn(self) -> bool:
        self.count += 1
        return self.count - 1 == self._fault.at

    # Which calls are meant

    def _watch(self, names: tuple[str, ...], strike: Callable[[str], None]) -> None:
        for name in names:
            if real := getattr(os, name, None):
                setattr(os, name, self._watched(name, real, strike))

    def _watched(self, name: str, real: Callable[..., Any], strike: Callable[[str], None]) -> Callable[..., Any]:
        @functools.wraps(real)
        def call(*args: Any, **options: Any) -> Any:
            at = args[_TARGET_FIRST.get(name, 0)]
            folder = next((options[key] for key in ("dir_fd", "src_dir_fd") if options.get(key) is not None), None)
            if (path := self._inside(at, folder)) is not None:
                strike(path)
            return real(*args, **options)

        return call

    def _watch_open(self, strike: Callable[[str], None]) -> None:
        real = os.open

        @functools.wraps(real)
        def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            if flags & os.O_CREAT and (place := self._inside(path, dir_fd)) is not None:
                strike(place)
            return real(path, flags, mode, dir_fd=dir_fd)

        os.open = opened

    def _inside(self, place: Any, folder: int | None) -> str | None:
        """The path of a descriptor or a name, where it is below the root."""
        try:
            if isinstance(place, int):
                path = os.readlink(f"/proc/self/fd/{place}")
            else:
                base = os.getcwd() if folder is None else os.readlink(f"/proc/self/fd/{folder}")
                path = os.path.join(base, os.fsdecode(place))
        except OSError:
            return None
        return path if (path + os.sep).startswith(self._root) else None
