"""Where a target's input is put before it is read: one folder for each process, emptied for each input.

``input`` holds what is read, ``private`` is the only place where readers may write (caches, temporary files).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

from tests.fuzz import guard


class Workspace:
    def __init__(self) -> None:
        root = Path(tempfile.mkdtemp(prefix="lfm2-fuzz-")).resolve()
        self.input, self.private = root / "input", root / "private"
        self.private.mkdir()
        # The package's caches and whatever else is made on the way must not reach this user's own.
        os.environ["XDG_CACHE_HOME"] = os.environ["TMPDIR"] = tempfile.tempdir = str(self.private)
        # No compiler is found: to build our operators is no reader's work, and takes longer than an input may.
        os.environ["PATH"] = str(self.private)
        guard.install(self.input, self.private)

    def empty(self) -> Path:
        """The input's folder, with nothing in it."""
        shutil.rmtree(self.input, ignore_errors=True)
        self.input.mkdir()
        return self.input

    def put(self, name: str, data: bytes) -> Path:
        """One file in the folder; what lies there already stays."""
        path = self.input / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path


@cache
def workspace() -> Workspace:
    """This process's."""
    return Workspace()
