"""What the tests of a release showed: which runtime did what with which family's program of which scheme.

In: ``assets/tested.json``, which ``python -m tests.support_table`` makes of a run's results: every test, how it ended
and the cells (runtime, family, scheme, feature) that it shows. Out: cells. What no test shows is not in there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lfm2_export import json_values

RESULTS = Path(__file__).parent / "assets" / "tested.json"

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
NOT_TESTED = "not tested"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What opens a program. ``short``: what it is called where kernels and devices are not told apart; ``own``: whether
    it runs ours."""

    title: str
    short: str
    backend: str
    own: bool = False


def _onnx(title: str, short: str | None = None, *, own: bool = False) -> Runtime:
    return Runtime(title=title, short=short or title, backend="onnx", own=own)


def _executorch(title: str, short: str | None = None, *, own: bool = False) -> Runtime:
    return Runtime(title=title, short=short or title, backend="executorch", own=own)


_OURS, _GENAI, _JS = "lfm2-export", "onnxruntime-genai", "Transformers.js"
RUNTIMES: Mapping[str, Runtime] = {
    "ours": _onnx("lfm2-export on ONNX Runtime's kernels", _OURS),
    "ours-own": _onnx("lfm2-export on our operators", _OURS, own=True),
    "onnxruntime": _onnx("onnxruntime alone", "onnxruntime"),
    "onnxruntime-own": _onnx("onnxruntime with our operators", "onnxruntime", own=True),
    "genai": _onnx(_GENAI),
    "genai-own": _onnx("onnxruntime-genai with our operators", _GENAI, own=True),
    "js-node": _onnx("Transformers.js in Node", f"{_JS} (Node)"),
    "js-wasm": _onnx("Transformers.js on wasm", f"{_JS} (wasm)"),
    "js-webgpu": _onnx("Transformers.js on WebGPU", f"{_JS} (WebGPU)"),
    "page-wasm": _onnx("examples/web in Chromium on wasm", "Chromium (wasm)"),
    "page-webgpu": _onnx("examples/web in Chromium on WebGPU", "Chromium (WebGPU)"),
    "transformers": _onnx("transformers' generate and pipeline", "transformers"),
    "serve": _onnx("lfm2-export serve", _OURS),
    "sentence-transformers": _onnx("sentence-transformers"),
    "pte": _executorch("lfm2-export on ExecuTorch", _OURS),
    "pte-own": _executorch("lfm2-export on ExecuTorch with our operator", _OURS, own=True),
    "llm-runner": _executorch("ExecuTorch's TextLLMRunner"),
    "llm-runner-own": _executorch(
        "ExecuTorch's TextLLMRunner with our operator", "ExecuTorch's TextLLMRunner", own=True
    ),
}

FEATURES: Mapping[str, str] = {
    "greedy": "greedy tokens of the reference",
    "logits": "logits of the reference",
    "embeddings": "vectors of the reference",
    "proposals": "proposals of the reference",
    "chunks": "prefill in chunks",
    "padding": "padded rows",
    "rows": "rows of different length",
    "states": "snapshots, marks, going on from a state",
    "state-files": "a conversation's state as a file",
    "window": "sliding layers in bounded memory",
    "int8-kv": "int8 keys and values",
    "speculation": "speculation changes no token",
    "sampling": "sampling",
    "beams": "beam search",
    "chat": "chat template and tokenizer",
    "streaming": "streamed text",
    "prefixes": "prompts that begin alike share a state",
    "lora": "an adapter merged",
    "gguf": "made of a GGUF file",
    "packed": "made of packed weights (compressed-tensors, GPTQ)",
    "calibration": "made with a calibration",
    "foreign": "a folder that others exported",
}
# What a runtime has to do with a program before it is said to open it.
OPENS = ("greedy", "logits", "embeddings", "proposals")


@dataclass(frozen=True, kw_only=True, order=True)
class Cell:
    """One field of the table: the names of ``RUNTIMES``, a family, a scheme, ``FEATURES``."""

    runtime: str
    family: str
    scheme: str
    feature: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a test ended, in a word, and what it shows; ``reason``: why it was skipped."""

    outcome: str
    cells: tuple[Cell, ...]
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Results:
    """The tests by their ids, and on what they ran: ``ran``, "system" and versions by their names."""

    tests: Mapping[str, Result]
    ran: Mapping[str, str]
    by_cell: Mapping[Cell, tuple[str, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        found: dict[Cell, list[str]] = {}
        for name, test in self.tests.items():
            for cell in test.cells:
                found.setdefault(cell, []).append(name)
        object.__setattr__(self, "by_cell", {cell: tuple(names) for cell, names in found.items()})

    def outcome(self, cell: Cell) -> str:
        """``FAILED`` where one of its tests failed, ``PASSED`` where one passed, else ``SKIPPED``, ``NOT_TESTED``."""
        outcomes = {self.tests[name].outcome for name in self.by_cell.get(cell, ())}
        return next((one for one in (FAILED, PASSED, SKIPPED) if one in outcomes), NOT_TESTED)

    def passed(self, family: str, scheme: str, features: Iterable[str] = OPENS) -> tuple[str, ...]:
        """The runtimes, by their names, that showed one of ``features`` with a program, in the table's order."""
        return tuple(
            runtime
            for runtime in RUNTIMES
            if PASSED
            in {
                self.outcome(Cell(runtime=runtime, family=family, scheme=scheme, feature=feature))
                for feature in features
            }
        )

    def to_json(self) -> dict[str, Any]:
        """A line of the file for each test."""
        tests = {
            name: {"outcome": test.outcome, "shows": [" ".join(_words(cell)) for cell in sorted(test.cells)]}
            | ({"reason": test.reason} if test.reason else {})
            for name, test in sorted(self.tests.items())
        }
        return {"ran": dict(self.ran), "tests": tests}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Results:
        tests = {
            name: Result(
                outcome=test["outcome"],
                cells=tuple(cell_of(words) for words in test["shows"]),
                reason=test.get("reason"),
            )
            for name, test in value["tests"].items()
        }
        return cls(tests=tests, ran=value["ran"])


def _words(cell: Cell) -> tuple[str, str, str, str]:
    return cell.runtime, cell.family, cell.scheme, cell.feature


def cell_of(words: str) -> Cell:
    """The cell that ``Results.to_json`` has written."""
    runtime, family, scheme, feature = words.split(" ")
    return Cell(runtime=runtime, family=family, scheme=scheme, feature=feature)


@cache
def results() -> Results:
    """What this release's tests showed."""
    return Results.from_json(json_values.parse(RESULTS.read_bytes()))


def opened_by(backend: str, family: str, scheme: str) -> tuple[str, ...]:
    """What opens a backend's program in the tests, by its short name."""
    found = results().passed(family, scheme)
    return tuple(dict.fromkeys(RUNTIMES[name].short for name in found if RUNTIMES[name].backend == backend))
