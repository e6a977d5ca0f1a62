"""A folder that changes all at once: files are made beside it and put into place together, or not at all.

In: the folder's path and files written under ``Staging.files``. Out: the folder with those files in it. One writer at a
time holds a lock. A new folder appears by one rename. Into an existing one files are moved one by one under a journal
(``journal``): a writer killed before the journal is there leaves the folder as it was, one killed later is finished by
the next writer. What a killed writer left behind is removed by the next, or taken up by it where both have the same
key. Where not even the first file can be moved, the folder stays what it was.

Only writers do any of this, and only with what a writer of this user left, links nowhere in it (``folders``). Readers
look whether a commit was begun (``unfinished``) and write nothing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from lfm2_export import interrupts, paths
from lfm2_export.errors import ArtifactError, ResourceError
from lfm2_export.folders import DRAFT, TAG, Folder, UnexpectedKindError, check_owner, describe, is_folder
from lfm2_export.journal import FILES, JOURNAL, Commit, Index, check_folder, check_writable
from lfm2_export.lock import held_lock

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Place:
    """Where a folder's new files, journal and lock are while it is being written: names in ``base``."""

    base: Path
    root: str
    lock: str

    @property
    def workspace(self) -> Path:
        return self.base / self.root


def _beside(folder: Path) -> _Place:
    return _Place(folder.parent, f".{folder.name}.{TAG}.partial", f".{folder.name}.{TAG}.lock")


def _inside(folder: Path) -> _Place:
    return _Place(folder, f".{TAG}.partial", f".{TAG}.lock")


def _begun(folder: Path) -> _Place | None:
    """Where a commit into it waits to be finished; looks through no link. A name too long for a workspace has none."""
    for place in (_inside(folder), _beside(folder)):
        with contextlib.suppress(OSError):
            if stat.S_ISDIR(os.lstat(place.workspace).st_mode) and os.lstat(place.workspace / JOURNAL):
                return place
    return None


def _place(folder: Path) -> _Place:
    """Where a commit waits to be finished. Else beside the folder; inside where renames from beside would fail (a mount
    point) or nothing may be made there."""
    if (begun := _begun(folder)) is not None:
        return begun
    if paths.is_folder(folder, ArtifactError) and (os.path.ismount(folder) or not os.access(folder.parent, os.W_OK)):
        return _inside(folder)
    return _beside(folder)


def unfinished(folder: Path) -> Path | None:
    """The workspace of a commit into ``folder`` that was begun and is not done; changes nothing.

    Raises:
        ArtifactError: the path cannot be looked at.
    """
    place = _begun(paths.real(folder, ArtifactError))
    return None if place is None else place.workspace


