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
from tests.fuzz.mutation import json_mutator, mutate_bytes
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
