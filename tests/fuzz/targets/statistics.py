"""A file of statistics: what it says of itself, and every Hessian in it, for the model of ``tests/fuzz/base``."""

from __future__ import annotations

import json
from functools import cache
from random import Random
from types import SimpleNamespace
from typing import Any

from lfm2_export.calibration.statistics import METADATA, Statistics
from lfm2_export.families import get_family
from lfm2_export.manifest import CheckpointRecord
from tests.fuzz.findings import attempt
from tests.fuzz.mutation import json_mutator, mutate_described
from tests.fuzz.targets import FOLDER
from tests.fuzz.workspace import workspace

_WORDS = ("dtype", "shape", "data_offsets", "F32", "BF16", "__metadata__", METADATA, "seen", "averaged", "version")
_mutate_json = json_mutator(*_WORDS, "tokens", "source", "sha256", "checkpoint", "lm_head.weight")


@cache
def checkpoint() -> Any:
    """The config and tensors of a checkpoint, which statistics must fit."""
    raw = json.loads((FOLDER / "base" / "config.json").read_bytes())
    family = get_family(raw["model_type"])
    config = family.parse_config(raw)
    return SimpleNamespace(config=config, model_tensors=family.tensors(config))


def record() -> CheckpointRecord:
    model_type = checkpoint().config.model_type
    return CheckpointRecord(name="base", revision=None, model_type=model_type, config_sha256="0" * 64, shards={})


def fuzz_one(data: bytes) -> None:
    workspace().empty()
    path = workspace().put("statistics.safetensors", data)
    found = attempt(Statistics, path, checkpoint(), record())
    if found is None:
        return
    attempt(found.record)
    for name in found.inputs:
        attempt(found.hessian, name)
        attempt(found.of, name)


def mutate(data: bytes, rng: Random) -> bytes:
    return mutate_described(data, rng, METADATA, _mutate_json)
