"""A conversation's state in a file, for programs of a model of ``tests/fuzz/base``."""

from __future__ import annotations

import json
from random import Random
from types import SimpleNamespace
from typing import Any

from lfm2_export.cache import CacheSpec
from lfm2_export.families import get_family
from lfm2_export.states import METADATA, check_target, read_state
from tests.fuzz.findings import attempt
from tests.fuzz.mutation import json_mutator, mutate_described
from tests.fuzz.targets import FOLDER
from tests.fuzz.workspace import workspace

_WORDS = ("dtype", "shape", "data_offsets", "F32", "U8", "I32", "__metadata__", METADATA, "tokens", "past_conv.0")
_mutate_json = json_mutator(
    *_WORDS, "version", "program", "vocabulary", "content", "messages", "text", "role", "content"
)
TOKENIZER: Any = SimpleNamespace(decode=str)


def _runners() -> dict[str, Any]:
    raw = json.loads((FOLDER / "base" / "config.json").read_bytes())
    cache = CacheSpec.from_config(get_family(raw["model_type"]).parse_config(raw))
    values = {"program_id": "onnx/q4@0", "context_length": 64, "vocab_size": 64}
    caches = {"float": cache, "int8": cache.with_int8_positions()}
    return {name: SimpleNamespace(cache=one, **values) for name, one in caches.items()}


RUNNERS = _runners()


def fuzz_one(data: bytes) -> None:
    workspace().empty()
    path = workspace().put("a.state", data)
    attempt(check_target, path)
    for runner in RUNNERS.values():
        attempt(read_state, path, runner, TOKENIZER)


def mutate(data: bytes, rng: Random) -> bytes:
    return mutate_described(data, rng, METADATA, _mutate_json)
