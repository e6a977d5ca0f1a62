"""What is fuzzed: one module for each reader of files that strangers write.

A module has ``fuzz_one(data)``, which takes one input through public functions of the package and raises for a finding
(``tests/fuzz/findings.py``), and ``mutate(data, rng)``, which makes another input of one. Seeds lie in
``corpus/<name>``, inputs that once did harm in ``crashes/<name>``.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from random import Random
from typing import Protocol

FOLDER = Path(__file__).parent.parent
# That one input may take. A template is given five, by the clock, before its process is killed.
SECONDS = 10
TARGETS = (
    "artifact",
    "chat_template",
    "checkpoint",
    "foreign",
    "generation_config",
    "gguf",
    "lora",
    "manifest",
    "onnx_graph",
    "packed",
    "pte",
    "safetensors",
    "state",
    "statistics",
    "tokenizer",
    "tokenizer_config",
    "weights",
)


class Target(Protocol):
    """What each module offers."""

    def fuzz_one(self, data: bytes) -> None: ...

    def mutate(self, data: bytes, rng: Random) -> bytes: ...


def load(name: str) -> Target:
    """A target by its name; "broken" is the one that breaks every rule, for tests of the harness."""
    return importlib.import_module(f"tests.fuzz.targets.{name}")


def kept(name: str) -> list[Path]:
    """The target's seeds, then the inputs that once did harm."""
    return [path for kind in ("corpus", "crashes") for path in sorted((FOLDER / kind / name).glob("*"))]
