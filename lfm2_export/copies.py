"""A copy of an artifact: the files that its manifest vouches for, the manifest and the model card, in another folder.

In: an opened artifact, a folder that is new or empty. Out: that folder, complete or not there: it is filled beside its
place and renamed into it.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from lfm2_export import paths
from lfm2_export.artifact import Artifact
from lfm2_export.errors import ArtifactError, ResourceError
from lfm2_export.manifest import CARD, MANIFEST


def copy_artifact(artifact: Artifact, folder: str | Path) -> Artifact:
    """Raises: ArtifactError, where the folder holds something or cannot be written, or a program's file was changed;
    ResourceError, where the disk is full. Nothing is left behind then."""
    target = Path(folder)
    if paths.exists(target, ArtifactError) and os.path.realpath(target) == os.path.realpath(artifact.path):
        return artifact  # it is there already
    _check_free(target)
    artifact.verify()
    names = [name for name in (*artifact.manifest.all_files(), CARD, MANIFEST) if (artifact.path / name).is_file()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as place:
            filled = Path(place, "filled")
            for name in names:
                (filled / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(artifact.path / name, filled / name)
            os.replace(filled, target)
    except OSError as error:
        kind = ResourceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else ArtifactError
        raise kind(f"{paths.shown(target)}: the copy cannot be written ({error.strerror}); nothing was left") from error
    return Artifact.open(target, verify=False)


def _check_free(target: Path) -> None:
    if not paths.exists(target, ArtifactError):
        return
    if not paths.is_folder(target, ArtifactError) or paths.names(target, ArtifactError, most=1):
        raise ArtifactError(f"{paths.shown(target)}: is not an empty folder; give a new one")
