"""Opens an artifact's program in its runner; needs no torch.

In: a folder, optionally a backend and scheme. Out: a ``Runner`` on the program that was asked for, or the preferred
one.
"""

from __future__ import annotations

import os
from pathlib import Path

from lfm2_export import paths
from lfm2_export.artifact import Artifact
from lfm2_export.backends.base import Runner, RunnerOptions
from lfm2_export.choices import BackendName, KernelsName, KvCacheName, SchemeName
from lfm2_export.errors import ArtifactError
from lfm2_export.hub_artifacts import open_artifact
from lfm2_export.manifest import DRAFTER, ENCODER, Program
from lfm2_export.messages import shown
from lfm2_export.packages import explained


@explained
def load_runner(
    path: str | Path | Artifact,
    *,
    backend: BackendName | None = None,
    scheme: SchemeName | None = None,
    threads: int | None = None,
    kernels: KernelsName | None = None,
    kv_cache: KvCacheName | None = None,
) -> Runner:
    """A runner on one program of the artifact at ``path``, a folder or a Hub id (``organization/name[@revision]``);
    files are checked against the manifest first.

    ``kernels``: "auto" (ours where they can be had, which is the default), "lfm2" or "stock" (the runtime's own).
    ``kv_cache``: "float" (the default), or "int8": a quarter of float32's memory, for onnx's q4 and q8 on our kernels.

    Raises:
        ArtifactError: no artifact there, no such program in it, or a file is missing or was changed.
        RunnerError: the runtime cannot load the program, or ``kernels`` or ``kv_cache`` cannot be had.
    """
    options = RunnerOptions.parse(threads=threads, kernels=kernels, kv_cache=kv_cache)
    if not isinstance(path, str | os.PathLike | Artifact):
        raise ArtifactError(f"{shown(path)}: is not the name of a folder; give the one that `lfm2-export export` wrote")
    artifact = path if isinstance(path, Artifact) else open_artifact(path, backend=backend, scheme=scheme)
    return open_runner(artifact, artifact.program(backend, scheme), options)


def open_runner(artifact: Artifact, program: Program, options: RunnerOptions) -> Runner:
    """``load_runner`` for a program that was found already.

    Raises:
        ArtifactError, RunnerError: as there.
    """
    if program.kind == ENCODER:
        raise ArtifactError(
            f"{paths.shown(artifact.path)}: {program} is an encoder, which generates no text; use `lfm2-export embed` "
            "or lfm2_export.load_encoder"
        )
    if program.kind == DRAFTER:
        raise ArtifactError(
            f"{paths.shown(artifact.path)}: {program} is a drafter, which generates no text by itself; give its model, "
            "and this folder with --speculate"
        )
    artifact.verify(program)
    return artifact.load_runner(program, options)
