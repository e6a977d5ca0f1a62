"""Where a checkpoint lies: a directory, a GGUF file, a bundled name or a Hugging Face Hub id, turned into a local path.

In: the name that the user gave. Out: ``Source``, a folder or file that exists and, for a Hub id, the commit that it is.
Only data files are fetched (JSON, safetensors, templates, licence): code and pickles of a repository stay there.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lfm2_export import paths
from lfm2_export.errors import CheckpointError, Lfm2ExportError, ResourceError

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
BUNDLED = ("tiny-moe", "tiny-dense", "tiny-lfm3")
COMPANION = "lfm2_export_demo"  # the distribution that brings them where lfm2-export is installed from a wheel
SUFFIX = ".gguf"
PROGRAMS = (".onnx", ".pte")  # of an artifact

WEIGHT_PATTERNS = ("config.json", "*.safetensors", "*.safetensors.index.json")
DATA_PATTERNS = (*WEIGHT_PATTERNS, "*.json", "*.jinja", "LICENSE*", "tokenizer.model")

# Of a retriever: the modules' own folders, which modules.json names (1_Pooling, 1_Dense).
MODULES = "modules.json"
MODULE_PATTERNS = ("[0-9]_*/config.json", "[0-9]_*/model.safetensors")


def _nested_but(folder: str, last: str) -> tuple[str, ...]:
    """Patterns of everything in folders, but of what lies in ``folder`` itself and has a name that ends in ``last``.

    A checkpoint's own files lie at the top or there. The Hub's patterns match across folders and know no "not": hence
    those of all other folders' names, which end before ``folder`` does, go on otherwise, or go on after it.
    """
    cut = range(len(folder))
    shorter = (f"{folder[:index]}/*" for index in cut if index)
    others = (f"{folder[:index]}[!{folder[index]}/]*/*" for index in cut)
    return (*shorter, *others, f"{folder}[!/]*/*", f"{folder}/*/*", f"{folder}/*[!{last}]")


_IGNORED = _nested_but("additional_chat_templates", "a")  # of ".jinja": no other data file's name ends so

HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)
_HUB_FILE = re.compile(
    rf"(?P<repository>{HUB_ID.pattern})/(?P<file>(?:[\w.-]+/)*[\w][\w.-]*\{SUFFIX})", re.ASCII | re.IGNORECASE
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint's folder, or its GGUF file. ``revision`` is the commit of a Hub snapshot, None elsewhere."""

    path: Path
    revision: str | None = None

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix.lower() == SUFFIX


def resolve(name: str, *, revision: str | None = None, offline: bool = False) -> Source:
    """Finds a checkpoint by directory, bundled name or Hub id, in this order after the bundled names.

    A bundled name always means the bundled checkpoint: a folder that happens to be called so is ``./tiny-moe``.

    Raises:
        CheckpointError: there is no such thing, or the Hub could not give it.
        ResourceError: the download filled the disk.
    """
    if name in BUNDLED:
        return _bundled(name, revision)
    if name and paths.is_folder(name, CheckpointError):
        _refuse_revision(name, revision, "a directory")
        return Source(path=Path(name))
    if name and paths.exists(name, CheckpointError):
        if name.lower().endswith(SUFFIX):
            _refuse_revision(name, revision, "a file")
            return Source(path=Path(name))
        what = "an exported program" if name.lower().endswith(PROGRAMS) else "a file"
        raise CheckpointError(
            f"{name}: is {what}, not a checkpoint; give the folder that holds config.json, or a {SUFFIX} file"
        )
    if found := _HUB_FILE.fullmatch(name):
        return _file_from_hub(name, found["repository"], found["file"], revision, offline)
    if not HUB_ID.fullmatch(name):
        kind = "file" if name.lower().endswith(SUFFIX) else "directory"
        raise CheckpointError(
            f"{name}: no such {kind}, and neither a bundled checkpoint ({', '.join(BUNDLED)}) "
            f"nor a Hub id (organization/name, or organization/name/file{SUFFIX}); check the spelling"
        )
    return _from_hub(name, revision, offline)


def _bundled(name: str, revision: str | None) -> Source:
    _refuse_revision(name, revision, "a bundled checkpoint")
    if os.path.isdir(name):
        logger.warning("%s: the bundled checkpoint is taken; for the folder of this name say ./%s", name, name)
    path = next((folder / name for folder in _bundles() if (folder / name).is_dir()), None)
    if path is None:
        raise CheckpointError(f"{name}: the small checkpoints are not installed; pip install 'lfm2-export[demo]'")
    # Some installers make every file a link to their store: there the package's own folder is.
    return Source(path=Path(os.path.realpath(path / "config.json")).parent)


def _bundles() -> list[Path]:
    """Where the bundled checkpoints may lie: a checkout's own folder, or the distribution that carries them."""
    spec = importlib.util.find_spec(COMPANION)
    found = None if spec is None else spec.submodule_search_locations
    return [ASSETS, *map(Path, found or ())]


