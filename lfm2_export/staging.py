"""A folder that changes all at once: files are made beside it and put into place together, or not at all.

In: the folder's path and files written under ``Staging.files``. Out: the folder with those files in it. One writer at a
time holds a lock. A new folder appears by one rename. Into an existing one files are moved one by one under a journal:
a writer killed before the journal is there leaves the folder as it was, one killed later is finished by whoever opens
the folder next (``recover``). What a killed writer left behind is removed by the next, or taken up by it where both
have the same key. Where not even the first file can be moved, the folder stays what it was.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from lfm2_export import paths
from lfm2_export.errors import ArtifactError, ResourceError

logger = logging.getLogger(__name__)

_TAG = "lfm2-export"


class Staging:
    """Use as a context manager; whatever was not committed is gone at its end, unless the machine had no room for it.

    Args:
        folder: where the files shall be in the end; it may or may not exist.
        last: the file that is put into place after all others, so that it never names what is not there yet.
        into: folders in it that will be written to.
        key: says what the files follow from. The files of a killed writer with the same key are there on entering.

    Raises:
        ArtifactError: the folder is a file, cannot be written, or another process is writing to it.
        ResourceError: on leaving, where the disk was full.
    """

    def __init__(self, folder: Path, *, last: str, into: Sequence[str] = (), key: str | None = None):
        self.folder = paths.real(folder, ArtifactError)
        self._last = last
        self._into = tuple(into)
        self._key = key
        self._was_empty = False
        self._made_parents: list[Path] = []
        self._kept = False
        self._lock: _Lock | None = None

    @property
    def files(self) -> Path:
        """The folder in which the new files are made."""
        return self._workspace.new_files

    @property
    def ledgers(self) -> Path:
        """The folder for what writers with this key, and no others, tell the next about the files. It is never
        committed. What is called ``*.ledger`` in it says how far files are (``ledger``)."""
        return self._workspace.root / hashlib.sha256((self._key or "").encode()).hexdigest()

    def __enter__(self) -> Staging:
        if paths.exists(self.folder, ArtifactError) and not self.folder.is_dir():
            raise ArtifactError(f"{self.folder}: is a file; give a folder as --output")
        try:
            self._open()
        except BaseException as error:
            self._close()
            if isinstance(error, OSError):
                raise self._translate(error) from error
            raise
        return self

    def _open(self) -> None:
        self._made_parents = _make_parents(self.folder.parent)
        for place in (self.folder, *(self.folder / name for name in self._into)):
            _check_writable(place)
        self._workspace = _workspace(self.folder)
        self._lock = _Lock(self._workspace.lock)
        if not self._lock.acquire():
            self._lock = None
            raise ArtifactError(
                f"{self.folder}: another export is writing to it; wait for it, or give another --output"
            )
        _finish(self._workspace, self.folder)
        if self._key is None or not self.ledgers.is_dir():
            shutil.rmtree(self._workspace.root, ignore_errors=True)
            self.files.mkdir(parents=True)
            self.ledgers.mkdir()
        self.files.mkdir(exist_ok=True)  # a commit that was killed may have moved it as a whole
        self._was_empty = not contents(self.folder)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Work that the machine had no room for goes on where it was once there is room.
        short = isinstance(error, ResourceError | MemoryError) or _disk_error(error) is not None
        self._close(keep=short and self._key is not None)
        if error is not None and (own_error := _disk_error(error) or self._own_error(error)) is not None:
            raise self._translate(own_error) from error

    def _own_error(self, error: BaseException) -> OSError | None:
        """An error about a file that was being made here; any other is its raiser's to explain."""
        name = getattr(error, "filename", None)
        ours = isinstance(name, str | Path) and Path(name).is_relative_to(self._workspace.root)
        return error if ours and isinstance(error, OSError) else None

    def commit(self, delete: Sequence[str] = ()) -> None:
        """Puts every file into place and then removes those named in ``delete``; call it once, as the last step.

        Raises:
            ArtifactError: a file cannot be put there. Where that is the first one, the folder is as it was.
            ResourceError: the disk is full.
        """
        try:
            self._commit(delete)
        except OSError as error:
            raise self._translate(error) from error

    def _commit(self, delete: Sequence[str]) -> None:
        if self._was_empty and contents(self.folder):
            raise ArtifactError(f"{self.folder}: something else was put there meanwhile; give another --output")
        if not self.folder.exists():
            os.replace(self.files, self.folder)
            return
        names = sorted(_walk(self.files))
        for place in [_destination(self.folder, name) for name in (*names, *delete)]:
            _check_replaceable(place)
        _write_journal(self._workspace, {"last": self._last, "delete": list(delete), "files": names})
        try:
            _finish(self._workspace, self.folder)
        except OSError:
            _drop_unused_journal(self._workspace)
            raise

    def _close(self, *, keep: bool = False) -> None:
        if self._lock is not None:
            try:
                self._finish_or_discard(keep)
            finally:
                self._lock.release()
                self._lock = None
        for parent in reversed(self._made_parents):
            try:
                parent.rmdir()
            except OSError:
                break

    def _finish_or_discard(self, keep: bool) -> None:
        """A commit that was interrupted is finished; where even that fails, its journal stays for ``recover``."""
        try:
            _finish(self._workspace, self.folder)
        except OSError:
            if not _drop_unused_journal(self._workspace):
                return
        self._kept = keep and any(self.ledgers.glob("*.ledger")) and any(_walk(self.files))
        if not self._kept:
            shutil.rmtree(self._workspace.root, ignore_errors=True)

    def _translate(self, error: OSError) -> ArtifactError | ResourceError:
        full = _disk_error(error) is not None
        if self._lock is not None and os.path.exists(self._workspace.journal):
            return (ResourceError if full else ArtifactError)(
                f"{self.folder}: not all new files could be put there ({error.filename2 or error.filename}: "
                f"{error.strerror}); remove the cause, then open the folder again: {self._workspace.root} has the rest"
            )
        if full and self._kept:
            return ResourceError(
                f"{self.folder}: the disk cannot take more ({error.strerror}); free space and give the same command "
                f"again, which goes on from what is done, or delete {self._workspace.root}; what was there before is "
                "unchanged"
            )
        if full:
            return ResourceError(
                f"{self.folder}: the disk cannot take more ({error.strerror}); free space or give another --output; "
                "what was there before is unchanged"
            )
        return ArtifactError(f"{paths.shown(self.folder)}: cannot be written ({error.strerror}); give another --output")


