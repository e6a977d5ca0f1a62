"""The eager model and the exported fp32 program against golden_outputs/, which only a command writes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lfm2_export
from examples.write_golden_outputs import COMMAND, PROMPTS, ROOT, TOKENS, checkpoint_hashes, encode, follow
from lfm2_export.backends.base import Runner
from lfm2_export.backends.eager import EagerRunner
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.models.loading import load_model
from lfm2_export.source import BUNDLED
from lfm2_export.text import Tokenizer
from tests.shows import of, shows

# Logits are rounded to 5e-5; the rest is what two fp32 implementations, and two machines, differ by.
TOLERANCE = 2e-4

Logits = Callable[[Runner, list[int], list[int]], np.ndarray]

CASES = [(name, prompt) for name in BUNDLED for prompt in PROMPTS]


@functools.cache
def golden(name: str, prompt: str) -> dict[str, Any]:
    path = ROOT / name / f"{prompt}.json"
    assert path.is_file(), f"{path} is missing: run {COMMAND} {name}"
    record = json.loads(path.read_text(encoding="utf-8"))
    check_hashes(name, record)
    return record


def check_hashes(name: str, record: dict[str, Any]) -> None:
    if record["checkpoint"] != checkpoint_hashes(open_checkpoint(name)):
        pytest.fail(
            f"golden_outputs/{name} were written for other weights than the bundled {name} has now; "
            f"run {COMMAND} {name}, read the difference, and commit it",
            pytrace=False,
        )


@functools.cache
def eager(name: str) -> EagerRunner:
    return EagerRunner(load_model(open_checkpoint(name)))


def in_one_pass(runner: Runner, prompt_ids: list[int], tokens: list[int]) -> np.ndarray:
    """The logits along ``tokens``, as ``follow`` computes them step by step."""
    runner.reset()
    return runner.prefill_scored([[*prompt_ids, *tokens[:-1]]])[0][len(prompt_ids) - 1 :]


def step_by_step(runner: Runner, prompt_ids: list[int], tokens: list[int]) -> np.ndarray:
    return follow(runner, prompt_ids, tokens).logits


def largest_error(logits: Logits, runner: Runner, record: dict[str, Any]) -> float:
    """Of the recorded logits, along the recorded tokens; asserts that each step would choose its token."""
    found = logits(runner, record["prompt_ids"], record["tokens"])
    errors = [0.0]
    for step, (row, top) in enumerate(zip(found, record["top_logits"], strict=True)):
        ids = [int(token) for token, _ in top]
        errors += np.abs(row[ids] - [logit for _, logit in top]).tolist()
        lead = top[0][1] - top[1][1]
        assert row.argmax() == record["tokens"][step] or lead < 2 * TOLERANCE, f"step {step} chooses {row.argmax()}"
    return max(errors)


@pytest.mark.parametrize(("name", "prompt"), CASES)
def test_the_eager_model_says_what_it_said(name: str, prompt: str) -> None:
    error = largest_error(in_one_pass, eager(name), golden(name, prompt))
    print(f"{name} {prompt}: {error:.1e}")
    assert error <= TOLERANCE


@shows("ours", "greedy", "logits", family=of("name"), scheme="fp32")
@pytest.mark.parametrize("name", BUNDLED)
def test_the_exported_fp32_program_says_the_same(name: str, artifact: Callable[[str], Path]) -> None:
    runner = lfm2_export.load_runner(artifact(name), scheme="fp32", threads=1)
    errors = {prompt: largest_error(step_by_step, runner, golden(name, prompt)) for prompt in PROMPTS}
    print(name, {prompt: f"{error:.1e}" for prompt, error in errors.items()})
    assert max(errors.values()) <= TOLERANCE


@pytest.mark.parametrize(("name", "prompt"), CASES)
def test_prompts_are_encoded_as_they_were(name: str, prompt: str) -> None:
    record = golden(name, prompt)
    tokenizer = Tokenizer.from_dir(open_checkpoint(name).path)
    assert record["prompt"] == PROMPTS[prompt]
    assert record["prompt_ids"] == encode(tokenizer, PROMPTS[prompt])
    assert len(record["tokens"]) == TOKENS
    assert record["text"] == tokenizer.decode(record["tokens"])


@pytest.mark.parametrize("name", BUNDLED)
def test_there_is_a_file_for_each_prompt_and_no_other(name: str) -> None:
    assert {path.stem for path in (ROOT / name).glob("*.json")} == set(PROMPTS)


def test_a_changed_weight_does_not_pass() -> None:
    name, prompt = "tiny-dense", "sentence"
    model = load_model(open_checkpoint(name))
    weight = model.get_parameter("model.layers.3.feed_forward.w2.weight")
    weight.data[7] *= 1.01
    error = largest_error(in_one_pass, EagerRunner(model), golden(name, prompt))
    print(f"control: {error:.1e}")
    assert error > TOLERANCE


def test_other_weights_are_told_to_be_written_again() -> None:
    record = golden("tiny-moe", "sentence")
    changed = {**record, "checkpoint": {**record["checkpoint"], "shards": {"model.safetensors": "0" * 64}}}
    with pytest.raises(pytest.fail.Exception, match=r"run python examples/write_golden_outputs.py tiny-moe"):
        check_hashes("tiny-moe", changed)
