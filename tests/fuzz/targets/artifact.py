"""An artifact's folder and what lies beside it: links, pipes and an export that claims to have been interrupted.

Names are relative to the folder around the artifact, which is called ``artifact``.
"""

from __future__ import annotations

from lfm2_export.artifact import Artifact
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.inspection import inspect
from lfm2_export.runners import load_runner
from lfm2_export.text import Tokenizer
from tests.fuzz.findings import attempt, attempt_command
from tests.fuzz.mutation import bundle_mutator, json_mutator, mutate_bytes
from tests.fuzz.template_mutation import mutate_template
from tests.fuzz.workspace import workspace

_PARTIAL = (".artifact.lfm2-export.partial", "artifact/.lfm2-export.partial")

mutate = bundle_mutator(
    {
        "*/commit.json": json_mutator("last", "delete", "files", "lfm2_export.json", "../outside", "README.md"),
        "*.json": json_mutator("files", "programs", "checkpoint", "bytes", "sha256", "schema_version"),
        "*.jinja": mutate_template,
        "*": mutate_bytes,
    },
    (
        *(f"{folder}/commit.json" for folder in _PARTIAL),
        *(f"{folder}/files/{name}" for folder in _PARTIAL for name in ("lfm2_export.json", "config.json", "x/y")),
        *("artifact/.lfm2-export.lock", ".artifact.lfm2-export.lock", "outside", "artifact/README.md"),
        *("artifact/tokenizer.json", "artifact/generation_config.json", "artifact/onnx/model_q4.onnx"),
    ),
)


def fuzz_one(data: bytes) -> None:
    parent = workspace().empty()
    folder = parent / "artifact"
    folder.mkdir()
    workspace().put_bundle(parent, data)
    attempt(inspect, folder)
    attempt_command("inspect", str(folder))
    attempt(Artifact.open, folder, verify=False)
    attempt(load_runner, folder, threads=1, kernels="stock")
    attempt(GenerationConfig.from_file, folder / "generation_config.json")
    attempt(Tokenizer.from_dir, folder)
