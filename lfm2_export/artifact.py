"""An artifact: the folder that an export leaves behind (``artifact_writer``), checked when it is opened.

In: a folder with ``lfm2_export.json``, which names every file with its size and SHA-256. Out: ``Artifact``. Needs no
torch.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec

from lfm2_export import files, mixups, notebook, paths
from lfm2_export.errors import ArtifactError
from lfm2_export.hashing import sha256_files
from lfm2_export.manifest import (
    CARD,
    MANIFEST,
    MANIFEST_LIMIT,
    MODEL,
    FileEntry,
    Manifest,
    Program,
)
from lfm2_export.messages import one_line
from lfm2_export.preference import preference
from lfm2_export.resources import human_bytes
from lfm2_export.staging import alone, unfinished

if TYPE_CHECKING:
    from lfm2_export.backends.base import Runner, RunnerOptions

logger = logging.getLogger(__name__)

# Of a text file: the largest tokenizer.json, with a vocabulary of 128,000, has 17 MB.
TEXT_LIMIT = 64 << 20

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
            artifact = cls(path=folder, manifest=read_manifest(folder), graph_name=graph)
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
            artifact = replace(self, manifest=read_manifest(self.path))
            artifact.verify()
            names = artifact.edited()
            manifest = artifact.manifest.with_adopted(file_entries(self.path, names))
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
            manifest = _with_parity(read_manifest(self.path), parity or {}, self.path)
            if readme is not None:
                folder.write(CARD, readme.encode())
                manifest = replace(manifest, files={**manifest.files, **file_entries(self.path, [CARD])})
            folder.write(MANIFEST, manifest.to_json().encode())
        return replace(self, manifest=manifest)


def file_entries(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
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


def is_regular(path: Path) -> bool:
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


def read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if paths.exists(path, ArtifactError):
        text = files.read_bytes(path, folder, ArtifactError, limit=MANIFEST_LIMIT)
        return Manifest.from_json(text, paths.shown(path))
    weights = paths.names(folder, ArtifactError, lambda name: name.endswith(".safetensors"), most=1)
    kind = "a checkpoint: export it first" if weights else "not an artifact"
    raise ArtifactError(f"{paths.shown(folder)}: has no {MANIFEST}; it is {kind}")
