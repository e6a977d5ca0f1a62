"""Sees what a reader does to the machine, and stops it: Python's audit events, watched while a reader runs.

A reader may write to this process's own scratch (``Workspace.private``: caches and temporary files), and nowhere else,
neither beside its input nor into it. It may follow no link out of its input's folder, start no program but Python and
reach no network. An event that breaks a rule raises before it takes place.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.fuzz.bundle import SAFE_DEVICES

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events that change a file or a folder, and which of their arguments are its places.
_CHANGES = {
    "os.rename": (0, 1),
    "os.link": (1,),
    "os.symlink": (1,),
    "os.remove": (0,),
    "os.mkdir": (0,),
    "os.rmdir": (0,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "os.chown": (0,),
    "os.utime": (0,),
    "os.setxattr": (0,),
    "os.removexattr": (0,),
}
_PROGRAMS = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn")
_FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "pickle.find_class")
_HARMLESS = ("/dev/null", "/dev/tty")


class Finding(BaseException):
    """A reader did what it may not. No ``Exception``: a reader that catches everything must not swallow it."""


class _Watch:
    """What is watched for now; audit hooks cannot be taken back, so there is one of them."""

    def __init__(self) -> None:
        self.active = False
        self.installed = False
        self.input_folder = self.scratch = "/nonexistent"
        self.outside: tuple[str, ...] = ()
        self.broken: list[str] = []

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if fault := self._fault(event, args):
            self.broken.append(fault)
            raise Finding(fault)

    def _fault(self, event: str, args: tuple[Any, ...]) -> str | None:
        if event == "open":
            return self._open(*args)
        if event in _CHANGES:
            places = [args[index] for index in _CHANGES[event]]
            return next((f"{event} of {place!r}" for place in places if not self._may_write(place)), None)
        if event in _PROGRAMS and sys.executable not in (args[0], *args[1:2]):
            return f"{event} {args[0]!r}"
        return f"{event} {args!r:.100}" if event in _FORBIDDEN else None

    def _open(self, path: object, mode: object, flags: int) -> str | None:
        if flags & _WRITING:
            return None if self._may_write(path) else f"opened {path!r} for writing"
        name = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        real = os.path.realpath(name) if name.startswith(self.input_folder) else name
        if real in self.outside or (real != name and not real.startswith(self.input_folder)):
            return f"opened {real!r}, outside of its input, by a link"
        return None

    def _may_write(self, place: object) -> bool:
        if isinstance(place, int):  # its opening was seen
            return True
        name = os.path.abspath(os.fsdecode(place)) if isinstance(place, (str, bytes, os.PathLike)) else ""
        return name in _HARMLESS or name.startswith(self.scratch)


_watch = _Watch()


def install(input_folder: Path, scratch: Path, outside: Path) -> None:
    """From now on ``watching`` watches, for readers of what lies in ``input_folder``; none may open ``outside``."""
    _watch.input_folder, _watch.scratch = str(input_folder.resolve()), str(scratch.resolve())
    _watch.outside = (str(outside.resolve()), *SAFE_DEVICES)
    if not _watch.installed:
        sys.addaudithook(_watch.hook)
        _watch.installed = True


@contextmanager
def watching() -> Iterator[None]:
    """Watches until the block ends.

    Raises:
        Finding: something was done that no reader may do, even if the reader caught what stopped it.
    """
    _watch.broken.clear()
    _watch.active = True
    try:
        yield
    finally:
        _watch.active = False
    if _watch.broken:
        raise Finding(_watch.broken[0])
