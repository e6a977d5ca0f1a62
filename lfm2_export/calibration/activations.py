"""What layers hand on, kept in files: the residual stream of every token, float32 [rows, tokens, D].

In: batches of rows as a layer makes them. Out: the same for the next one. A layer reads one file and fills another, so
that what it was given is whole until it is done. The page cache holds them while there is room.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# Tokens that go through a layer at once.
BATCH_TOKENS = 2048


class Activations:
    """Files ``stream.0`` and ``stream.1`` of a folder, filled in turn."""

    def __init__(self, folder: Path, shape: tuple[int, int, int]):
        self._folder, self.shape = folder, shape
        self._row_bytes = 4 * shape[1] * shape[2]

    def batches(self) -> Iterator[slice]:
        """The rows of each batch."""
        step = max(1, BATCH_TOKENS // self.shape[1])
        return (slice(start, min(start + step, self.shape[0])) for start in range(0, self.shape[0], step))

    def read(self, layer: int, rows: slice) -> np.ndarray:
        """What goes into a layer, [B, T, D].

        Raises:
            OSError: the file is gone or short.
        """
        count = rows.stop - rows.start
        out = np.empty((count, *self.shape[1:]), np.float32)
        with open(self._path(layer), "rb", buffering=0) as file:
            file.seek(rows.start * self._row_bytes)
            view, done = out.data.cast("B"), 0
            while done < len(view):
                if not (found := file.readinto(view[done:])):
                    raise OSError(f"{self._path(layer)}: ends early")
                done += found
        return out

    def write(self, layer: int, rows: slice, values_BTD: np.ndarray) -> None:
        """Rows of what goes into a layer."""
        flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        with open(os.open(self._path(layer), flags, 0o600), "wb", buffering=0) as file:
            file.seek(rows.start * self._row_bytes)
            view = np.ascontiguousarray(values_BTD, np.float32).data.cast("B")
            while view:
                view = view[file.write(view) :]

    def sync(self, layer: int) -> None:
        """Returns once what goes into a layer is on the disk."""
        with open(self._path(layer), "rb") as file:
            os.fsync(file.fileno())

    def _path(self, layer: int) -> Path:
        return self._folder / f"stream.{layer % 2}"
