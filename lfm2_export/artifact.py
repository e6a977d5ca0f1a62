"""An artifact: the folder that an export leaves behind, made all at once and checked when it is opened.

In: files that backends write, and their ``Program``. Out: a folder with ``lfm2_export.json``, which names every file
with its size and SHA-256. ``ArtifactWriter`` makes one or adds to one; ``Artifact`` opens one. Neither needs torch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec

from lfm2_export import files, json_values, mixups, notebook, paths
from lfm2_export.errors import ArtifactError, CheckpointError
from lfm2_export.folders import Folder, UnexpectedKindError, is_plain_name
from lfm2_export.hashing import sha256_files
from lfm2_export.journal import Index
from lfm2_export.ledger import discard_unlisted
from lfm2_export.manifest import (
    CARD,
    DRAFTER,
    MANIFEST,
    MANIFEST_LIMIT,
    MODEL,
    CheckpointRecord,
    FileEntry,
    Manifest,
    Program,
)
from lfm2_export.messages import one_line, shown
from lfm2_export.preference import preference
from lfm2_export.resources import human_bytes
from lfm2_export.staging import Staging, alone, contents, unfinished

if TYPE_CHECKING:
    from lfm2_export.backends.base import Runner, RunnerOptions

logger = logging.getLogger(__name__)

# Of a text file: the largest tokenizer.json, with a vocabulary of 128,000, has 17 MB.
TEXT_LIMIT = 64 << 20

_INDEX = Index(
    name=MANIFEST,
    sizes=lambda data: {name: entry.bytes for name, entry in Manifest.from_json(data).all_files().items()},
    unlisted=(CARD,),
)

# What an export knows of its checkpoint, for one that goes on from it; a name and a hash for each shard.
_NOTE, _NOTE_BYTES = "checkpoint.json", 16 << 20

Arguments = ParamSpec("Arguments")


@contextlib.contextmanager
def _blaming_interruption(folder: Path) -> Iterator[None]:
    """Refusals of what a folder holds say so where an interrupted export explains them."""
    try:
        yield
    except ArtifactError as error:
        if unfinished(folder) is None:
            raise
        fault = str(error).rpartition("; ")[0]
        raise ArtifactError(
            f"{fault}; an export into the folder was interrupted or is under way: give the same export command again, "
            "or wait for it"
        ) from error


def _checking(check: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """A method of ``Artifact`` that refuses as above."""

    @functools.wraps(check)
    def checked(*args: Arguments.args, **options: Arguments.kwargs) -> None:
        (artifact, *_) = args
        assert isinstance(artifact, Artifact)
        with _blaming_interruption(artifact.path):
            check(*args, **options)

    return checked


@functools.cache
def _warn_of_unfinished(workspace: Path, folder: Path) -> None:
    logger.warning(
        "%s: an export into it was interrupted (%s); the same export command finishes it",
        paths.shown(folder),
        paths.shown(workspace.name),
    )


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """An opened artifact; ``path`` is its folder. ``graph_name``: the program's file by which it was opened; that
    program alone is then found."""

    path: Path
    manifest: Manifest
    graph_name: str | None = None

    COLUMNS: ClassVar[tuple[str, ...]] = ("backend", "scheme", "file", "size", "state bytes per token")

    def __repr__(self) -> str:
        programs = one_line(", ".join(map(str, self.programs)), 200) or "no program"
        return f"Artifact({paths.shown(self.path)!r}: {programs}; made of {self.manifest.checkpoint})"

    def rows(self) -> list[tuple[str, ...]]:
        """The programs, by ``COLUMNS``."""
        return [
            (
                program.backend,
                program.scheme,
                program.graphs[MODEL],
                human_bytes(sum(entry.bytes for entry in program.files.values())),
                f"{program.cache.bytes_per_token():,}",
            )
            for program in self.programs
        ]

    def _repr_html_(self) -> str:
        return notebook.table(
            f"{paths.shown(self.path)}: made of {self.manifest.checkpoint}", self.COLUMNS, self.rows()
        )

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Artifact:
        """Reads the manifest and, with ``verify``, checks every file of it that is there. Changes nothing; where an
        export into the folder was interrupted in its last step, a warning says so, and what is whole can be used.
        A program's own file (``.onnx``, ``.pte``) stands for the folder with this program alone.

        Raises:
            ArtifactError: the folder or its manifest is missing or damaged, or a program's file was changed.
        """
        folder, graph = mixups.folder_and_graph(path)
        if not paths.is_folder(folder, ArtifactError):
            raise mixups.no_artifact(path)
        if (workspace := unfinished(folder)) is not None:
            _warn_of_unfinished(workspace, folder)
        with _blaming_interruption(folder):
            artifact = cls(path=folder, manifest=_read_manifest(folder), graph_name=graph)
        if verify:
            artifact.verify()
        return artifact

    @_checking
    def verify(self, *programs: Program, hashes: bool = True) -> None:
        """Checks that the files of ``programs`` are what was exported, and that the shared ones can be read.

        A download may lack graphs that nobody opens: of a program, its data files and at least one graph must be there.
        Without ``programs`` whatever is there of any is checked. Sizes are always compared; SHA-256 with ``hashes``,
        where a file that was checked before and has not been touched since costs nothing. Shared files (config,
        tokenizer, licence) are their owner's to edit: a changed one must still be text, or JSON where its name says so.

        Raises:
            ArtifactError: names the first file that is missing, has another size or content, or cannot be read.
        """
        entries: dict[str, FileEntry] = {}
        for program in programs or self.manifest.programs:
            here = {name: entry for name, entry in program.files.items() if self._has(name)}
            if programs:
                self._check_complete(program, here)
            entries |= here
        for name, entry in entries.items():
            self._check_size(name, entry)
        if hashes:
            self._check_hashes(entries)
        for name in self.edited():
            if name != CARD:  # which only people read
                _check_text(self.path / name, self.path)

    def _has(self, name: str) -> bool:
        return paths.exists(self.path / name, ArtifactError)

    def _check_complete(self, program: Program, here: Collection[str]) -> None:
        """Of several graphs one is enough; the data files belong to all of them."""
        graphs = set(program.graphs.values())
        missing = [name for name in program.files if name not in here and name not in graphs]
        if not graphs & set(here):
            missing.insert(0, program.graphs[MODEL])
        if missing:
            raise ArtifactError(
                f"{paths.shown(self.path / missing[0])}: is missing, but {MANIFEST} names it for {program}; bring it "
                "back or export again"
            )

    def present(self, program: Program) -> Program:
        """The program with those of its graphs that are here."""
        return replace(program, graphs={role: name for role, name in program.graphs.items() if self._has(name)})

    def is_here(self, program: Program) -> bool:
        """Whether all that it takes to open the program in some way is in the folder."""
        try:
            self._check_complete(program, [name for name in program.files if self._has(name)])
        except ArtifactError:
            return False
        return True

    def missing(self) -> list[str]:
        """The files that the folder lacks, without those of programs that cannot be opened here anyway."""
        wanted = [self.manifest.files, *(program.files for program in self.programs if self.is_here(program))]
        return sorted({name for names in wanted for name in names if not self._has(name)})

    def edited(self) -> list[str]:
        """The shared files whose bytes are no longer those of the export. They are their owner's: this is no damage.

        Raises:
            ArtifactError: one cannot be read, or is no regular file of the folder.
        """
        here = {name: entry for name, entry in self.manifest.files.items() if self._has(name)}
        return edited(self.path, here)

    @property
    def owns_card(self) -> bool:
        """Whether the model card is an export's still: there, not edited and not adopted."""
        card = self.manifest.files.get(CARD)
        return card is not None and CARD not in self.manifest.adopted and self._has(CARD) and CARD not in self.edited()

    def adopt(self) -> tuple[Artifact, list[str]]:
        """Records the shared files that were edited as they are now, and that further exports keep them; with their
        names. Files of programs are nobody's to edit.

        Raises:
            ArtifactError: one is no text (or JSON, where its name says so) any more, a program's file was changed, the
                folder cannot be written, or an export is writing to it.
            ResourceError: the disk is full.
        """
        with alone(self.path) as folder:
            artifact = replace(self, manifest=_read_manifest(self.path))
            artifact.verify()
            names = artifact.edited()
            manifest = artifact.manifest.with_adopted(_entries(self.path, names))
            if names:
                folder.write(MANIFEST, manifest.to_json().encode())
        return replace(self, manifest=manifest), names

    def _check_size(self, name: str, entry: FileEntry) -> None:
        path = self.path / name
        with files.open_regular(path, self.path, ArtifactError) as file:
            size = os.fstat(file.fileno()).st_size
        if size != entry.bytes:
            raise ArtifactError(
                f"{paths.shown(path)}: has {size} bytes where the export wrote {entry.bytes}; it was truncated or "
                "replaced, export again or bring it back"
            )

    def _check_hashes(self, entries: Mapping[str, FileEntry]) -> None:
        digests = sha256_files((self.path / name for name in entries), remembered=True)
        for name, entry in entries.items():
            if digests[self.path / name] != entry.sha256:
                raise ArtifactError(
                    f"{paths.shown(self.path / name)}: was changed since the export (its sha256 is another); "
                    "export again or bring it back"
                )

    @property
    def programs(self) -> tuple[Program, ...]:
        """All programs, the preferred one first."""
        return tuple(sorted(self.manifest.programs, key=preference))

    def select(self, backend: str | None = None, scheme: str | None = None) -> tuple[Program, ...]:
        """Those of a backend and scheme, the preferred one first; of one that was opened by a program's file, that
        program alone."""
        return tuple(
            program
            for program in self.programs
            if backend in (None, program.backend)
            and scheme in (None, program.scheme)
            and (self.graph_name is None or self.graph_name in program.graphs.values())
        )

    def program(self, backend: str | None = None, scheme: str | None = None) -> Program:
        """The preferred program among those of a backend and scheme.

        Raises:
            ArtifactError: there is none; the message lists those that there are.
        """
        fitting = self.select(backend, scheme)
        # A download may hold one of several; where it holds none of those asked for, opening says what is missing.
        for program in (*(p for p in fitting if self.is_here(p)), *fitting):
            return program
        asked = " ".join(word for word in (backend, scheme) if word is not None) or "any"
        there = one_line(", ".join(map(str, self.programs)), 120) or "none"
        where = "" if self.graph_name is None else f" in {paths.shown(self.graph_name, 60)}"
        raise ArtifactError(
            f"{paths.shown(self.path)}: has no {asked} program{where}, only: {there}; export it into this folder first"
        )

    def load_runner(self, program: Program, options: RunnerOptions) -> Runner:
        """A runner on one of its programs, whose files were checked."""
        from lfm2_export.backends import get_backend

        return get_backend(program.backend).load_runner(self.path, self.present(program), options)

    def graph(self, program: Program, role: str) -> Path | None:
        """The file of a program's graph for a role, None where it has none."""
        name = program.graphs.get(role)
        return None if name is None else self.path / name

    def update(
        self, *, parity: Mapping[tuple[str, str], Mapping[str, Any]] | None = None, readme: str | None = None
    ) -> Artifact:
        """Records parity figures by (backend, scheme), and replaces the model card; each file atomically.

        Raises:
            ArtifactError: no such program, the folder cannot be written, or an export is writing to it or was
                interrupted in its last step.
            ResourceError: the disk is full.
        """
        with alone(self.path) as folder:
            manifest = _with_parity(_read_manifest(self.path), parity or {}, self.path)
            if readme is not None:
                folder.write(CARD, readme.encode())
                manifest = replace(manifest, files={**manifest.files, **_entries(self.path, [CARD])})
            folder.write(MANIFEST, manifest.to_json().encode())
        return replace(self, manifest=manifest)


