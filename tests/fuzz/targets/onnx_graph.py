"""A graph of an artifact whose manifest vouches for it: opened by onnxruntime and by us, its weights read. Not run."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache
from random import Random

import onnx

from lfm2_export.artifact import Artifact
from lfm2_export.manifest import FileEntry, Manifest
from lfm2_export.runners import load_runner
from tests.fuzz.findings import attempt
from tests.fuzz.protobuf_mutation import mutate_message
from tests.fuzz.targets import FOLDER
from tests.fuzz.targets.weights import put_base, read_weights
from tests.fuzz.workspace import workspace

_GRAPH = "onnx/model_q4.onnx"


def fuzz_one(data: bytes) -> None:
    put_base()
    workspace().put(_GRAPH, data)
    manifest = _manifest()
    program = next(program for program in manifest.programs if program.backend == "onnx")
    entry = FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    program = replace(program, graphs={"model": _GRAPH}, files={**program.files, _GRAPH: entry})
    artifact = Artifact(path=workspace().input, manifest=replace(manifest, programs=(program,), files={}))
    attempt(load_runner, artifact, threads=1, kernels="stock")
    read_weights(program)


@cache
def _manifest() -> Manifest:
    return Manifest.from_json((FOLDER / "corpus" / "weights" / "exported.json").read_bytes())


def mutate(data: bytes, rng: Random) -> bytes:
    return mutate_message(data, rng, onnx.ModelProto)
