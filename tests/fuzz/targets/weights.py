"""Where a manifest says that weights lie in an artifact's programs: what `parity` reads back.

The input is a manifest; the programs that it speaks of are those of ``tests/fuzz/base`` and of the seeds for graphs.
Their hashes are not compared: whoever writes a manifest can write the right ones.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import islice

from lfm2_export.backends import get_backend
from lfm2_export.config import ModelConfig
from lfm2_export.families import get_family
from lfm2_export.manifest import Manifest, Program
from tests.fuzz.findings import attempt
from tests.fuzz.mutation import json_mutator
from tests.fuzz.targets import FOLDER
from tests.fuzz.workspace import workspace

_READ = 40  # tensors of each program

mutate = json_mutator(
    *("graphs", "options", "weights", "kind", "data", "scale", "rows", "blob_rows", "group_size", "expert", "shape"),
    *("columns", "first", "step", "float", "conv", "stock", "lfm2", "int4", "embedding8", "embedding4", "model", "cpu"),
    *("config.json", "onnx/model_q4.onnx", "executorch/model_8da4w.pte"),
)


def fuzz_one(data: bytes) -> None:
    manifest = attempt(Manifest.from_json, data)
    if manifest is not None:
        put_base()
        for program in manifest.programs[:4]:
            read_weights(program)


def put_base() -> None:
    """The files of an artifact with an ONNX and an ExecuTorch program, as they were exported."""
    workspace().empty()
    for name, content in _base().items():
        workspace().put(name, content)


@cache
def _base() -> dict[str, bytes]:
    base = FOLDER / "base"
    places = {
        "config.json": base / "config.json",
        "onnx/model_q4.onnx": FOLDER / "corpus" / "onnx_graph" / "model_q4.onnx",
        "onnx/model_q4.onnx_data": base / "model_q4.onnx_data",
        "executorch/model_8da4w.pte": base / "model_8da4w.pte",
    }
    return {name: path.read_bytes() for name, path in places.items()}


@cache
def _config() -> ModelConfig:
    raw = json.loads((FOLDER / "base" / "config.json").read_bytes())
    return get_family(raw["model_type"]).parse_config(raw)


def read_weights(program: Program) -> None:
    """Every weight of a program in the workspace, as parity's second hop reads it."""
    backend = attempt(get_backend, program.backend)
    if backend is None or not hasattr(backend, "stored_weights"):
        return
    weights = attempt(backend.stored_weights, workspace().input, program, _config())
    if weights is not None:
        for name in islice(weights.tensors, _READ):
            attempt(weights.read, name)