def recover(folder: Path) -> None:
    """Finishes a commit that was killed halfway, and waits for one that is under way.

    One of which nothing has been done yet, and which cannot be finished here, is left to the next export: the folder
    is what it was before.

    Raises:
        ArtifactError: a commit is half done but the folder cannot be written.
    """
    folder = paths.real(folder, ArtifactError)
    for workspace in (_beside(folder), _inside(folder)):
        if os.path.exists(workspace.journal):  # a name too long for one has none
            _recover(workspace, folder)


def _recover(workspace: _Workspace, folder: Path) -> None:
    try:
        lock = _Lock(workspace.lock)
        lock.acquire(wait=True)
        try:
            _finish(workspace, folder)
            shutil.rmtree(workspace.root, ignore_errors=True)
        finally:
            lock.release()
    except OSError as error:
        if not os.path.exists(workspace.journal):
            return
        if _is_unused(workspace):
            logger.warning("%s: a killed export into it cannot be finished (%s)", folder, error.strerror)
            return
        raise ArtifactError(
            f"{folder}: an export into it was killed halfway and cannot be finished ({error.strerror}); "
            f"open it once with the right to write to {workspace.root.parent}"
        ) from error


def contents(folder: Path) -> list[str]:
    """The names in a folder, without this module's own; none where there is no folder."""
    workspace = _inside(folder)
    own = {workspace.root.name, workspace.lock.name}
    return sorted(set(os.listdir(folder)) - own) if folder.is_dir() else []


def is_plain_name(name: object) -> bool:
    """Whether ``name`` is a relative path with forward slashes that stays inside the folder it is relative to."""
    if not isinstance(name, str) or not name or set(name) & set("\\:\0"):
        return False
    return not any(part in ("", ".", "..") for part in name.split("/"))


@dataclass(frozen=True)
class _Workspace:
    """Where a folder's new files, journal and lock are while it is being written."""

    root: Path
    lock: Path

    @property
    def new_files(self) -> Path:
        return self.root / "files"

    @property
    def journal(self) -> Path:
        return self.root / "commit.json"


def _workspace(folder: Path) -> _Workspace:
    """Beside the folder; inside where renames from beside would fail (a mount point) or nothing may be made there."""
    if folder.is_dir() and (os.path.ismount(folder) or not os.access(folder.parent, os.W_OK)):
        return _inside(folder)
    return _beside(folder)


