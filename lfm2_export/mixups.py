"""Paths and names that were taken for others: a program's file for its folder, a checkpoint for an artifact and so on.

In: what a user gave where an artifact or a checkpoint belongs. Out: the folder that was meant, or a few words that say
what it is and what to give. Nothing is read but names.
"""

from __future__ import annotations

from pathlib import Path

from lfm2_export import paths
from lfm2_export.errors import ArtifactError, CheckpointError, Lfm2ExportError
from lfm2_export.manifest import MANIFEST
from lfm2_export.source import BUNDLED, HUB_ID, PROGRAMS, SUFFIX

_DEEPEST = 2  # onnx/model_q4.onnx
_FOLDER = "give the folder that `lfm2-export export` wrote"


def is_artifact(path: str | Path) -> bool:
    """Whether a folder with a manifest, or a program in one, is there; False where the system cannot say."""
    try:
        return paths.exists(folder_and_graph(path)[0] / MANIFEST, ArtifactError)
    except ArtifactError:
        return False


def folder_and_graph(path: str | Path) -> tuple[Path, str | None]:
    """An artifact's folder, and its program's file where that was given in the folder's place.

    Raises:
        ArtifactError: the path is no possible name.
    """
    given = Path(path)
    if given.suffix.lower() not in PROGRAMS or not paths.is_file(given, ArtifactError):
        return given, None
    for folder in list(given.absolute().parents)[:_DEEPEST]:
        if paths.exists(folder / MANIFEST, ArtifactError):
            return _as_given(folder, given), given.absolute().relative_to(folder).as_posix()
    return given, None


def _as_given(folder: Path, given: Path) -> Path:
    """The folder as the user wrote it where that is possible: messages name it."""
    return next((parent for parent in given.parents if parent.absolute() == folder), folder)


def no_artifact(path: str | Path) -> ArtifactError:
    """What is to be said of a name that is no folder where an artifact belongs."""
    name, place = str(path), paths.shown(path)
    if name in BUNDLED:
        return ArtifactError(f"{place}: is a bundled checkpoint, not an artifact; {_export(name)}")
    if paths.is_file(path, ArtifactError):
        if name.lower().endswith(SUFFIX):
            return ArtifactError(f"{place}: is a checkpoint, not an artifact; {_export(name)}")
        what = "a program without its artifact" if name.lower().endswith(PROGRAMS) else "a file"
        return ArtifactError(f"{place}: is {what}, no directory; {_FOLDER}")
    hub = f", and a Hub id is a checkpoint's: {_export(name)}" if HUB_ID.fullmatch(name) else f"; {_FOLDER}"
    return ArtifactError(f"{place}: no such directory{hub}")


def _export(checkpoint: str) -> str:
    folder = Path(checkpoint).name.removesuffix(SUFFIX).lower()
    return f"export it first (`lfm2-export export {checkpoint} --output {folder}-q4`)"


def refuse_artifact(folder: Path) -> None:
    """Refuses an artifact's folder where a checkpoint belongs.

    Raises:
        CheckpointError: it is one, and holds no weights of a checkpoint.
    """
    if not paths.exists(folder / MANIFEST, CheckpointError):
        return
    if not paths.names(folder, CheckpointError, lambda name: name.endswith(".safetensors"), most=1):
        raise CheckpointError(
            f"{paths.shown(folder)}: is an artifact, which an export wrote, not a checkpoint; give the checkpoint that "
            "it was made of (`lfm2-export inspect` names it)"
        )


def check_order(command: str, artifact: str, checkpoint: str) -> None:
    """Refuses an artifact and a checkpoint in each other's place.

    Raises:
        Lfm2ExportError: says how the command goes.
    """
    if is_artifact(checkpoint) and not is_artifact(artifact):
        raise Lfm2ExportError(
            f"the artifact comes first; say `lfm2-export {command} {paths.shown(checkpoint)} {paths.shown(artifact)}`"
        )
