"""Opens a drafter's artifact in its runner; needs no torch.

In: a folder, or a repository on the Hub. Out: a ``DraftRunner``, which ``speculation`` puts before its target's runner.
"""

from __future__ import annotations

import os
from pathlib import Path

from lfm2_export import paths
from lfm2_export.artifact import Artifact
from lfm2_export.backends import get_backend
from lfm2_export.backends.base import RunnerOptions
from lfm2_export.backends.drafter import DraftRunner
from lfm2_export.errors import ArtifactError
from lfm2_export.hub_artifacts import open_artifact
from lfm2_export.manifest import DRAFTER, CheckpointRecord, Program
from lfm2_export.messages import shown


def load_drafter(
    path: str | Path | Artifact, *, scheme: str | None = None, threads: int | None = None, kernels: str | None = None
) -> DraftRunner:
    """A drafter on one program of the artifact at ``path``, for ``assistant_model`` of a model's ``generate``.

    ``kernels``: "auto" (ours where they can be had), "lfm2" or "stock", as in ``load_runner``.

    Raises:
        ArtifactError: no artifact there, no drafter's, no such program in it, or a file is missing or was changed.
        RunnerError: the runtime cannot load the program.
    """
    if not isinstance(path, str | os.PathLike | Artifact):
        raise ArtifactError(f"{shown(path)}: is not the name of a folder; give the one that `lfm2-export export` wrote")
    artifact = path if isinstance(path, Artifact) else open_artifact(path, scheme=scheme)
    return open_drafter(artifact, artifact.program(None, scheme), RunnerOptions.parse(threads=threads, kernels=kernels))


def open_drafter(artifact: Artifact, program: Program, options: RunnerOptions) -> DraftRunner:
    """``load_drafter`` for a program that was found already.

    Raises:
        ArtifactError, RunnerError: as there.
    """
    if program.kind != DRAFTER:
        raise ArtifactError(f"{paths.shown(artifact.path)}: {program} is no drafter; use lfm2_export.load_runner")
    artifact.verify(program)
    return get_backend(program.backend).load_drafter(artifact.path, artifact.present(program), options)


def check_target(drafter: DraftRunner, record: CheckpointRecord, place: str) -> None:
    """Refuses a drafter of another model than the artifact of ``record``.

    Raises:
        ArtifactError: names both.
    """
    if drafter.target != record.digest:
        raise ArtifactError(
            f"{place}: drafts for {shown(drafter.target_name, 60)}, not for {record} as it is here (config or weights "
            "differ); give that model's drafter, or export one with --target and this artifact"
        )
