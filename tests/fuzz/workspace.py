"""Where a target's input is put before it is read: one folder for each process, emptied for each input.

``input`` holds what is read, ``private`` is the only place where readers may write (caches, temporary files), and
``outside`` is a file that no reader may reach: what links of inputs lead to instead of a file of this user.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

from tests.fuzz import bundle, guard


class Workspace:
    def __init__(self) -> None:
        root = Path(tempfile.mkdtemp(prefix="lfm2-fuzz-")).resolve()
        self.root, self.input, self.private, self.outside = root, root / "input", root / "private", root / "outside"
        self.private.mkdir()
        self.outside.write_bytes(b"secret")
        # The package's caches and whatever else is made on the way must not reach this user's own.
        os.environ["XDG_CACHE_HOME"] = os.environ["TMPDIR"] = tempfile.tempdir = str(self.private)
        # No compiler is found: to build our operators is no reader's work, and takes longer than an input may.
        os.environ["PATH"] = str(self.private)
        guard.install(self.input, self.private, self.outside)

    def empty(self) -> Path:
        """The input's folder, with nothing in it."""
        shutil.rmtree(self.input, ignore_errors=True)
        self.input.mkdir()
        return self.input

    def put(self, name: str, data: bytes) -> Path:
        """One file in the folder, in place of what had its name; the others stay."""
        path = self.input / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with open(path, "xb") as file:  # never through a link
            file.write(data)
        return path

    def put_bundle(self, folder: Path, data: bytes) -> None:
        """Several files in ``input`` or a folder of it."""
        bundle.write(folder, data, root=self.root)


@cache
def workspace() -> Workspace:
    """This process's."""
    return Workspace()
