"""Artifacts on the Hub: of a repository, the files that one program needs, in the Hub's cache.

In: ``organization/name``, or ``organization/name@revision``, and a backend and scheme. Out: the snapshot's folder, with
the manifest, the files that programs share and those of the programs; nothing is fetched twice, and what is there opens
without network. All of it is a stranger's: the manifest is checked first, sizes before anything large is fetched,
and hashes when the program is opened.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm2_export import paths
from lfm2_export.artifact import TEXT_LIMIT, Artifact
from lfm2_export.errors import ArtifactError, Lfm2ExportError
from lfm2_export.foreign import SHARED, file_names, foreign_schemes, is_foreign, open_foreign
from lfm2_export.manifest import MANIFEST, MANIFEST_LIMIT, MODEL, Program
from lfm2_export.messages import listed, named
from lfm2_export.quant.schemes import SCHEMES
from lfm2_export.resources import check_disk
from lfm2_export.source import BUNDLED, HUB_ID, fetch_file, hub_error

logger = logging.getLogger(__name__)

_NAME = re.compile(rf"(?P<repository>{HUB_ID.pattern})(?:@(?P<revision>[\w][\w./-]*))?", re.ASCII)
# Graphs that share their data with others are far smaller; a .pte holds its weights.
_SMALL = 64 << 20


def open_artifact(
    path: str | Path, *, backend: str | None = None, scheme: str | None = None, offline: bool = False
) -> Artifact:
    """The artifact in a folder or, where there is none of this name, on the Hub; of the latter, what the program takes
    is fetched, unless ``offline``. Its files are not checked yet.

    Raises:
        ArtifactError: there is neither; or the repository is gated, holds no artifact, no such program, or files of
            other sizes than its manifest says.
        ResourceError: the disk is full.
    """
    folder = located(path, backend=backend, scheme=scheme, offline=offline)
    return open_foreign(folder) if is_foreign(folder) else Artifact.open(folder, verify=False)


def open_programs(
    path: str | Path, *, backend: str | None = None, schemes: Iterable[str] | None = None, offline: bool = False
) -> Artifact:
    """As ``open_artifact``, but for several programs, None: all of the backend's; and of ours alone, for what others
    exported does not say what it was made of.

    Raises:
        ArtifactError, ResourceError: as there.
    """
    if (repository := _on_hub(path, offline)) is None:
        return Artifact.open(path, verify=False)
    return Artifact.open(repository.programs(backend, None if schemes is None else tuple(schemes)), verify=False)


def described(path: str | Path, *, revision: str | None = None, offline: bool = False) -> Artifact | None:
    """The artifact of a repository with its manifest alone; None where the name is another thing's: a folder's, a
    bundled checkpoint's, or that of a repository that has no manifest of ours or cannot be had.

    Raises:
        ArtifactError: the manifest is damaged.
    """
    repository = None if path in BUNDLED else _on_hub(path, offline, revision)
    if repository is None:
        return None
    try:
        return repository.described()
    except _NoManifestError:
        return None
    except ArtifactError as error:
        if isinstance(error.__cause__, Lfm2ExportError) or error.__cause__ is None:
            raise
        return None  # the Hub's own exception, which opening a checkpoint tells as well


def is_on_hub(path: str | Path) -> bool:
    """Whether a name is a repository's: it has the form of one, and there is no such folder."""
    return _on_hub(path, False) is not None


def _on_hub(path: str | Path, offline: bool, revision: str | None = None) -> _Repository | None:
    if not isinstance(path, str) or paths.exists(path, ArtifactError) or (found := _NAME.fullmatch(path)) is None:
        return None
    return _Repository(id=found["repository"], revision=found["revision"] or revision, offline=offline)


def located(path: str | Path, *, backend: str | None = None, scheme: str | None = None, offline: bool = False) -> Path:
    """The folder of ``open_artifact``; raises as it, but for what is to be said of a folder."""
    if (repository := _on_hub(path, offline)) is None:
        return Path(path)
    return repository.program(backend, scheme)


