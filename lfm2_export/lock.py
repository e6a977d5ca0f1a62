"""A lock file, held by at most one process and let go by the system when that process dies.

In: a folder and a name. Out: whether the lock is held. The file is made here and by no link: one that a dead process
left is replaced, anything else of that name is refused. So its owner is whoever this process is for that file system
(a network share may know root under another id).

Not filelock's: that opens a path rather than a name below a folder's handle, and takes a pipe, or a file that others
made, for its lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from lfm2_export import paths
from lfm2_export.errors import ArtifactError
from lfm2_export.folders import Folder, UnexpectedKindError

_REPLACEABLE = sys.platform != "win32"  # there an open file cannot be removed; one that is left stays, empty


@contextlib.contextmanager
def held_lock(base: Folder, name: str, folder: Path) -> Iterator[Lock]:
    """The lock of who writes to ``folder``.

    Raises:
        ArtifactError: another process holds it, or something else is in its place.
        OSError: it cannot be made.
    """
    lock = Lock(base, name)
    try:
        held = lock.acquire()
    except UnexpectedKindError as error:
        raise ArtifactError(
            f"{paths.shown(error.path)}: is {error.what} where an export keeps its lock; delete it and give the "
            "command again"
        ) from error
    if not held:
        raise ArtifactError(
            f"{paths.shown(folder)}: another export is writing to it; wait for it, or give another --output"
        )
    try:
        yield lock
    finally:
        lock.release()


class Lock:
    """Not held yet; ``owner`` is of use once it is."""

    def __init__(self, folder: Folder, name: str):
        self._folder, self._name = folder, name
        self._descriptor: int | None = None
        self.owner = -1

    def acquire(self) -> bool:
        """Whether the lock is held now; another holder is not waited for.

        Raises:
            UnexpectedKindError: a link or a special file is where the lock should be.
            OSError: it cannot be made.
        """
        while True:
            descriptor, made = self._open()
            if descriptor is None:
                continue
            if not _lock_descriptor(descriptor):
                os.close(descriptor)
                return False
            if self._is_current(descriptor):
                if made or not _REPLACEABLE:
                    self._descriptor, self.owner = descriptor, os.fstat(descriptor).st_uid
                    return True
                self._remove(descriptor)
            os.close(descriptor)  # removed, by us or by its last holder, while we waited for it

    def _open(self) -> tuple[int | None, bool]:
        """The file, and whether it was made here; None where it has just gone."""
        try:
            return self._folder.open_file(self._name, os.O_RDWR | os.O_CREAT | os.O_EXCL), True
        except FileExistsError:
            pass
        try:
            return self._folder.open_file(self._name, os.O_RDWR), False
        except FileNotFoundError:
            return None, False

    def _remove(self, descriptor: int) -> None:
        try:
            self._folder.remove(self._name)
        except OSError:
            os.close(descriptor)
            raise

    def release(self) -> None:
        """Removes the file, then lets go: whoever opened it meanwhile notices that it is gone."""
        if self._descriptor is None:
            return
        if _REPLACEABLE:
            with contextlib.suppress(OSError):
                self._folder.remove(self._name)
        os.close(self._descriptor)
        self._descriptor = None

    def _is_current(self, descriptor: int) -> bool:
        found = self._folder.status(self._name)
        return found is not None and os.path.samestat(os.fstat(descriptor), found)


if sys.platform == "win32":
    import msvcrt

    def _lock_descriptor(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _lock_descriptor(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        return True  # a file system without locks: two exports at once are then the user's to avoid
