"""Where the artifact is that ``from_pretrained`` is asked for: a folder, or a repository on the Hub.

In: what transformers' own takes for a place (a name, ``subfolder``, ``revision``, ``local_files_only``, ...). Out: the
artifact, or one line; of a folder, options about the Hub say nothing and are let pass.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lfm2_export.artifact import Artifact
from lfm2_export.errors import GenerationError
from lfm2_export.hub_artifacts import is_on_hub, open_artifact
from lfm2_export.messages import shown

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
# What would change where a repository's files come from or go to, or who asks for them.
_ELSEWHERE = {
    "cache_dir": "set HF_HUB_CACHE before the start",
    "force_download": "delete it from the cache (`hf cache rm`)",
    "mirror": "set HF_ENDPOINT before the start",
    "proxies": "set HTTPS_PROXY before the start",
    "token": _LOG_IN,
    "use_auth_token": _LOG_IN,
}


def opened(
    path: object, subfolder: object, options: Mapping[str, object], *, backend: str | None, scheme: str | None
) -> Artifact:
    """The artifact, not checked yet.

    Raises:
        GenerationError: a name is no name, or an option that a repository's files cannot follow.
        ArtifactError: there is no artifact; or the Hub cannot give it.
    """
    place = _name("pretrained_model_name_or_path", path)
    inner = "" if subfolder is None else _name("subfolder", subfolder)
    if not isinstance(place, str) or not is_on_hub(place):
        return Artifact.open(Path(place, inner), verify=False)
    if inner:
        raise GenerationError(
            f"from_pretrained: subfolder={shown(inner)}: an artifact on the Hub is a whole repository; leave it out"
        )
    for name, remedy in _ELSEWHERE.items():
        value = options.get(name)
        if value not in (None, False) and not (value is True and remedy is _LOG_IN):
            raise GenerationError(f"from_pretrained: {name}: is not followed for {place}; {remedy}")
    revision = options.get("revision")
    if revision is not None and not isinstance(revision, str):
        raise GenerationError(f"from_pretrained: revision={shown(revision)}: give a branch, a tag or a commit")
    name = place if revision is None or "@" in place else f"{place}@{revision}"
    return open_artifact(name, backend=backend, scheme=scheme, offline=bool(options.get("local_files_only")))


def _name(what: str, value: object) -> str | os.PathLike[str]:
    if not isinstance(value, str | os.PathLike):
        raise GenerationError(f"from_pretrained: {what}={shown(value)}: give a folder's name")
    return value
