"""lfm2_export.json alone, then in a folder with the files that the seeds speak of."""

from __future__ import annotations

from lfm2_export.artifact import Artifact
from lfm2_export.inspection import inspect
from lfm2_export.manifest import MANIFEST, Manifest
from tests.fuzz.findings import attempt, attempt_command
from tests.fuzz.guard import Finding
from tests.fuzz.mutation import json_mutator
from tests.fuzz.workspace import workspace

# By their names in the seeds; the seeds state their sizes and hashes.
FILES = {"config.json": b"{}\n", "onnx/model_q4.onnx": b"graph", "onnx/model_q4.onnx_data": b"weights"}

mutate = json_mutator(
    *("schema_version", "checkpoint", "programs", "files", "graphs", "cache", "shape", "dtype", "parity", "options"),
    *("model", "cpu", "batch_size", "past_sequence_length", "float32", "bytes", "sha256", "revision", *FILES, MANIFEST),
)


def fuzz_one(data: bytes) -> None:
    manifest = attempt(Manifest.from_json, data)
    if manifest is None:
        return
    _check_comes_back(manifest)
    folder = workspace().empty()
    for name, content in {**FILES, MANIFEST: data}.items():
        workspace().put(name, content)
    if attempt(inspect, folder) is not None:
        attempt_command("inspect", str(folder))
        attempt_command("inspect", "--json", str(folder))
    artifact = attempt(Artifact.open, folder, verify=False)
    if artifact is not None:
        attempt(artifact.program, "onnx", "q4")
        attempt(lambda: [artifact.graph(program, "model") for program in artifact.programs])


def _check_comes_back(manifest: Manifest) -> None:
    """What was read can be written, as UTF-8, and read again: a further export into the folder does so."""
    text = manifest.to_json()
    if Manifest.from_json(text.encode("utf-8")).to_json() != text:
        raise Finding("the manifest does not come back as it was written")