def _beside(folder: Path) -> _Workspace:
    return _Workspace(folder.parent / f".{folder.name}.{_TAG}.partial", folder.parent / f".{folder.name}.{_TAG}.lock")


def _inside(folder: Path) -> _Workspace:
    return _Workspace(folder / f".{_TAG}.partial", folder / f".{_TAG}.lock")


def _make_parents(folder: Path) -> list[Path]:
    """Makes a folder and its parents; returns those that were made, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    nearest = missing[0].parent if missing else folder
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _check_writable(folder: Path) -> None:
    """Refuses what is there and takes no new files; a missing folder will be made."""
    if not paths.exists(folder, ArtifactError):
        return
    if not paths.is_folder(folder, ArtifactError):
        raise ArtifactError(f"{folder}: is a file where a folder is needed; move it away, or give another --output")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ArtifactError(f"{folder}: cannot be written; make it writable, or give another --output")


def _check_replaceable(path: Path) -> None:
    """Refuses a place where no file can be put, before any other has been."""
    _check_writable(path.parent)
    if paths.is_folder(path, ArtifactError):
        raise ArtifactError(f"{path}: is a folder where a file is needed; move it away, or give another --output")


def _write_journal(workspace: _Workspace, journal: dict[str, object]) -> None:
    draft = workspace.root / "draft.json"
    draft.write_text(json.dumps(journal), encoding="utf-8")
    os.replace(draft, workspace.journal)


def _finish(workspace: _Workspace, folder: Path) -> None:
    """Does what a journal asks for, or what is left of it."""
    if not workspace.journal.exists():
        return
    last, delete, _ = _read_journal(workspace)
    for name in sorted(_walk(workspace.new_files), key=lambda name: (name == last, name)):
        path = _destination(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(workspace.new_files / name, path)
    for name in delete:
        _destination(folder, name).unlink(missing_ok=True)
    workspace.journal.unlink()


def _is_unused(workspace: _Workspace) -> bool:
    """Whether nothing of what a journal asks for has been done: files are moved before any is deleted."""
    try:
        return set(_read_journal(workspace)[2]) == set(_walk(workspace.new_files))
    except OSError:
        return False


def _drop_unused_journal(workspace: _Workspace) -> bool:
    """Takes a journal back of which nothing has been done; whether it could be."""
    if not _is_unused(workspace):
        return False
    with contextlib.suppress(OSError):
        workspace.journal.unlink()
    return not os.path.exists(workspace.journal)


def _read_journal(workspace: _Workspace) -> tuple[str, list[str], list[str]]:
    """The file to move last, those to delete, and all that are to be moved."""
    try:
        journal = json.loads(workspace.journal.read_text(encoding="utf-8"))
        return str(journal["last"]), list(map(str, journal["delete"])), list(map(str, journal["files"]))
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{workspace.journal}: is damaged; delete the folder that it is in") from error


def _destination(folder: Path, name: str) -> Path:
    """Where a file goes. A journal may come with a folder from elsewhere, so it must not reach out of the folder."""
    path = folder / name
    if not is_plain_name(name) or not path.parent.resolve().is_relative_to(folder):
        raise ArtifactError(f"{folder}: {name!r} would be written outside of it; give another --output")
    return path


def _walk(folder: Path) -> Iterator[str]:
    """Every file below ``folder``, as a relative name with forward slashes."""
    return (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _disk_error(error: BaseException | None) -> OSError | None:
    """The error of a full disk among an exception and its causes."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return error
        error = error.__cause__ or error.__context__
    return None


class _Lock:
    """A lock file, held by at most one process and let go by the system when that process dies."""

    def __init__(self, path: Path):
        self._path = path
        self._descriptor: int | None = None

    def acquire(self, *, wait: bool = False) -> bool:
        """Whether the lock is held now; without ``wait`` another holder is no reason to stay."""
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            if not _lock_descriptor(descriptor, wait):
                os.close(descriptor)
                return False
            if self._is_current(descriptor):
                self._descriptor = descriptor
                return True
            os.close(descriptor)  # the holder before us removed the file while we waited for it

    def release(self) -> None:
        """Removes the file, then lets go: whoever opened it meanwhile notices that it is gone."""
        if self._descriptor is None:
            return
        if sys.platform != "win32":  # there an open file cannot be removed; it stays behind, empty
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False


if sys.platform == "win32":
    import msvcrt

    def _lock_descriptor(descriptor: int, wait: bool) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _lock_descriptor(descriptor: int, wait: bool) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        return True  # a file system without locks: two exports at once are then the user's to avoid
