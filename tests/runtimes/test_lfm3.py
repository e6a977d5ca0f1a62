"""LFM3 in other runtimes: onnxruntime-genai takes it for its ``lfm2``, ExecuTorch's TextLLMRunner as it is.

The weights are random; the tokenizer is a bundled checkpoint's. Texts reach over the window's edge.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import lfm2_export
from lfm2_export.artifact import Artifact
from lfm2_export.source import ASSETS
from lfm2_export.text import Tokenizer
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.runtimes.greedy import STEPS, greedy
from tests.shows import of, shows

WINDOW = 16
RAW = tiny_config(
    "lfm3",
    vocab_size=2660,
    sliding_window=WINDOW,
    num_hidden_layers=4,
    layer_types=["conv", "full_attention", "sliding_attention", "conv"],
    eos_token_id=7,
)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def write_checkpoint(folder: Path) -> Path:
    """Its texts are ASCII: TextLLMRunner hands out token by token, and Python refuses a part of a character."""
    path = write_random_checkpoint(folder, RAW, seed=3, dtype="F32") / "model.safetensors"
    for name in TOKENIZER:
        shutil.copy(ASSETS / "tiny-dense" / name, folder)
    weights, tokenizer = load_file(path), Tokenizer.from_dir(folder)
    for token in range(RAW["vocab_size"]):
        if not tokenizer.decode([token]).isascii() or token < 10:
            weights["model.embed_tokens.weight"][token] *= 0.01  # never the likeliest
    save_file(weights, path)
    return folder


@pytest.fixture(scope="module")
def folder(once: Callable[..., Path]) -> Path:
    def make(folder: Path) -> None:
        checkpoint = write_checkpoint(folder / "checkpoint")
        lfm2_export.export(checkpoint, scheme=("fp32", "q8", "q4"), output=folder / "artifact")

    return once("lfm3-runtimes", make) / "artifact"


def test_genai_is_told_of_a_type_and_of_layers_that_it_knows(folder: Path) -> None:
    model = json.loads((folder / "genai_config.json").read_text())["model"]
    assert model["type"] == "lfm2"
    assert model["decoder"]["layer_types"] == ["conv", "full_attention", "full_attention", "conv"]
    assert json.loads((folder / "config.json").read_text())["model_type"] == "lfm3"


@shows("genai", "greedy", family="lfm3", scheme=of("scheme"))
@pytest.mark.parametrize("scheme", ["fp32", "q8", "q4"])
def test_genai_gives_our_runners_tokens(folder: Path, tmp_path: Path, scheme: str) -> None:
    pytest.importorskip("onnxruntime_genai")
    from tests.runtimes.test_onnxruntime_genai import endless, generate

    expected = greedy(folder, scheme)
    graph = Artifact.open(folder, verify=False).program("onnx", scheme).graphs["model"]
    model: Any = endless(folder, expected, graph, tmp_path / "artifact")
    assert STEPS > WINDOW
    expected.check("onnxruntime-genai", [generate(model, prompt, STEPS)[0] for prompt in expected.prompts])


@shows("llm-runner", "greedy", family="lfm3", scheme=of("scheme"))
@pytest.mark.parametrize("scheme", ["fp32", "8da4w"])
def test_the_stock_llm_runner_says_what_ours_says_twice(tmp_path: Path, scheme: str) -> None:
    pytest.importorskip("executorch")
    from tests.backends.executorch.test_stock_runner import check

    checkpoint, output = write_checkpoint(tmp_path / "checkpoint"), tmp_path / "artifact"
    lfm2_export.export(checkpoint, backend="executorch", scheme=scheme, max_context=256, output=output)
    check(output, f"model_{scheme}.pte")
