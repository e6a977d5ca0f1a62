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
from tests.fuzz.mutation import json_mutator, mutate_bytes
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
    """The header as JSON, or the JSON that it holds of itself, with its length put right."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) or rng.random() < 0.15:
        return mutate_bytes(data, rng)
    header = data[8 : 8 + length]
    changed = _mutate_description(header, rng) if rng.random() < 0.5 else _mutate_json(header, rng)
    return len(changed).to_bytes(8, "little") + changed + data[8 + length :]


def _mutate_description(header: bytes, rng: Random) -> bytes:
    try:
        entries = json.loads(header)
        told = _mutate_json(entries["__metadata__"][METADATA].encode(), rng)
        entries["__metadata__"][METADATA] = told.decode("utf-8", "replace")
        return json.dumps(entries).encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return _mutate_json(header, rng)