class Staging:
    """Use as a context manager; whatever was not committed is gone at its end, unless the machine had no room for it.

    Args:
        folder: where the files shall be in the end; it may or may not exist.
        index: the file that lists the others; it is put into place after them, so that it never names what is not
            there yet, and what only its predecessor lists is removed.
        into: folders in it that will be written to.
        key: says what the files follow from. The files of a killed writer with the same key are there on entering.

    Raises:
        ArtifactError: the folder is a file, cannot be written, or another process is writing to it; or what lies where
            files are made is not a writer's of this user.
        ResourceError: on leaving, where the disk was full.
    """

    def __init__(self, folder: Path, *, index: Index, into: Sequence[str] = (), key: str | None = None):
        self.folder = paths.real(folder, ArtifactError)
        # Whether entering has finished the commit of a writer with the same key.
        self.finished = False
        self._index, self._into, self._key = index, tuple(into), key
        self._ledgers_name = hashlib.sha256((key or "").encode()).hexdigest()
        self._place = _beside(self.folder)
        self._opened = contextlib.ExitStack()
        self._made_parents: list[Path] = []
        self._was_empty = self._kept = False
        self._owner: int | None = None  # of what is made here, once the workspace is ours

    @property
    def files(self) -> Path:
        """The folder in which the new files are made."""
        return self._place.workspace / FILES

    @property
    def ledgers(self) -> Path:
        """The folder for what writers with this key, and no others, tell the next about the files. It is never
        committed. What is called ``*.ledger`` in it says how far files are (``ledger``)."""
        return self._place.workspace / self._ledgers_name

    def __enter__(self) -> Staging:
        if paths.exists(self.folder, ArtifactError) and not paths.is_folder(self.folder, ArtifactError):
            raise ArtifactError(f"{paths.shown(self.folder)}: is a file; give a folder as --output")
        try:  # around all else that runs here: a signal may come in any line of it
            with self._translated():
                self._open()
            return self
        except BaseException:
            self._close()
            raise

    def _open(self) -> None:
        with interrupts.held_back():  # between these lines nobody would know yet what there is to remove
            self._made_parents = _make_parents(self.folder.parent)
        self._place = _place(self.folder)
        if paths.is_folder(self.folder, ArtifactError):
            check_writable(self.folder)
        self._base = self._opened.enter_context(Folder.open(self._place.base))
        if paths.is_folder(self.folder, ArtifactError):
            with Folder.open(self.folder) as folder:
                for name in self._into:
                    check_folder(folder, name, self._base)
        with interrupts.held_back():  # as above
            lock = self._opened.enter_context(held_lock(self._base, self._place.lock, self.folder))
            self._take_up(lock.owner)
            self._owner = lock.owner
        with contextlib.suppress(OSError):
            (self.folder / DRAFT).unlink()  # of figures that were being recorded by a killed process
        self._was_empty = not contents(self.folder)

    def _take_up(self, owner: int) -> None:
        """Finishes a commit that was begun, and keeps the files of a writer with the same key; all else goes."""
        found = self._base.status(self._place.root)
        if found is not None:
            _check_workspace(self._place.workspace, found, owner)
            with self._workspace() as root:
                if self._goes_on(root, owner):
                    return
            self._clear()
        self._base.make(self._place.root, 0o700)
        with self._workspace() as root:
            root.make(FILES)
            root.make(self._ledgers_name)

    def _clear(self) -> None:
        try:
            self._base.remove_tree(self._place.root)
        except OSError as error:
            raise ArtifactError(
                f"{paths.shown(self._place.workspace)}: what an interrupted export left cannot be removed "
                f"({error.strerror}); delete it and give the command again"
            ) from error

    def _goes_on(self, root: Folder, owner: int) -> bool:
        """Whether the files in a workspace are taken up."""
        ledgers = root.status(self._ledgers_name)
        same = self._key is not None and ledgers is not None and is_folder(ledgers)
        if root.status(JOURNAL) is None:
            return same and _is_as_made(root, owner)
        if paths.is_folder(self.folder, ArtifactError):
            with Folder.open(self.folder) as folder:
                commit = Commit(root, folder, self._index, owner)
                commit.check()
                commit.finish()
            logger.warning("%s: an export into it was interrupted in its last step, which is done now", self.folder)
            self.finished = same
        return False

    def _workspace(self) -> Folder:
        return self._base.child(self._place.root)

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
        ours = isinstance(name, str | Path) and Path(name).is_relative_to(self._place.workspace)
        return error if ours and isinstance(error, OSError) else None

    def commit(self) -> None:
        """Puts every file into place and removes those that only the former index lists; call it once, as the last
        step.

        Raises:
            ArtifactError: a file cannot be put there. Where that is the first one, the folder is as it was.
            ResourceError: the disk is full.
        """
        with self._translated(), self._workspace() as root:
            if self._was_empty and contents(self.folder):
                raise ArtifactError(
                    f"{paths.shown(self.folder)}: something else was put there meanwhile; give another --output"
                )
            if not self.folder.exists():
                root.move(FILES, self._base, self.folder.name)
                return
            with self._commit(root) as commit:
                commit.begin()
                try:
                    commit.finish()
                except OSError:
                    commit.take_back()
                    raise

    @contextlib.contextmanager
    def _commit(self, root: Folder) -> Iterator[Commit]:
        assert self._owner is not None, "enter it first"
        with Folder.open(self.folder) as folder:
            yield Commit(root, folder, self._index, self._owner)

    def _close(self, *, keep: bool = False) -> None:
        try:
            if self._owner is not None:
                self._finish_or_discard(keep)
        finally:
            self._owner = None
            self._opened.close()
        for parent in reversed(self._made_parents):
            try:
                parent.rmdir()
            except OSError:
                break

    def _finish_or_discard(self, keep: bool) -> None:
        """A commit that was interrupted is finished; where even that fails, its journal stays for the next writer."""
        with contextlib.suppress(OSError, UnexpectedKindError), self._workspace() as root:
            if root.status(JOURNAL) is not None and not self._is_settled(root):
                return
            self._kept = keep and any(self.ledgers.glob("*.ledger")) and any(self.files.rglob("*"))
        if not self._kept:
            with contextlib.suppress(OSError):
                self._base.remove_tree(self._place.root)

    def _is_settled(self, root: Folder) -> bool:
        with self._commit(root) as commit:
            try:
                commit.finish()
            except (OSError, UnexpectedKindError):
                return commit.take_back()
        return True

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._translate(error) from error
        except UnexpectedKindError as error:
            raise ArtifactError(f"{paths.shown(error.path)}: is {error.what}; move it away") from error

    def _translate(self, error: OSError) -> ArtifactError | ResourceError:
        if _begun(self.folder) is not None:
            place = Path(os.path.relpath(error.filename2 or error.filename or self.folder, self.folder))
            return (ArtifactError if _disk_error(error) is None else ResourceError)(
                f"{paths.shown(self.folder)}: not all new files could be put there ({paths.shown(place)}: "
                f"{error.strerror}); remove the cause, then give the same command again: "
                f"{paths.shown(self._place.root)} has the rest"
            )
        if self._kept:
            return ResourceError(
                f"{paths.shown(self.folder)}: the disk cannot take more ({error.strerror}); free space and give the "
                "same command again, which goes on from what is done, or delete "
                f"{paths.shown(self._place.workspace)}; what was there before is unchanged"
            )
        return _refusal(self.folder, error)


