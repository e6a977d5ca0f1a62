"""What is done while something goes wrong, and what must hold afterwards whatever it was.

In: a scenario and a fault. Out: what was found wrong, a text each. An export that failed or was killed has lost
nothing: the artifact is the old one, the new one, or says that the same command finishes it; the command's code and
line say what happened; and that same command, given again, leaves byte for byte what an undisturbed export leaves.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lfm2_export.artifact import Artifact
from lfm2_export.errors import ArtifactError
from tests.artifacts import snapshot
from tests.checkpoints import write_random_checkpoint
from tests.faults import ready
from tests.faults.forks import Done, Forks
from tests.faults.inject import Fault

LONGEST_LINE = 400
FULL, KILLED, UNREADABLE = "full", "killed", "unreadable"
CODES = {FULL: {0, 3}, UNREADABLE: {0, 2, 3}, KILLED: {-9}, "memory": {0, 3}, "read-only": {0}, "clock": {0}}
SAYS = {FULL: os.strerror(errno.ENOSPC), UNREADABLE: os.strerror(errno.EIO), "memory": "memory"}

ONNX, PTE = ("--scheme", "q4"), ("--backend", "executorch", "--scheme", "8da4w", "--max-context", "64")
# The command, and the commands whose artifact is there already.
EXPORTS: dict[str, tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]] = {
    "onnx": (ONNX, ()),
    "onnx, added": (ONNX, (("--scheme", "q8"),)),
    "executorch": (PTE, ()),
    "executorch, added": (PTE, (("--scheme", "q8"),)),
}


@dataclass(kw_only=True)
class Place:
    """A folder of its own for one run: the checkpoint, what is exported, and the cache."""

    root: Path
    environment: dict[str, str | None] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"

    @property
    def out(self) -> Path:
        return self.root / "parent" / "out"


class Bench:
    """Runs commands with faults, in places made for each.

    Args:
        folder: where the places are made.
    """

    def __init__(self, folder: Path, forks: Forks):
        self._folder, self._forks = folder, forks
        self._checkpoint = write_random_checkpoint(folder / "checkpoint", ready.RAW_CONFIG, seed=0, dtype="F32")
        self._known: dict[tuple[tuple[str, ...], ...], dict[str, bytes]] = {}

    @contextmanager
    def place(self, *before: tuple[str, ...]) -> Iterator[Place]:
        """With the artifact that these commands leave."""
        place = Place(root=self._folder / "place")
        shutil.rmtree(place.root, ignore_errors=True)
        place.out.parent.mkdir(parents=True)
        shutil.copytree(self._checkpoint, place.checkpoint, copy_function=shutil.copy2)
        place.environment["XDG_CACHE_HOME"] = str(place.root / "cache")
        if before:
            for name, data in self.left_by(*before).items():
                (place.out / name).parent.mkdir(parents=True, exist_ok=True)
                (place.out / name).write_bytes(data)
        yield place

    def export(self, place: Place, arguments: tuple[str, ...], fault: Fault | None = None) -> Done:
        return self._forks.command(
            "export",
            place.checkpoint,
            "-o",
            place.out,
            *arguments,
            root=place.root,
            fault=fault,
            environment=place.environment,
        )

    def left_by(self, *commands: tuple[str, ...]) -> dict[str, bytes]:
        """The artifact that exports leave which nothing disturbs."""
        if commands not in self._known:
            with self.place(*commands[:-1]) as place:
                done = self.export(place, commands[-1])
                assert done.code == 0, done.err
                self._known[commands] = snapshot(place.out)
        return self._known[commands]

    def chances(self, name: str, kind: str) -> int:
        """How many calls of an export a fault of this kind can strike."""
        command, before = EXPORTS[name]
        self.left_by(*before, command)
        with self.place(*before) as place:
            done = self.export(place, command, Fault(kind=kind))
            assert done.code == 0, done.err
            return done.count

    def disturbed(self, name: str, fault: Fault, environment: Mapping[str, str | None] | None = None) -> list[str]:
        """What is wrong after an export with a fault, and after the next one without it."""
        command, before = EXPORTS[name]
        expected, old = self.left_by(*before, command), self.left_by(*before) if before else {}
        with self.place(*before) as place:
            place.environment |= environment or {}
            weights = snapshot(place.checkpoint)
            done = self.export(place, command, fault)
            found = [*wrong_end(done, fault), *wrong_state(place, done, old, expected)]
            again = self.export(place, command)
            if again.code != 0:
                found.append(f"the same command again: {again.code}, {again.line}")
            if (differing := differences(snapshot(place.out), expected)) or os.listdir(place.out.parent) != ["out"]:
                found.append(f"the same command again left {differing} and {os.listdir(place.out.parent)}")
            if snapshot(place.checkpoint) != weights:
                found.append("the checkpoint was changed")
        return [f"{name}, {fault}: {one}" for one in found]

    def unreadable(self, arguments: tuple[str, ...], at: int | None) -> tuple[Done, list[str]]:
        """A command that reads an artifact of which one read fails."""
        with self.place(ONNX) as place:
            before = snapshot(place.out)
            verb, *rest = arguments
            fault = Fault(kind=UNREADABLE, at=at)
            done = self._forks.command(
                verb, place.out, *rest, root=place.root, fault=fault, environment=place.environment
            )
            found = wrong_end(done, fault)
            if snapshot(place.out) != before:
                found.append("the artifact was changed")
        return done, [f"{verb}, {fault}: {one}" for one in found]


def wrong_end(done: Done, fault: Fault) -> list[str]:
    """The code, and the line on stderr."""
    found = []
    if done.code not in CODES[fault.kind] and not (done.code == 0 and done.count == fault.at):
        found.append(f"exit code {done.code}: {done.err[-600:]}")
    elif done.code > 0 and SAYS[fault.kind] not in done.line:
        found.append(f"does not say {SAYS[fault.kind]!r}: {done.line}")
    if "Traceback" in done.err or max(map(len, done.err.splitlines()), default=0) > LONGEST_LINE:
        found.append(f"more than a line: {done.err[-600:]}")
    return found


def wrong_state(place: Place, done: Done, old: Mapping[str, bytes], new: Mapping[str, bytes]) -> list[str]:
    """The artifact is the old one, the new one, or says that it is neither."""
    held = snapshot(place.out) if place.out.exists() else {}
    if done.code == 0:
        return [f"left {differences(held, new)}"] if held != new else []
    if held in (old, new):
        return []
    try:
        Artifact.open(place.out)
    except ArtifactError as error:
        said = "give the same export command again" in str(error) or "the same export command" in str(error)
        return [] if said else [f"does not say how it goes on: {error}"]
    weights = {name: data for name, data in held.items() if "/" in name}
    if all(weights.get(name) == data for name, data in old.items() if "/" in name):
        return []
    return [f"opens, and lacks {differences(held, old)}"]


def differences(held: Mapping[str, bytes], expected: Mapping[str, bytes]) -> list[str]:
    """Names of files that are missing, left over, or of other bytes."""
    return sorted(name for name in {*held, *expected} if held.get(name) != expected.get(name))
