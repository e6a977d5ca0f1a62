"""Files put into a folder that exists already, under a journal, so that what a killed process leaves can be finished.

In: a workspace with the new files, an index among them (the manifest); the folder. Out: the folder with those files and
without the ones that only its former index listed. The journal is there from before the first move until after the
last. It names the files, the index by its hash and the workspace by a number that no download or copy of it has.

Files move in an order in which what was there before stays whole as long as it can: new names, then those that are
replaced, then removals, the index last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lfm2_export import paths
from lfm2_export.errors import ArtifactError
from lfm2_export.folders import TAG, Folder, UnexpectedKindError, describe, is_file, is_folder, is_plain_name

logger = logging.getLogger(__name__)

JOURNAL, FILES = "commit.json", "files"

_FORMAT = 1
_JOURNAL_BYTES, _INDEX_BYTES = 1 << 20, 64 << 20


@dataclass(frozen=True, kw_only=True)
class Index:
    """The file that lists a folder's others. ``sizes`` reads it: bytes by name; it raises ArtifactError. Files that are
    called as in ``unlisted`` come with it."""

    name: str
    sizes: Callable[[bytes], Mapping[str, int]]
    unlisted: tuple[str, ...] = ()

    def read(self, folder: Folder) -> bytes | None:
        """The bytes of the one in a folder; None where there is none."""
        return None if folder.status(self.name) is None else folder.read(self.name, _INDEX_BYTES)


@dataclass(frozen=True, kw_only=True)
class _Journal:
    """``workspace``: the inode of the folder that it was written in; ``index``: the hash of the new one."""

    workspace: int
    index: str
    files: tuple[str, ...]


class Commit:
    """One into ``folder`` from the workspace ``root``, both ``owner``'s."""

    def __init__(self, root: Folder, folder: Folder, index: Index, owner: int):
        self._root, self._folder, self._index, self._owner = root, folder, index, owner

    def begin(self) -> None:
        """Checks every place, then writes the journal: from here on ``finish`` may be given again and again.

        Raises:
            ArtifactError: a file cannot be put where it belongs; nothing has been changed.
        """
        names, data = self._waiting(), self._new_index()
        assert data is not None, f"no {self._index.name} was written"
        for name in (*names, *filter(self._is_there, self._obsolete(data))):
            check_place(self._folder, name, self._root)
        journal = {"format": _FORMAT, "workspace": self._inode(), "index": _sha256(data), "files": sorted(names)}
        self._root.write(JOURNAL, json.dumps(journal).encode())

    def finish(self) -> None:
        """Does what is left to do."""
        data = self._new_index()
        replaced, obsolete = {*self._listed_before(data), *self._index.unlisted}, self._obsolete(data)
        names = self._waiting().keys()
        with self._root.child(FILES, make=True) as files:
            for name in sorted(names - {self._index.name}, key=lambda name: (name in replaced, name)):
                self._put(files, name)
            for name in obsolete:
                self._drop(name)
            for name in names & {self._index.name}:
                self._put(files, name)
        self._root.remove(JOURNAL)

    def check(self) -> None:
        """Refuses a journal that was not written here, or cannot be finished any more.

        Raises:
            ArtifactError: the journal, a file or a place is not as ``begin`` left it.
        """
        try:
            reason = self._fault()
        except UnexpectedKindError as error:
            reason = f"{error.path.name!r} is {error.what}"
        except ArtifactError as error:
            reason = str(error).partition("; ")[0]
        if reason is not None:
            raise ArtifactError(
                f"{paths.shown(self._root.path)}: is no interrupted export of yours that can be finished "
                f"({reason[:200]}); delete it and give the command again"
            )

    def _fault(self) -> str | None:
        self._root.files(self._owner)  # looks at all of it
        journal = self._read()
        if journal.workspace != self._inode():
            return f"its {JOURNAL} was written elsewhere"
        waiting, data = self._waiting(), self._new_index()
        if data is None or _sha256(data) != journal.index:
            return f"the new {self._index.name} is gone"
        sizes = self._index.sizes(data)
        allowed = {*sizes, *self._index.unlisted, self._index.name}
        for name in sorted({*journal.files, *waiting}):
            if name not in allowed or _is_own(name):
                return f"its {self._index.name} does not list {name!r}"
        for name in journal.files:
            if name in waiting:
                check_place(self._folder, name, self._root)
            size = waiting.get(name, self._size_there(name))
            if size is None or size != sizes.get(name, size):
                return f"{name!r} is gone or another"
        return None

    def take_back(self) -> bool:
        """Removes a journal of which nothing has been done (files are moved before any is deleted); whether there is
        none now."""
        with contextlib.suppress(OSError, ArtifactError, UnexpectedKindError):
            if set(self._read().files) == set(self._waiting()):
                self._root.remove(JOURNAL)
        return self._root.status(JOURNAL) is None

    def _read(self) -> _Journal:
        try:
            raw = json.loads(self._root.read(JOURNAL, _JOURNAL_BYTES))
            journal = _Journal(workspace=raw["workspace"], index=raw["index"], files=tuple(raw["files"]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ArtifactError(f"its {JOURNAL} is damaged") from error
        if raw.get("format") != _FORMAT or not all(map(is_plain_name, journal.files)):
            raise ArtifactError(f"its {JOURNAL} is damaged, or another version's")
        return journal

    def _inode(self) -> int:
        return self._root.own_status().st_ino

    def _waiting(self) -> dict[str, int]:
        """The files that are still in the workspace, with their bytes."""
        with self._root.child(FILES, make=True) as files:
            return {name: status.st_size for name, status in files.files(self._owner).items()}

    def _new_index(self) -> bytes | None:
        """The new one, in the workspace or where it has been put; it is the last to go there."""
        with self._root.child(FILES, make=True) as files:
            data = self._index.read(files)
        return self._index.read(self._folder) if data is None else data

    def _listed_before(self, new_index: bytes | None) -> set[str]:
        """What the folder's former index lists; nothing once the new one has taken its place."""
        with contextlib.suppress(ArtifactError, UnexpectedKindError):
            data = self._index.read(self._folder)
            if data is not None and data != new_index:
                return set(self._index.sizes(data))
        return set()

    def _obsolete(self, new_index: bytes | None) -> list[str]:
        """What only the former index lists."""
        if new_index is None:
            return []
        kept = {*self._index.sizes(new_index), *self._index.unlisted, self._index.name}
        return sorted(name for name in self._listed_before(new_index) - kept if not _is_own(name))

    def _put(self, files: Folder, name: str) -> None:
        with files.parent_of(name) as (source, last), self._folder.parent_of(name, make=True) as (target, _):
            source.move(last, target, last)

    def _drop(self, name: str) -> None:
        if self._is_there(name):
            with self._folder.parent_of(name) as (parent, last):
                parent.remove(last)

    def _is_there(self, name: str) -> bool:
        """Whether there is a file that can be removed; what lies behind a link is left alone."""
        try:
            with self._folder.parent_of(name) as (parent, last):
                found = parent.status(last)
        except FileNotFoundError:
            return False
        except UnexpectedKindError as error:
            logger.warning(
                "%s: is not needed any more, but is left (%s is %s)",
                paths.shown(name),
                paths.shown(error.path),
                error.what,
            )
            return False
        return found is not None and not is_folder(found)

    def _size_there(self, name: str) -> int | None:
        """Of a regular file in the folder."""
        try:
            with self._folder.parent_of(name) as (parent, last):
                found = parent.status(last)
        except (FileNotFoundError, UnexpectedKindError):
            return None
        return found.st_size if found is not None and is_file(found) else None


def check_place(folder: Folder, name: str, workspace: Folder) -> None:
    """Refuses a place below ``folder`` where no file can be moved to from the workspace.

    Raises:
        ArtifactError: a folder lies there; or as ``check_folder``.
    """
    check_folder(folder, name.rpartition("/")[0], workspace, shown=name)
    with contextlib.suppress(FileNotFoundError), folder.parent_of(name) as (parent, last):
        if (found := parent.status(last)) is not None and is_folder(found):
            raise ArtifactError(
                f"{paths.shown(parent.path / last)}: is a folder where a file is needed; move it away, or give another "
                "--output"
            )


def check_folder(folder: Folder, name: str, workspace: Folder, *, shown: str | None = None) -> None:
    """Refuses a folder below ``folder`` (itself for an empty name) that takes no files from the workspace.

    Raises:
        ArtifactError: a link or a file stands in the way, or what there is cannot be written or is another file
            system's.
    """
    with contextlib.ExitStack() as opened:
        here = folder
        for part in filter(None, name.split("/")):
            found = here.status(part)
            if found is None:  # it will be made
                break
            if describe(found) == "a link":
                raise ArtifactError(
                    f"{paths.shown(folder.path)}: {(shown or name)!r} would be written outside of it, through the link "
                    f"{part!r}; give another --output"
                )
            if not is_folder(found):
                raise ArtifactError(
                    f"{paths.shown(here.path / part)}: is a file where a folder is needed; move it away, or give "
                    "another --output"
                )
            here = opened.enter_context(here.child(part))
        check_writable(here.path)
        if here.own_status().st_dev != workspace.own_status().st_dev:
            raise ArtifactError(
                f"{paths.shown(here.path)}: is on another file system than what is made; give another --output"
            )


def check_writable(folder: Path) -> None:
    """Refuses a folder that takes no new files."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ArtifactError(f"{paths.shown(folder)}: cannot be written; make it writable, or give another --output")


def _is_own(name: str) -> bool:
    """Whether this would be a part of a workspace or a lock."""
    return name.startswith(f".{TAG}.")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