def _check_workspace(path: Path, found: os.stat_result, owner: int) -> None:
    try:
        if not is_folder(found):
            raise UnexpectedKindError(path, describe(found))
        check_owner(path, found, owner)
    except UnexpectedKindError as error:
        raise ArtifactError(
            f"{paths.shown(path)}: is {error.what} where an export makes its files; delete it and give the command "
            "again"
        ) from error


def _is_as_made(root: Folder, owner: int) -> bool:
    """Whether a workspace holds what an export puts there and nothing that leads elsewhere; another name of a file (a
    hard link) is to stay as it is."""
    try:
        root.child(FILES, make=True).close()  # a commit that was killed may have moved it as a whole
        return all(status.st_nlink <= 1 for status in root.files(owner).values())
    except UnexpectedKindError as error:
        logger.warning("%s: is %s; the export starts anew", paths.shown(error.path), error.what)
        return False


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[Folder]:
    """A folder in which single files may be replaced: no export writes to it meanwhile.

    Raises:
        ArtifactError: one does, or was interrupted in its last step; or the folder cannot be written.
        ResourceError: the disk is full.
    """
    folder = paths.real(folder, ArtifactError)
    check_writable(folder)
    place = _place(folder)
    if _begun(folder) is not None:
        raise ArtifactError(
            f"{paths.shown(folder)}: an export into it was interrupted or is under way; give the same export command "
            "again first, or wait for it"
        )
    try:
        with Folder.open(place.base) as base, held_lock(base, place.lock, folder), Folder.open(folder) as opened:
            yield opened
    except OSError as error:
        raise _refusal(folder, error) from error


def _refusal(folder: Path, error: OSError) -> ArtifactError | ResourceError:
    """The line for what could not be written, where nothing has changed."""
    if _disk_error(error) is not None:
        return ResourceError(
            f"{paths.shown(folder)}: the disk cannot take more ({error.strerror}); free space or give another "
            "--output; what was there before is unchanged"
        )
    return ArtifactError(f"{paths.shown(folder)}: cannot be written ({error.strerror}); give another --output")


def contents(folder: Path) -> list[str]:
    """The names in a folder, without this module's own; none where there is no folder."""
    place = _inside(folder)
    return sorted(set(os.listdir(folder)) - {place.root, place.lock, DRAFT}) if folder.is_dir() else []


def _make_parents(folder: Path) -> list[Path]:
    """Makes a folder and its parents; returns those that were made, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    nearest = missing[0].parent if missing else folder
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _disk_error(error: BaseException | None) -> OSError | None:
    """The error of a full disk among an exception and its causes."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return error
        error = error.__cause__ or error.__context__
    return None
