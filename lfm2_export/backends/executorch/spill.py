"""The files in which a program's weights lie while it is put together, as arrays that take no memory of their own.

In: the files of a ``PteStream``. Out: arrays whose bytes lie there, and a context in which ExecuTorch's emitter takes
a constant that fills a file from that file when it writes the program. Without it a mixture of experts would be in
memory twice: once as the traced module's buffers, once as the program's constants; and experts are nine tenths of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from lfm2_export.backends.weights.pieces import Placement


class Spill:
    """Maps of the files; the constants that lie in files of their own are those of all files but the first."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        # Copy on write: what is done to a tensor stays in this process, the files remain what their ledger says.
        self._maps = [np.memmap(path, np.uint8, "c") for path in paths]
        self._files = {array.ctypes.data: path for array, path in zip(self._maps[1:], paths[1:], strict=True)}

    def array(self, there: Placement) -> np.ndarray:
        """What lies in a place, without a step."""
        assert there.step is None
        part = np.asarray(self._maps[there.file])[there.offset : there.end]
        found: np.ndarray = part.view(there.dtype).reshape(there.shape)
        return found

    def sha256(self, there: Placement) -> str:
        """Of the whole file in which a constant lies, read without its map: pages of a map count as memory."""
        with open(self._paths[there.file], "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def let_go(self) -> None:
        """Takes the files' pages out of this process; the arrays stay what they are."""
        for array in self._maps:
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
