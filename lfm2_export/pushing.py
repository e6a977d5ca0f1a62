"""An artifact to the Hub: the files that its manifest lists, the model card among them, and nothing else of its folder.

In: an artifact's folder and a repository's id. Out: one commit there. Everything is checked before the first byte goes:
the artifact as when it is opened, the id, and whether there is a token.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm2_export import __version__, paths
from lfm2_export.artifact import Artifact
from lfm2_export.errors import ArtifactError, Lfm2ExportError
from lfm2_export.manifest import MANIFEST
from lfm2_export.messages import listed
from lfm2_export.source import HUB_ID, hub_error

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Push:
    """What would be pushed, or was: ``files``: bytes by name; ``url``: of the commit, None before it is made."""

    repository: str
    files: dict[str, int]
    url: str | None = None


def push(
    path: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> Push:
    """Pushes an artifact; the repository, and a branch, are made where there are none.

    Args:
        repository: ``organization/name``.
        private: of a repository that is made; one that is there stays as it is.
        revision: the branch; default: main.
        message: the commit's; default: what the artifact is of, and our version.
        dry_run: only say what would be pushed; asks nothing of the Hub.

    Raises:
        ArtifactError: no artifact there, a program's file was changed, one of its graphs is missing, or a file
            leaves the folder.
        Lfm2ExportError: no possible id, no token, or the Hub cannot be reached or refuses.
    """
    if not HUB_ID.fullmatch(repository):
        raise Lfm2ExportError(f"{repository}: is no repository's id; give organization/name")
    artifact = Artifact.open(path)
    files = _files(artifact)
    if dry_run:
        return Push(repository=repository, files=files)
    _check_token(repository)
    message = message or f"Artifact of {artifact.manifest.checkpoint}, by lfm2-export {__version__}"
    commit = _asked(repository, revision, lambda: _upload(artifact, files, repository, private, revision, message))
    return Push(repository=repository, files=files, url=str(commit.commit_url))


def _files(artifact: Artifact) -> dict[str, int]:
    """Those that the manifest lists and the folder has, the manifest among them."""
    names = {MANIFEST, *artifact.manifest.all_files()}
    here = sorted(name for name in names if paths.exists(artifact.path / name, ArtifactError))
    graphs = {name for program in artifact.programs for name in program.graphs.values()}
    if lost := [name for name in artifact.missing() if name in graphs]:
        raise ArtifactError(
            f"{paths.shown(artifact.path)}: lacks {listed(lost)}, which others open; bring it back or export again"
        )
    if absent := [str(program) for program in artifact.programs if not artifact.is_here(program)]:
        logger.warning("%s: lacks %s, which its manifest lists", paths.shown(artifact.path), listed(absent))
    return {name: (artifact.path / name).stat().st_size for name in here}


def _check_token(repository: str) -> None:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise Lfm2ExportError(f"{repository}: cannot be pushed to, since HF_HUB_OFFLINE is set; unset it")
    if get_token() is None:
        raise Lfm2ExportError(
            f"{repository}: there is no token to push with; `hf auth login`, or set HF_TOKEN to one with write access"
        )


def _upload(
    artifact: Artifact, files: dict[str, int], repository: str, private: bool, revision: str | None, message: str
) -> Any:
    from huggingface_hub import HfApi

    api = HfApi(library_name="lfm2-export", library_version=__version__)
    api.create_repo(repository, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repository, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repository,
        folder_path=artifact.path,
        allow_patterns=list(map(glob.escape, files)),
        revision=revision,
        commit_message=message,
    )


def _asked(repository: str, revision: str | None, ask: Callable[[], Any]) -> Any:
    """What the Hub gives, or one of our errors."""
    from huggingface_hub import errors

    try:
        return ask()
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise Lfm2ExportError(
                f"{repository}: the Hub does not let this token push there ({status}); log in as somebody who may "
                "(`hf auth login`), with a token that has write access"
            ) from error
        raise hub_error(repository, revision, False, error, Lfm2ExportError) from error
    except Exception as error:  # whatever the Hub's library, its HTTP client or its upload engine may raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Lfm2ExportError(f"{repository}: the push failed ({reason}); check the network and try again") from error
