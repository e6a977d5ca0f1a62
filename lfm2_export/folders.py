"""Folders by handle: what lies below one is reached step by step from an open directory, and never through a link.

In: a folder, and plain names below it. Out: the files of those names, and no others: each step is opened relative to
the one before with ``O_NOFOLLOW``, so that a link which came with a download, or is put there meanwhile, leads nowhere.
Where the system has no such handles (Windows), each step is looked at before it is taken.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

# Of what a program makes for itself in or beside a folder of the user's.
TAG = "lfm2-export"
DRAFT = f".{TAG}.draft"

HANDLES = {os.open, os.mkdir, os.stat, os.rename, os.unlink} <= os.supports_dir_fd and os.scandir in os.supports_fd

_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
# O_PATH: a folder that may be searched but not listed can be gone through, too.
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0) | _NOFOLLOW
_LIST = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _NOFOLLOW
# A FIFO that takes a file's place just then must not be waited for.
_FILE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | _NOFOLLOW

# More than any folder of ours has.
_DEEPEST, _MOST_FILES = 16, 100_000


class UnexpectedKindError(Exception):
    """Something other than an own file or folder lies at ``path``; ``what`` says what."""

    def __init__(self, path: Path, what: str):
        super().__init__(f"{path}: is {what}")
        self.path, self.what = path, what


def is_plain_name(name: object) -> bool:
    """Whether ``name`` is a relative path with forward slashes that stays inside the folder it is relative to."""
    if not isinstance(name, str) or not name or set(name) & set("\\:\0"):
        return False
    return not any(part in ("", ".", "..") for part in name.split("/"))


class Folder:
    """An open directory; close it, or use it as a context manager. Errors of the system carry whole paths."""

    def __init__(self, path: Path, descriptor: int | None):
        self.path, self._descriptor = path, descriptor

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Links in the path itself are the user's, and followed; its last part must be none.

        Raises:
            OSError: it cannot be opened, or is no folder.
        """
        return cls(path, os.open(path, _FOLDER) if HANDLES else None)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _at(self, name: str) -> str:
        """One step, as the system calls take it beside ``dir_fd``."""
        assert name not in ("", ".", ".."), name
        assert "/" not in name, name
        assert self._descriptor is not None or not HANDLES, f"{self.path} is closed"
        return name if HANDLES else str(self.path / name)

    @contextlib.contextmanager
    def _named(self, name: str, target: Path | None = None) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            second = (None, str(target)) if target else ()
            raise OSError(error.errno, error.strerror, str(self.path / name), *second) from error

    def status(self, name: str) -> os.stat_result | None:
        """Of what lies there, of a link itself; None where nothing does."""
        with self._named(name):
            try:
                return os.stat(self._at(name), dir_fd=self._descriptor, follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                return None

    def child(self, name: str, *, make: bool = False) -> Folder:
        """A folder in it.

        Raises:
            UnexpectedKindError: something else lies there.
            OSError: nothing does, or it cannot be opened.
        """
        found = self.status(name)
        if found is None and make:
            self.make(name)
            found = self.status(name)
        if found is not None and not is_folder(found):
            raise UnexpectedKindError(self.path / name, describe(found))
        with self._named(name):
            if found is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            opened = os.open(self._at(name), _FOLDER, dir_fd=self._descriptor) if HANDLES else None
        return Folder(self.path / name, opened)

    @contextlib.contextmanager
    def parent_of(self, name: str, *, make: bool = False) -> Iterator[tuple[Folder, str]]:
        """The folder below this one that holds ``name``, and the last part of it; raises as ``child``."""
        *parts, last = name.split("/")
        with contextlib.ExitStack() as opened:
            here = self
            for part in parts:
                here = opened.enter_context(here.child(part, make=make))
            yield here, last

    def make(self, name: str, mode: int = 0o777) -> None:
        """A new folder in it."""
        with self._named(name):
            os.mkdir(self._at(name), mode, dir_fd=self._descriptor)

    def open_file(self, name: str, flags: int, mode: int = 0o666) -> int:
        """A descriptor of a regular file in it.

        Raises:
            UnexpectedKindError: something else lies there, which is not opened.
            OSError: as ``os.open``.
        """
        found = self.status(name)
        if found is not None and not is_file(found):
            raise UnexpectedKindError(self.path / name, describe(found))
        with self._named(name):
            descriptor = os.open(self._at(name), flags | _FILE, mode, dir_fd=self._descriptor)
        if not is_file(os.fstat(descriptor)):
            os.close(descriptor)
            raise UnexpectedKindError(self.path / name, "no file any more")
        return descriptor

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of a regular file of at most ``limit``; raises as ``open_file``, also where it is larger."""
        with open(self.open_file(name, os.O_RDONLY), "rb") as file:
            data = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else None
        if data is None or len(data) > limit:
            raise UnexpectedKindError(self.path / name, f"larger than {limit} bytes")
        return data

    def write(self, name: str, data: bytes) -> None:
        """A file with this content, which replaces what was there in one step."""
        self.remove(DRAFT)
        try:
            with open(self.open_file(DRAFT, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
                file.write(data)
            self.move(DRAFT, self, name)
        except BaseException:
            with contextlib.suppress(OSError):
                self.remove(DRAFT)
            raise

    def move(self, name: str, target: Folder, new_name: str) -> None:
        """Moves a file or folder; a file or link that was there is replaced."""
        with self._named(name, target.path / new_name):
            os.replace(
                self._at(name),
                target._at(new_name),
                src_dir_fd=self._descriptor,
                dst_dir_fd=target._descriptor,
            )

    def remove(self, name: str) -> None:
        """Removes a file, or a link itself; nothing where nothing is there."""
        with self._named(name), contextlib.suppress(FileNotFoundError):
            os.unlink(self._at(name), dir_fd=self._descriptor)

    def remove_tree(self, name: str) -> None:
        """Removes a folder with all that is in it, links themselves and not what they point to.

        Raises:
            OSError: something could not be removed.
        """
        with self._named(name):
            try:
                shutil.rmtree(self._at(name), dir_fd=self._descriptor)
            except FileNotFoundError:
                pass
            except RecursionError as error:
                raise OSError(errno.EINVAL, "folders in folders without end") from error

    def own_status(self) -> os.stat_result:
        """Of the folder itself."""
        return os.stat(self.path) if self._descriptor is None else os.fstat(self._descriptor)

    def files(self, owner: int) -> dict[str, os.stat_result]:
        """Every file below it by its relative name.

        Raises:
            UnexpectedKindError: a link, a special file or one of another owner is among them, or there is no end.
        """
        found: dict[str, os.stat_result] = {}
        self._collect(owner, "", found)
        return found

    def _collect(self, owner: int, prefix: str, found: dict[str, os.stat_result]) -> None:
        for name in self.names():
            if not is_plain_name(name):
                raise UnexpectedKindError(self.path / name, "of a name that no export gives")
            if len(found) >= _MOST_FILES or prefix.count("/") >= _DEEPEST:
                raise UnexpectedKindError(self.path / name, "one of more than any export makes")
            status = self.status(name)
            if status is None:
                continue
            check_owner(self.path / name, status, owner)
            if is_file(status):
                found[prefix + name] = status
            else:
                with self.child(name) as child:
                    child._collect(owner, f"{prefix}{name}/", found)

    def names(self) -> list[str]:
        """What is in it, sorted."""
        if self._descriptor is None:
            return sorted(os.listdir(self.path))
        with self._named("."):
            descriptor = os.open(".", _LIST, dir_fd=self._descriptor)
        try:
            return sorted(os.listdir(descriptor))
        finally:
            os.close(descriptor)


def check_owner(path: Path, status: os.stat_result, owner: int) -> None:
    """Raises ``UnexpectedKindError`` where something is another user's."""
    if status.st_uid != owner:
        raise UnexpectedKindError(path, "another user's")


def is_folder(status: os.stat_result) -> bool:
    """Whether this is a folder itself, not a link to one (on Windows: no junction either)."""
    return stat.S_ISDIR(status.st_mode) and not _is_junction(status)


def is_file(status: os.stat_result) -> bool:
    """Whether this is a regular file itself."""
    return stat.S_ISREG(status.st_mode) and not _is_junction(status)


def _is_junction(status: os.stat_result) -> bool:
    """Windows' other links to folders."""
    return getattr(status, "st_reparse_tag", 0) == getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", None)


def describe(status: os.stat_result) -> str:
    """What lies there, for a message."""
    kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file"}
    return "a link" if _is_junction(status) else kinds.get(stat.S_IFMT(status.st_mode), "a special file")
