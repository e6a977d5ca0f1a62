"""ExecuTorch's own LLM runner on our files, from a script that imports nothing of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("executorch")

import lfm2_export
from lfm2_export.text import Tokenizer
from tests.shows import of, shows

NEW_TOKENS = 48
PROMPT = "A dictionary is"

# Tokens come as text: the runner has no other callback.
SCRIPT = """
import ctypes, json, sys
import executorch.kernels.quantized
from executorch.extension.llm.custom_ops import custom_ops
from executorch.extension.pybindings import portable_lib
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

program, tokenizer, prompt, count, *libraries = sys.argv[1:]
for library in libraries:
    ctypes.CDLL(library)
runner = TextLLMRunner(program, tokenizer)
texts = []
for _ in range(2):
    pieces = []
    config = GenerationConfig(max_new_tokens=int(count), temperature=0.0, echo=False)
    runner.generate(prompt, config, token_callback=pieces.append)
    texts.append("".join(pieces))
    runner.reset()
print("\\n" + json.dumps(texts))
"""


def texts_of(folder: Path, file: str, *libraries: Path) -> list[str]:
    arguments = [folder / "executorch" / file, folder / "tokenizer.json", PROMPT, NEW_TOKENS, *libraries]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(folder: Path, file: str, *libraries: Path) -> None:
    """Twice the same, and what our own runner says."""
    first, second = texts_of(folder, file, *libraries)
    assert first == second
    runner = lfm2_export.load_runner(folder)
    tokenizer = Tokenizer.from_dir(folder)
    # The stock runner adds no bos token unless it is told to.
    logits = runner.prefill([tokenizer.encode(PROMPT, add_special_tokens=False)])
    found: list[int] = []
    eos = 7
    while len(found) < NEW_TOKENS and eos not in found:
        found.append(int(logits.argmax()))
        logits = runner.decode(found[-1:])
    text = tokenizer.decode([token for token in found if token != eos])
    print(repr(first))
    assert first.startswith(text[:40])


@shows("llm-runner", "greedy", family=of("checkpoint"), scheme=of("scheme"))
@pytest.mark.parametrize(
    ("checkpoint", "scheme"), [("tiny-dense", "fp32"), ("tiny-dense", "8da4w"), ("tiny-moe", "fp32")]
)
def test_programs_of_stock_operators(pte_artifact: Callable[[str, str], Path], checkpoint: str, scheme: str) -> None:
    check(pte_artifact(checkpoint, scheme), f"model_{scheme}.pte")


@shows("llm-runner", "greedy", family="lfm2_moe", scheme="8da4w")
def test_moe_through_the_stock_operator(pte_artifact: Callable[[str, str], Path]) -> None:
    check(pte_artifact("tiny-moe", "8da4w"), "model_8da4w.pte")


@shows("llm-runner-own", "greedy", family="lfm2_moe", scheme="8da4w")
def test_moe_through_our_operator(pte_artifact: Callable[[str, str], Path]) -> None:
    from lfm2_export.kernels import build

    library = build.library_path()
    if library is None:
        pytest.skip("no compiler for our own operator")
    check(pte_artifact("tiny-moe", "8da4w"), "model_8da4w_lfm2.pte", library)