def _entries(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Size and SHA-256 of files as they are now."""
    written = {name: folder / name for name in names}
    digests = sha256_files(written.values())
    return {name: FileEntry(bytes=path.stat().st_size, sha256=digests[path]) for name, path in sorted(written.items())}


def edited(folder: Path, entries: Mapping[str, FileEntry]) -> list[str]:
    """The files of ``folder`` whose bytes are others than those of ``entries``; all of them are there.

    Raises:
        ArtifactError: one cannot be read, or is no regular file of the folder.
    """
    for name in entries:
        with files.open_regular(folder / name, folder, ArtifactError):
            pass
    digests = sha256_files((folder / name for name in entries), remembered=True)
    return sorted(name for name, entry in entries.items() if digests[folder / name] != entry.sha256)


def _is_regular(path: Path) -> bool:
    """Whether a regular file is there, and no link to one."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _check_text(path: Path, folder: Path) -> None:
    """Refuses what is neither JSON, where the name says so, nor text."""
    if path.suffix == ".json":
        files.read_json_object(path, folder, ArtifactError, limit=TEXT_LIMIT)
    else:
        files.read_text(path, folder, ArtifactError, limit=TEXT_LIMIT)


def _with_parity(manifest: Manifest, parity: Mapping[tuple[str, str], Mapping[str, Any]], folder: Path) -> Manifest:
    keys = [program.key for program in manifest.programs]
    for key in parity:
        if key not in keys:
            raise ArtifactError(f"{folder}: has no {' '.join(key)} program to record figures for; export it first")
    programs = (replace(p, parity=parity[p.key]) if p.key in parity else p for p in manifest.programs)
    return replace(manifest, programs=tuple(programs))


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if paths.exists(path, ArtifactError):
        text = files.read_bytes(path, folder, ArtifactError, limit=MANIFEST_LIMIT)
        return Manifest.from_json(text, paths.shown(path))
    weights = paths.names(folder, ArtifactError, lambda name: name.endswith(".safetensors"), most=1)
    kind = "a checkpoint: export it first" if weights else "not an artifact"
    raise ArtifactError(f"{paths.shown(folder)}: has no {MANIFEST}; it is {kind}")


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
        manifest = _read_manifest(self.folder)
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
        program = replace(program, files=_entries(self._staging.files, names))
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
            if (self._staging.files / name).is_file() and _is_regular(self.folder / name)
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
        shared = _entries(self._staging.files, written - claimed - {MANIFEST})
        kept = dict(self.existing.files) if self.existing else {}
        adopted = self.existing.adopted if self.existing else frozenset()
        return Manifest(
            checkpoint=self.existing.checkpoint if self.existing else self._checkpoint,
            programs=self.programs,
            files=dict(sorted({**kept, **shared}.items())),
            adopted_files=tuple(sorted(adopted - shared.keys())),  # what was made anew is an export's again
        )