def name_of(path: str | Path, folder: Path) -> str:
    """What an artifact is called by: its folder's name, or its repository's."""
    found = None if paths.exists(path, ArtifactError) else _NAME.fullmatch(str(path))
    return folder.resolve().name if found is None else found["repository"].partition("/")[2]


class _NoManifestError(ArtifactError):
    """A repository is there, and holds no artifact of ours."""


@dataclass(frozen=True, kw_only=True)
class _Repository:
    """``revision``: a branch, tag or commit; None: the main branch. ``offline``: only what is in the cache."""

    id: str
    revision: str | None
    offline: bool = False

    def described(self) -> Artifact:
        """With nothing but its manifest."""
        return Artifact.open(self._manifest().parent, verify=False)

    def programs(self, backend: str | None, schemes: tuple[str, ...] | None) -> Path:
        """The folder that holds the programs, fetched where they are not there."""
        artifact = self.described()
        if schemes is None:
            programs = artifact.select(backend) or (artifact.program(backend),)
        else:
            programs = tuple(_preferred(artifact, backend, scheme) for scheme in schemes)
        return self._with(artifact, programs)

    def program(self, backend: str | None, scheme: str | None) -> Path:
        """The folder that holds the program, fetched where it is not there."""
        try:
            artifact = self.described()
        except _NoManifestError:
            return self._foreign(scheme)
        except ArtifactError:
            if (cached := self._cached_foreign()) is None:
                raise
            return cached
        if self._is_offline():
            return self._with(artifact, [artifact.program(backend, scheme)])  # of several, one that is here
        return self._with(artifact, [_preferred(artifact, backend, scheme)])

    def _with(self, artifact: Artifact, programs: Sequence[Program]) -> Path:
        """The artifact's folder, once it has what its programs take."""
        program_files = {name: program.files[name].bytes for program in programs for name in needed_files(program)}
        if all(paths.exists(artifact.path / name, ArtifactError) for name in program_files):
            return artifact.path
        if self._is_offline():
            for program in programs:
                self._check_here(artifact, program)
            return artifact.path
        commit = artifact.path.name
        # The large ones last: where they are, the others are.
        self._fetch(commit, dict.fromkeys(artifact.manifest.files), limit=TEXT_LIMIT)
        self._fetch(commit, program_files)
        return artifact.path

    def _manifest(self) -> Path:
        def check(size: int | None) -> None:
            self._check_size(MANIFEST, size, None, MANIFEST_LIMIT)

        def fetch() -> Path:
            return fetch_file(self.id, MANIFEST, revision=self.revision, offline=self.offline, check=check)

        return Path(self._asked(fetch))

    def _foreign(self, scheme: str | None) -> Path:
        """The folder of a program of others (``foreign``); raises what ``_manifest`` did where there is none."""
        from huggingface_hub import constants, snapshot_download

        def download(schemes: Iterable[str], **how: Any) -> Any:
            patterns = [
                pattern for one in schemes for name, data in [file_names(one)] for pattern in (name, f"{data}*")
            ]
            return snapshot_download(self.id, allow_patterns=[*SHARED, *patterns], **how)

        by_preference = sorted(foreign_schemes(), key=lambda name: SCHEMES[name].preference)
        planned = self._asked(lambda: download(by_preference, revision=self.revision, **_planning()))
        names = {one.filename for one in planned} if isinstance(planned, list) else set()
        there = [name for name in by_preference if file_names(name)[0] in names]
        if not there:
            raise self._no_manifest()
        if scheme not in (None, *there):
            raise ArtifactError(f"{self}: has no {scheme} program, only: {listed(there)}")
        self._check_sizes([one for one in planned if one.filename in SHARED], {}, TEXT_LIMIT)
        graph, data = file_names(scheme or there[0])
        wanted = [one for one in planned if one.filename == graph or one.filename.startswith(data)]
        check_disk(Path(constants.HF_HUB_CACHE), sum(one.file_size or 0 for one in wanted if one.will_download))
        return Path(self._asked(lambda: download([scheme or there[0]], revision=planned[0].commit_hash)))

    def _is_offline(self) -> bool:
        from huggingface_hub import constants

        return self.offline or bool(constants.HF_HUB_OFFLINE)

    def _cached_foreign(self) -> Path | None:
        """The folder of one that was fetched before."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.id, SHARED[0], revision=self.revision)
        folder = Path(found).parent if isinstance(found, str) else None
        return folder if folder is not None and is_foreign(folder) else None

    def _no_manifest(self) -> _NoManifestError:
        return _NoManifestError(
            f"{self}: has no {MANIFEST}; if it is a checkpoint, export it first (`lfm2-export export {self.id} "
            "--output DIR`)"
        )

    def _fetch(self, commit: str, sizes: Mapping[str, int | None], limit: int | None = None) -> None:
        """Files of a commit; ``sizes`` are their bytes, None where only ``limit`` says how many they may have."""
        from huggingface_hub import constants, snapshot_download

        def download(**how: Any) -> Any:
            return snapshot_download(self.id, revision=commit, allow_patterns=list(map(glob.escape, sizes)), **how)

        planned = self._asked(lambda: download(**_planning()))
        if not isinstance(planned, list):  # the folder in the cache, since there is no network
            raise ArtifactError(
                f"{self}: the Hub cannot be reached, and the program is not (completely) in the cache "
                f"{constants.HF_HUB_CACHE}; try again, or give a local directory"
            )
        self._check_sizes(planned, sizes, limit)
        check_disk(Path(constants.HF_HUB_CACHE), sum(one.file_size or 0 for one in planned if one.will_download))
        self._asked(download)

    def _check_sizes(self, planned: Iterable[Any], sizes: Mapping[str, int | None], limit: int | None) -> None:
        """Before anything is fetched."""
        for one in planned:
            self._check_size(one.filename, one.file_size, sizes.get(one.filename), limit)

    def _check_size(self, name: str, size: int | None, expected: int | None, limit: int | None) -> None:
        if expected is not None and size != expected:
            raise ArtifactError(
                f"{self}: {named(name)} has {size} bytes where its manifest says {expected}; it has to be pushed again"
            )
        if limit is not None and (size is None or size > limit):
            raise ArtifactError(
                f"{self}: {named(name)} has {size} bytes, more than the {limit} that such a file may have"
            )

    def _check_here(self, artifact: Artifact, program: Program) -> None:
        if not artifact.is_here(program):
            raise ArtifactError(
                f"{self}: {program} is not (completely) in the cache, and offline; run once without HF_HUB_OFFLINE"
            )

    def _asked(self, ask: Callable[[], Any]) -> Any:
        """What the Hub gives, or one of our errors."""
        from huggingface_hub import errors

        try:
            with _told_once():
                return ask()
        except Lfm2ExportError:
            raise
        except errors.RemoteEntryNotFoundError as error:
            raise self._no_manifest() from error
        except Exception as error:  # whatever the Hub's library, its HTTP client or its download engine may raise
            raise hub_error(self.id, self.revision, self.offline, error, ArtifactError) from error

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id


@contextlib.contextmanager
def _told_once() -> Iterator[None]:
    """Without the Hub's library's two lines for each of its attempts: what comes of them is one line of ours."""
    attempts = logging.getLogger("huggingface_hub.utils._http")
    before = attempts.level
    attempts.setLevel(logging.ERROR)
    try:
        yield
    finally:
        attempts.setLevel(before)


def needed_files(program: Program) -> list[str]:
    """What it takes to open a program: its data and its graphs; of large graphs, each with its weights, the one that
    any runtime opens."""
    graphs = set(program.graphs.values()) - {program.graphs[MODEL]}
    return [name for name, entry in program.files.items() if name not in graphs or entry.bytes <= _SMALL]


def _preferred(artifact: Artifact, backend: str | None, scheme: str | None) -> Program:
    """Whether it is here already or not."""
    for program in artifact.programs:
        if backend in (None, program.backend) and scheme in (None, program.scheme):
            return program
    return artifact.program(backend, scheme)  # which says what there is


def _planning() -> dict[str, Any]:
    """Of a snapshot's download: only say what it would fetch, without a bar of its own."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{**options, "disable": True})

    return {"dry_run": True, "tqdm_class": Silent}