def _refuse_revision(name: str, revision: str | None, kind: str) -> None:
    if revision is not None:
        raise CheckpointError(f"{name}: is {kind}, which has no revision {revision}; leave --revision out")


def _from_hub(name: str, revision: str | None, offline: bool) -> Source:
    try:
        path = _snapshot(name, revision, offline)
    except Exception as error:  # whatever the Hub's library, its HTTP client or its download engine may raise
        raise hub_error(name, revision, offline, error) from error
    commit = path.name if path.parent.name == "snapshots" and _COMMIT.fullmatch(path.name) else revision
    return Source(path=path, revision=commit)


def _file_from_hub(name: str, repository: str, file: str, revision: str | None, offline: bool) -> Source:
    """One file of a repository, in the cache."""
    try:
        path = fetch_file(repository, file, revision=revision, offline=offline)
    except Exception as error:  # as for a snapshot
        raise hub_error(name, revision, offline, error) from error
    commits = [part for part in path.parts if _COMMIT.fullmatch(part)]
    return Source(path=path, revision=commits[-1] if commits else revision)


def fetch_file(
    repository: str,
    file: str,
    *,
    revision: str | None,
    offline: bool,
    check: Callable[[int | None], None] | None = None,
) -> Path:
    """One file of a repository, in the cache; the one that was fetched before where the Hub cannot be reached.

    Whether it can is known at the first attempt: a download makes six, over half a minute, before it gives up.
    ``check`` is given the file's bytes before any is fetched. Raises what the Hub's library does.
    """
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url

    def download(local_files_only: bool) -> Path:
        return Path(hf_hub_download(repository, file, revision=revision, local_files_only=local_files_only))

    if offline or constants.HF_HUB_OFFLINE:
        return download(True)
    try:
        found = get_hf_file_metadata(hf_hub_url(repository, file, revision=revision, endpoint=constants.ENDPOINT))
    except errors.HFValidationError:
        raise
    except Exception as error:  # of the HTTP client, which is the library's choice
        answered = error if isinstance(error, errors.HfHubHTTPError) else None
        if answered is not None and answered.response.status_code < 500:
            raise
        try:
            return download(True)
        except errors.LocalEntryNotFoundError as missing:
            if answered is not None:
                raise answered from None
            raise missing from error
    if check is not None:
        check(found.size)
    return download(False)


def _snapshot(name: str, revision: str | None, offline: bool) -> Path:
    """The snapshot's folder; without network, one that lacks only a licence or template is taken as well."""
    from huggingface_hub import snapshot_download  # 0.3 s that other sources need not pay
    from huggingface_hub.errors import IncompleteSnapshotError

    def download(
        patterns: tuple[str, ...],
        local_files_only: bool,
        ignored: tuple[str, ...] = _IGNORED,
        at: str | None = revision,
    ) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=at,
                allow_patterns=list(patterns),
                ignore_patterns=list(ignored),
                local_files_only=local_files_only,
            )
        )

    try:
        folder = download(DATA_PATTERNS, offline)
    except IncompleteSnapshotError:
        return download(WEIGHT_PATTERNS, True)
    if (folder / MODULES).is_file():
        # Of the same commit, whatever a branch has become meanwhile.
        download(MODULE_PATTERNS, offline, (), folder.name)
    return folder


def hub_error(
    name: str,
    revision: str | None,
    offline: bool,
    error: Exception,
    kind: type[Lfm2ExportError] = CheckpointError,
) -> Lfm2ExportError:
    """The Hub's library's exception as one of ours: one line that says what to do."""
    from huggingface_hub import constants, errors

    at = f"{name}@{revision}" if revision else name
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{at}: the disk of {constants.HF_HUB_CACHE} is full; free space or set HF_HOME elsewhere")
    if isinstance(error, errors.GatedRepoError):
        return kind(f"{at}: is gated; accept its terms on https://huggingface.co/{name}, then `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        return kind(f"{at}: the Hub has no revision {revision}; give a branch, tag or commit of {name}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return kind(f"{at}: no such directory or Hub id; check the spelling (a private one needs `hf auth login`)")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return kind(f"{at}: the repository has no such file; check the spelling")
    if isinstance(error, errors.HFValidationError):
        return kind(f"{at}: no such directory, and not a valid Hub id; check the spelling")
    if isinstance(error, errors.LocalEntryNotFoundError) and not isinstance(error.__cause__, errors.HfHubHTTPError):
        return kind(_not_cached(at, offline or bool(constants.HF_HUB_OFFLINE), constants.HF_HUB_CACHE))
    reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
    return kind(f"{at}: the Hub could not give it ({reason}); try again, or give a local directory")


def _not_cached(at: str, offline: bool, cache: str) -> str:
    if offline:
        return f"{at}: not (completely) in the cache {cache}, and offline; run once without --offline or HF_HUB_OFFLINE"
    return f"{at}: no such directory, and the Hub cannot be reached (no network) nor is it in the cache {cache}"
