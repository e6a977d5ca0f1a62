"""Greedy output with proposals is that of plain decoding, token for token, over thousands of tokens: q4 and q8 on our
operators, both families and LFM3, with either cache.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import lfm2_export
from lfm2_export.backends.base import Runner
from lfm2_export.backends.onnx import variants
from lfm2_export.generation import complete
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.speculation import Drafter, ModelDrafter, PromptLookup, Report, SpeculativeRunner
from lfm2_export.speculation.controller import Always
from lfm2_export.text import Tokenizer
from tests.backends.onnx.test_independent_rows import CONFIGS
from tests.conftest import Exported
from tests.shows import of, shows

pytestmark = pytest.mark.skipif(variants.own_library() is None, reason="no compiler for our operators")

PROMPTS = (
    "def add(a, b):\n    return a + b\n\ndef subtract(a, b):",
    "The list of files is: a.txt, b.txt, c.txt. Repeat the list of files.",
    "Once upon a time",
)
NEW = 160


def speculative(runner: Runner, drafter: Drafter) -> SpeculativeRunner:
    return SpeculativeRunner(runner, drafter, controller=Always(most=7, report=Report(drafter=drafter.name)))


def compared(
    runner: Runner, prompts: list[list[int]], make: Callable[[], Drafter], **settings: object
) -> tuple[int, int]:
    """Tokens compared, and proposals accepted."""
    tokens = accepted = 0
    for prompt in prompts:
        config = GenerationConfig(max_new_tokens=NEW, **settings)
        (plain,) = complete(runner, [prompt], config)
        ours = speculative(runner, make())
        (found,) = complete(ours, [prompt], config)
        assert found == plain
        tokens += len(plain.tokens)
        accepted += ours.report.accepted
    return tokens, accepted


@shows("ours-own", "speculation", family=of("checkpoint"), scheme=of("scheme"))
@pytest.mark.parametrize("checkpoint", ["tiny-dense", "tiny-moe"])
@pytest.mark.parametrize(("scheme", "cache"), [("q4", "float"), ("q8", "float"), ("q4", "int8")])
def test_bundled_models_say_the_same_with_lookup(
    artifact: Callable[[str], Path], checkpoint: str, scheme: str, cache: str
):
    folder = artifact(checkpoint)
    runner = lfm2_export.load_runner(folder, scheme=scheme, kv_cache=cache, kernels="lfm2", threads=1)
    prompts = [Tokenizer.from_dir(folder).encode(prompt) for prompt in PROMPTS]
    tokens, accepted = compared(runner, prompts, PromptLookup)
    print(f"{tokens} tokens, {accepted} by proposals")
    assert accepted > tokens / 4
    compared(runner, prompts[:1], PromptLookup, repetition_penalty=1.1, no_repeat_ngram_size=6)
    compared(runner, prompts[:1], PromptLookup, do_sample=True, temperature=0.8, seed=1)


@shows("ours-own", "speculation", family=of("name", lambda name: CONFIGS[name]["model_type"]), scheme="q4")
@pytest.mark.parametrize("name", CONFIGS)
def test_random_models_say_the_same_with_a_model_that_is_sometimes_right(
    random_artifact: Callable[..., Exported], name: str
):
    folder = random_artifact(CONFIGS[name], ("q4", "q8")).artifact
    runner = lfm2_export.load_runner(folder, scheme="q4", kernels="lfm2", threads=1)
    drafter = lfm2_export.load_runner(folder, scheme="q8", kernels="lfm2", threads=1)
    prompt = np.random.default_rng(0).integers(0, runner.vocab_size, 12).tolist()
    tokens, accepted = compared(runner, [prompt, prompt[:1]], lambda: Certain(drafter))
    print(f"{tokens} tokens, {accepted} by proposals")
    assert accepted > tokens / 20


class Certain(ModelDrafter):
    """Proposes however little it believes in it: random weights believe in nothing."""

    least = 0.0
