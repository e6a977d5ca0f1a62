"""Where statistics are collected: a folder beside the file that they become, from which a killed collection goes on.

In: the file's place and a key that says what its bytes follow from. Out: a folder that is ours alone, how far it is
(``State``), and in the end the file, put into place by one rename. The state is written once the bytes that it speaks
of are on the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lfm2_export import dataclass_json, json_values, paths
from lfm2_export.errors import ArtifactError, CalibrationError, ResourceError
from lfm2_export.folders import TAG, Folder, UnexpectedKindError
from lfm2_export.lock import Lock
from lfm2_export.resources import is_disk_full

STATE = "state.json"
_STATE_BYTES = 16 << 20
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)


@dataclass(frozen=True, kw_only=True)
class State:
    """How far a collection is: ``steps`` of it are done; ``seen`` and ``averaged`` as in ``statistics.Description``."""

    key: str
    steps: int = 0
    seen: Mapping[str, int] = field(default_factory=dict)
    averaged: tuple[str, ...] = ()


class Workspace:
    """The folder of one collection; ``state`` is where it begins."""

    def __init__(self, folder: Path, state: State):
        self.folder, self.state = folder, state

    @property
    def data(self) -> Path:
        """The file of statistics while it is being filled."""
        return self.folder / "statistics"

    def save(self, state: State) -> None:
        """Call it once what the state speaks of is on the disk."""
        draft = self.folder / f"{STATE}.draft"
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW, 0o600), "w") as file:
            json.dump(dataclass_json.encode(state), file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.folder / STATE)
        self.state = state

    def open_data(self, nbytes: int) -> int:
        """A descriptor of the data file, which has its full size from the beginning."""
        descriptor = os.open(self.data, os.O_RDWR | os.O_CREAT | _NOFOLLOW, 0o644)
        os.ftruncate(descriptor, nbytes)
        return descriptor

    def finish(self, path: Path) -> None:
        """Puts the file into its place."""
        os.replace(self.data, path)


@contextlib.contextmanager
def workspace(path: Path, key: str) -> Iterator[Workspace]:
    """The workspace for ``path``. What a killed process with the same key has done is there. The folder goes at the
    end, but for a process that is killed or has no room: then the next one with the same key goes on.

    Raises:
        CalibrationError: something else is in its place, or another process is at it.
        ResourceError: the disk is full.
    """
    path = paths.real(path, CalibrationError)
    folder = path.parent / f".{path.name}.{TAG}.partial"
    try:
        with Folder.open(path.parent) as base, _locked(base, path):
            _make(folder)
            with _cleared(folder):
                yield Workspace(folder, _state(folder, key))
    except UnexpectedKindError as error:
        raise CalibrationError(f"{paths.shown(error.path)}: is {error.what}; move it away") from error
    except OSError as error:
        if is_disk_full(error):
            raise ResourceError(
                f"{paths.shown(path)}: the disk cannot take the statistics ({error.strerror}); free space and give the "
                "same command again, which goes on from what is done"
            ) from error
        raise CalibrationError(
            f"{paths.shown(path)}: the statistics cannot be written there ({error.strerror or error}); give another "
            "--statistics"
        ) from error


@contextlib.contextmanager
def _locked(base: Folder, path: Path) -> Iterator[None]:
    lock = Lock(base, f".{path.name}.{TAG}.lock")
    if not lock.acquire():
        raise CalibrationError(
            f"{paths.shown(path)}: another process is collecting these statistics; wait for it, or give another "
            "--statistics"
        )
    try:
        yield
    finally:
        lock.release()


def _make(folder: Path) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    found = os.lstat(folder)
    is_ours = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
    if not stat.S_ISDIR(found.st_mode) or not is_ours:
        raise CalibrationError(
            f"{paths.shown(folder)}: is no folder of yours where statistics are collected; delete it and give the "
            "command again"
        )


@contextlib.contextmanager
def _cleared(folder: Path) -> Iterator[None]:
    keep = False
    try:
        yield
    except (ResourceError, MemoryError):
        keep = True
        raise
    except OSError as error:
        keep = is_disk_full(error)
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _state(folder: Path, key: str) -> State:
    """What was done with this key; else an empty folder and nothing done."""
    with (
        contextlib.suppress(OSError, UnexpectedKindError, ArtifactError, json_values.JsonError),
        Folder.open(folder) as opened,
    ):
        found: State = dataclass_json.decode(State, json_values.parse(opened.read(STATE, _STATE_BYTES)))
        if found.key == key and found.steps > 0:
            return found
    for left in list(folder.iterdir()):
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    return State(key=key)
