"""Keeps the packed experts on disk while a .pte is put together, so that memory holds none of them.

In: the folder that the program is made in. Out: arrays whose bytes lie in files there, and a context in which
ExecuTorch's emitter takes those bytes from the files when it writes the program. Without it a mixture of experts is in
memory twice: once as the traced module's buffers, once as the program's constants; and experts are nine tenths of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
import os
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import numpy as np


class Spill:
    """A folder of its own below ``folder``; gone, with everything in it, at the end of the ``with`` block."""

    def __init__(self, folder: Path):
        self._parent = folder
        self._files: dict[int, Path] = {}

    def __enter__(self) -> Spill:
        self._folder = tempfile.TemporaryDirectory(prefix="experts.", dir=self._parent, ignore_cleanup_errors=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """A uint8 array to be filled once; ``let_go`` of it then. The disk is taken now, so that a full one is an
        error here and not a signal later."""
        path = Path(self._folder.name, str(len(self._files)))
        with open(path, "wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, prod(shape))
            else:
                file.truncate(prod(shape))
        array = np.memmap(path, np.uint8, "r+", shape=shape)
        self._files[array.ctypes.data] = path
        return array

    def let_go(self, array: np.ndarray) -> None:
        """Takes the array's pages out of this process; the array stays what it is, since the file is mapped shared."""
        held: mmap.mmap = array._mmap  # type: ignore[attr-defined]
        if hasattr(held, "madvise"):
            held.madvise(mmap.MADV_DONTNEED)

    @contextlib.contextmanager
    def emitting(self) -> Iterator[None]:
        """Within it, the emitter takes the constants that lie in files as ``FileBackedData``, which executorch copies
        into the program when that is written. Its interface has no place to say so: it calls ``bytes`` and ``hashlib``
        by these names."""
        from executorch.exir._serialize._cord import FileBackedData
        from executorch.exir.emit import _emitter

        def constant(array: Any) -> Any:
            path = self._files.get(ctypes.addressof(array))
            return bytes(array) if path is None else FileBackedData(str(path))

        def sha256(data: Any) -> Any:
            is_in_file = isinstance(data, FileBackedData)
            return SimpleNamespace(hexdigest=lambda: data.sha256().hex()) if is_in_file else hashlib.sha256(data)

        _emitter.bytes, _emitter.hashlib = constant, SimpleNamespace(sha256=sha256)
        try:
            yield
        finally:
            del _emitter.bytes
            _emitter.hashlib = hashlib
