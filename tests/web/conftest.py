"""Chromium, driven by playwright-core from Node, and what the pages need."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lfm2_export
from lfm2_export.text import Tokenizer
from tests.runtimes.greedy import TIE

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "web"
MODULES = EXAMPLE / "node_modules"
DRIVER = Path(__file__).with_name("drive.mjs")
NAMES = ("chromium", "chromium-browser", "google-chrome")

Steps = Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Visit:
    """What a page was asked and showed: a value for each step, URLs that it asked for, lines of its console, errors."""

    values: list[Any]
    requests: list[str]
    log: list[str]
    errors: list[str]


Drive = Callable[..., list[Visit]]


@pytest.fixture(scope="session")
def chromium() -> str:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    if shutil.which("node") is None or not (MODULES / "playwright-core").is_dir():
        pytest.skip("node or playwright-core is not installed: npm ci --prefix examples/web")
    return found


@pytest.fixture(scope="session")
def drive(chromium: str) -> Drive:
    """``drive(visit, ..., arguments=())``: each a mapping that ``drive.mjs`` describes, in one browser."""

    def driven(*visits: dict[str, Any], arguments: Sequence[str] = ()) -> list[Visit]:
        job = json.dumps({"arguments": list(arguments), "visits": visits})
        command = ["node", str(DRIVER), str(MODULES), chromium]
        done = subprocess.run(command, input=job, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-2000:]
        found = [Visit(**visit) for visit in json.loads(done.stdout)]
        for visit in found:
            assert not visit.errors, (visit.errors, visit.log)
        return found

    return driven


READY = ("wait", "#send:enabled")
ANSWERED = ("wait", "article.assistant:not(.running)")


def greedily(length: int = 24) -> Steps:
    """The likeliest token always, so many at most."""
    return [("click", "summary"), ("fill", "#temperature", "0"), ("fill", "#length", str(length)), ("click", "summary")]


def say(text: str) -> Steps:
    return [("fill", "#text", text), ("press", "#text", "Enter")]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What Python says to a question, greedily: its tokens, the one that ends it too, and their text."""

    tokens: list[int]
    text: str


def python_answer(folder: Path, question: str, scheme: str = "q4") -> Answer:
    """On onnxruntime's kernels, as a browser has; of a question where none of the choices is near a tie."""
    tokenizer = Tokenizer.from_dir(folder)
    runner = lfm2_export.load_runner(folder, scheme=scheme, threads=1, kernels="stock")
    stop = tokenizer.token_id("<|im_end|>")
    logits, tokens, gaps = runner.prefill([tokenizer.encode_chat([{"role": "user", "content": question}])])[0], [], []
    while stop not in tokens:
        second, best = np.sort(logits)[-2:]
        tokens.append(int(logits.argmax()))
        gaps.append(float(best - second))
        logits = runner.decode([tokens[-1]])[0]
    print(f"{folder.name}, {question!r}: {len(tokens)} tokens, each by {min(gaps):.3f} logits or more")
    assert min(gaps) > TIE[scheme], "a tie; choose another question"
    return Answer(tokens=tokens, text=tokenizer.decode(tokens[:-1]))
