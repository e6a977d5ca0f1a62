"""Makes artifacts: everything at once, or nothing.

In: files that backends write, and their ``Program``. Out: a folder with ``lfm2_export.json``, which names every file
with its size and SHA-256, or more programs in one that is there (``artifact``).
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from lfm2_export import files, json_values, paths
from lfm2_export.artifact import Artifact, edited, file_entries, is_regular, read_manifest
from lfm2_export.errors import ArtifactError, CheckpointError
from lfm2_export.folders import Folder, UnexpectedKindError, is_plain_name
from lfm2_export.journal import Index
from lfm2_export.ledger import discard_unlisted
from lfm2_export.manifest import CARD, DRAFTER, MANIFEST, CheckpointRecord, Manifest, Program
from lfm2_export.messages import shown
from lfm2_export.preference import preference
from lfm2_export.staging import Staging, contents

logger = logging.getLogger(__name__)

_INDEX = Index(
    name=MANIFEST,
    sizes=lambda data: {name: entry.bytes for name, entry in Manifest.from_json(data).all_files().items()},
    unlisted=(CARD,),
)

# What an export knows of its checkpoint, for one that goes on from it; a name and a hash for each shard.
_NOTE, _NOTE_BYTES = "checkpoint.json", 16 << 20


class ArtifactWriter:
    """Makes an artifact, or adds programs to one of the same checkpoint. Use as a context manager.

    ``into`` names the folders in it that will be written to, so that one that cannot be is refused before any work.

    Files are written to ``path(name)``; ``add_program`` claims those that a program needs, the rest is shared.
    ``commit`` puts everything into place at once; without it nothing of this export remains. ``checkpoint`` may be a
    function, called when the record is needed first: hashing takes its time. ``target``: the model that it drafts for,
    where it is a drafter; its table and head are among the checkpoint's weights.

    ``key`` says what the files follow from: where a writer with the same one was killed, the files of which its
    ``ledgers`` speak are there again, and ``confirm`` tells whether they are of the same weights.

    Raises:
        ArtifactError: on entering, where the folder holds something else, another checkpoint's artifact, cannot be
            written, or is being written to.
        ResourceError: on leaving, where the disk was full.
    """

    def __init__(
        self,
        folder: str | Path,
        checkpoint: CheckpointRecord | Callable[[], CheckpointRecord],
        *,
        into: Sequence[str] = (),
        key: str | None = None,
        target: CheckpointRecord | None = None,
    ):
        self._staging = Staging(Path(folder), index=_INDEX, into=into, key=key)
        self._record, self._target = checkpoint, target
        self._added: dict[tuple[str, str], Program] = {}
        self.existing: Manifest | None = None

    def __enter__(self) -> ArtifactWriter:
        try:
            self._staging.__enter__()
            discard_unlisted(self.root, self.ledgers)
            self.existing = self._read_existing()
            return self
        except BaseException as error:  # of the staging itself too, which has nothing to leave then
            self._staging.__exit__(type(error), error, error.__traceback__)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._staging.__exit__(kind, error, trace)

    @property
    def _checkpoint(self) -> CheckpointRecord:
        return self._record() if callable(self._record) else self._record

    @property
    def folder(self) -> Path:
        """Where the artifact will be."""
        return self._staging.folder

    @property
    def root(self) -> Path:
        """Where its files are made; ``path`` gives places below it."""
        return self._staging.files

    @property
    def ledgers(self) -> Path:
        """Where ledgers of its files are made."""
        return self._staging.ledgers

    def confirm(self, checkpoint: CheckpointRecord) -> CheckpointRecord:
        """The record, once it is sure that a killed writer, whose files this one goes on with, read the same weights.

        Raises:
            ArtifactError: it read others; the files are gone when the writer is left.
        """
        with Folder.open(self.ledgers) as ledgers:
            try:
                known = json.loads(ledgers.read(_NOTE, _NOTE_BYTES))
            except (OSError, ValueError, RecursionError, UnexpectedKindError):  # killed before it knew
                known = checkpoint.shards
                ledgers.write(_NOTE, json.dumps(known).encode())
        if known != checkpoint.shards:
            raise ArtifactError(
                f"{self.folder}: an export into it was interrupted, and the weights of {checkpoint} changed since "
                "without their files' times; give the command again to start anew"
            )
        return checkpoint

    def finished(self) -> Artifact | None:
        """What a writer with the same key was killed at putting into place, and entering has put there; None where
        there was none, or it is not whole."""
        if self._staging.finished:
            with contextlib.suppress(ArtifactError):
                return Artifact.open(self.folder)
        return None

    def _read_existing(self) -> Manifest | None:
        names = contents(self.folder)
        if not names:
            return None
        if MANIFEST not in names:
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise ArtifactError(
                f"{self.folder}: exists and holds something else ({some}); give another --output or an empty folder"
            )
        manifest = read_manifest(self.folder)
        self._check_target(manifest)
        if not manifest.checkpoint.is_same_as(self._checkpoint):
            raise ArtifactError(
                f"{self.folder}: is an artifact of another checkpoint ({manifest.checkpoint}, now "
                f"{self._checkpoint}: config or weights differ); give another --output"
            )
        return manifest

    def _check_target(self, manifest: Manifest) -> None:
        """Refuses a drafter for another model than the one that is there, before its weights are hashed."""
        made = [program.options["drafter"] for program in manifest.programs if program.kind == DRAFTER]
        other = next(
            (one["target_name"] for one in made if self._target and one["target"] != self._target.digest), None
        )
        if other is not None:
            differs = "config or weights differ" if other == str(self._target) else "another model"
            raise ArtifactError(
                f"{self.folder}: holds a drafter for {shown(other, 60)}, and --target is {self._target} now "
                f"({differs}); give another --output"
            )

    def path(self, name: str) -> Path:
        """Where to write the file ``name`` (relative, forward slashes); its folders are made."""
        if not is_plain_name(name):
            raise ValueError(f"{name!r} leaves the artifact's folder")
        path = self._staging.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_text(self, name: str, text: str) -> None:
        self.path(name).write_text(text, encoding="utf-8")

    def write_json(self, name: str, value: object) -> None:
        """Writes what every JSON parser reads (``json_values.plain``)."""
        self.write_text(name, json_values.dump(value))

    def copy(self, source: Path, *, limit: int = files.TEXT_LIMIT) -> None:
        """Copies a file of the checkpoint, of at most ``limit`` bytes; where it is a link in there, what it points to.

        Raises:
            CheckpointError: it is larger, no regular file, elsewhere, or cannot be read.
        """
        data = files.read_bytes(source, source.parent, CheckpointError, limit=limit)
        self.path(source.name).write_bytes(data)

    def add_program(self, program: Program, files: Iterable[str]) -> Program:
        """Adds a program, or replaces the one of its backend and scheme; hashes its files, which are final now.

        Args:
            program: its ``files`` are filled in here.
            files: the names of all files that it needs, written to ``path(name)`` before.
        """
        names = sorted(files)
        for other in self.programs:
            shared = other.files.keys() & set(names)
            if other.key != program.key and shared:
                raise ArtifactError(f"{self.folder}: {min(shared)} of {program} belongs to {other} already")
        program = replace(program, files=file_entries(self._staging.files, names))
        self._added[program.key] = program
        return program

    @property
    def programs(self) -> tuple[Program, ...]:
        """What the artifact will hold after ``commit``, the preferred program first."""
        kept = self.existing.programs if self.existing else ()
        by_key = {program.key: program for program in kept} | self._added
        return tuple(sorted(by_key.values(), key=preference))

    def commit(self) -> Artifact:
        """Puts the files into place; call it once, as the last step."""
        self._keep_edited()
        manifest = self._manifest()
        text = manifest.to_json()
        Manifest.from_json(text)  # what cannot be read back must not replace what can
        self.write_text(MANIFEST, text)
        self._staging.commit()
        return Artifact(path=self.folder, manifest=manifest)

    def _keep_edited(self) -> None:
        """What its owner changed since the last export stays as it is: this export's version of it is dropped."""
        if self.existing is None:
            return
        ours = {
            name: entry
            for name, entry in self.existing.files.items()
            # A link is replaced itself, wherever it leads.
            if (self._staging.files / name).is_file() and is_regular(self.folder / name)
        }
        for name in sorted({*edited(self.folder, ours), *(self.existing.adopted & ours.keys())}):
            how = "adopted" if name in self.existing.adopted else "edited since the last export"
            logger.warning(
                "%s: was %s and stays as it is; to have it made anew, delete it first",
                paths.shown(self.folder / name),
                how,
            )
            (self._staging.files / name).unlink()

    def _manifest(self) -> Manifest:
        claimed = {name for program in self._added.values() for name in program.files}
        written = {p.relative_to(self._staging.files).as_posix() for p in self._staging.files.rglob("*") if p.is_file()}
        shared = file_entries(self._staging.files, written - claimed - {MANIFEST})
        kept = dict(self.existing.files) if self.existing else {}
        adopted = self.existing.adopted if self.existing else frozenset()
        return Manifest(
            checkpoint=self.existing.checkpoint if self.existing else self._checkpoint,
            programs=self.programs,
            files=dict(sorted({**kept, **shared}.items())),
            adopted_files=tuple(sorted(adopted - shared.keys())),  # what was made anew is an export's again
        )
