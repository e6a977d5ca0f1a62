"""Ledgers: what of an export's large files is done, so that one that was killed can go on from there.

In: files of known sizes that are filled step by step, always in the same order, and the figures that each step gave.
Out: a small file beside them. Its first line says what is being made, each further one stands for a step. A line is
written once the step's bytes are on the disk, so neither a killed process nor a power cut leaves one for bytes that
were lost. A thread sees to that every few seconds: the work itself never waits for the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from lfm2_export.folders import Folder, UnexpectedKindError, is_plain_name

# What a killed export has to do again at most. Syncing more often makes the disk write shared blocks twice.
SYNC_SECONDS = 5.0

# Far above what the largest checkpoints fill; a larger file was not written here.
_LEDGER_BYTES = 64 << 20

Figures = Mapping[str, float]

_sync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)


class Ledger:
    """One ledger and its files; reading it changes nothing. Use as a context manager to fill the files.

    Entering makes the files, with zeros, unless ``done`` says that steps of an earlier export are in them. Leaving does
    not wait for the last lines.

    Args:
        path: the ledger's place; None for work that is not to be continued.
        root: the folder in which the files are made.
        sizes: the bytes of each file when it is complete, by its name relative to ``root``.
        key: says what the bytes follow from; a ledger with another key is worth nothing.
        steps: how many there are at most; a ledger with more of them is worth nothing.
        figures: the names of the figures of each step, None for any.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        root: Path,
        sizes: Mapping[str, int],
        key: str,
        steps: int | None = None,
        figures: Collection[str] | None = None,
    ):
        self._path, self._root, self._sizes = path, root, dict(sizes)
        self._header = json.dumps({"key": key, "files": self._sizes}).encode()
        # Of each step that is done, in the order of the work.
        self.done: tuple[Figures, ...] = tuple(_parse(self._lines(steps), figures))
        self._pending: deque[bytes] = deque()
        self._closing = threading.Event()
        self._complete = False
        self._error: OSError | None = None

    def _lines(self, steps: int | None) -> list[bytes]:
        """The whole ones after the header; none where key or files are others, or there are too many."""
        data = b"" if self._path is None else _read(self._path)
        if steps is not None and data.count(b"\n") > steps + 1:
            return []
        header, *lines = data.split(b"\n")
        sizes = {name: _size(self._root / name) for name in self._sizes}
        return lines[:-1] if header == self._header and sizes == self._sizes else []

    def __enter__(self) -> Ledger:
        if not self.done:
            self._start_anew()
        if self._path is not None:
            self._replace(self._path)
            files = [os.open(path, os.O_RDWR | os.O_APPEND | _NOFOLLOW) for path in (*self._files(), self._path)]
            threading.Thread(target=self._write_lines, args=(files,), name="ledger", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._complete = kind is None
        self._closing.set()

    def add(self, figures: Figures) -> None:
        """The next step is done: its bytes were written.

        Raises:
            OSError: bytes of earlier steps did not reach the disk.
        """
        if self._path is None:
            return
        if self._error is not None:
            raise OSError(self._error.errno, self._error.strerror, str(self._path)) from self._error
        self._pending.append(_line(figures))

    def _files(self) -> Iterator[Path]:
        return (self._root / name for name in self._sizes)

    def _start_anew(self) -> None:
        """The old ledger is gone for good before anything that it speaks of changes."""
        if self._path is not None:
            old = listed_files(self._path)
            self._path.unlink(missing_ok=True)
            _sync_folder(self._path.parent)
            for name in old:
                _remove(self._root, name)
        for name, size in self._sizes.items():
            file = os.open(self._root / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | _NOFOLLOW, 0o644)
            os.ftruncate(file, size)
            os.close(file)

    def _replace(self, path: Path) -> None:
        """A new ledger with the lines of the old one: neither a torn line of that nor its thread, should it still wait
        for the disk, gets into this one."""
        draft = path.with_suffix(".draft")
        draft.unlink(missing_ok=True)
        with open(draft, "xb") as file:
            file.write(self._header + b"\n")
            file.writelines(map(_line, self.done))
            file.flush()
            _sync(file.fileno())
        draft.replace(path)

    def _write_lines(self, files: Sequence[int]) -> None:
        """What the thread does; the last of ``files`` is the ledger."""
        try:
            while not self._closing.wait(SYNC_SECONDS):
                self._write_pending(files)
            if self._complete:
                self._write_pending(files)
        except OSError as error:
            self._error = error
        finally:
            for file in files:
                os.close(file)

    def _write_pending(self, files: Sequence[int]) -> None:
        count = len(self._pending)  # those that come while the files are being synced wait for the next time
        if not count:
            return
        *data, ledger = files
        for file in data:
            _sync(file)
        lines = memoryview(b"".join(self._pending.popleft() for _ in range(count)))
        while lines:
            lines = lines[os.write(ledger, lines) :]
        _sync(ledger)


def _line(figures: Figures) -> bytes:
    """Floats survive JSON bit by bit."""
    return json.dumps(dict(figures)).encode() + b"\n"


def listed_files(ledger: Path) -> list[str]:
    """The names of the files that a ledger speaks of, whatever its key; none where it cannot be read."""
    try:
        names = json.loads(_read(ledger).split(b"\n", 1)[0])["files"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
    return [name for name in names if is_plain_name(name)] if isinstance(names, dict) else []


def discard_unlisted(root: Path, ledgers: Path) -> None:
    """Removes the files below ``root`` that no ledger in the folder ``ledgers`` speaks of."""
    listed = {root / name for ledger in ledgers.iterdir() for name in listed_files(ledger)}
    for path in list(root.rglob("*")):
        if path not in listed and (path.is_symlink() or not path.is_dir()):
            path.unlink()


def _read(ledger: Path) -> bytes:
    """Nothing where there is none, or something else than a file of a ledger's size."""
    try:
        with Folder.open(ledger.parent) as folder:
            return folder.read(ledger.name, _LEDGER_BYTES)
    except (OSError, UnexpectedKindError):
        return b""


def _remove(root: Path, name: str) -> None:
    with (
        contextlib.suppress(FileNotFoundError, UnexpectedKindError),
        Folder.open(root) as folder,
        folder.parent_of(name) as (parent, last),
    ):
        parent.remove(last)


def _parse(lines: Iterable[bytes], names: Collection[str] | None) -> Iterator[Figures]:
    """Ends at the first line that is damaged: what comes after it was written later."""
    for line in lines:
        try:
            figures = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(figures, dict) or not all(isinstance(value, float) for value in figures.values()):
            return
        if names is not None and figures.keys() != set(names):
            return
        yield figures


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
