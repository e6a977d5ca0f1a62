"""The newer checkpoints' configs, with every field as published but the widths: they are exported, and are the model.

The layers' kinds and number, vocabulary, RoPE, experts and flags are those of config.json on the Hub; hidden sizes and
heads are small and the weights random, so that 40 layers and 64 experts take seconds.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import lfm2_export
from lfm2_export.backends.base import Runner
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.families import get_family
from tests.checkpoints import write_random_checkpoint

WIDTHS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON = {
    **WIDTHS,
    "bos_token_id": 1,
    "eos_token_id": 7,
    "pad_token_id": 0,
    "conv_L_cache": 3,
    "conv_bias": False,
    "dtype": "bfloat16",
    "initializer_range": 0.02,
    "max_position_embeddings": 128000,
    "norm_eps": 1e-05,
    "use_cache": True,
}
DENSE = COMMON | {
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "intermediate_size": 96,
    "block_auto_adjust_ff_dim": False,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "tie_embedding": True,
}
MOE = COMMON | {
    "architectures": ["Lfm2MoeForCausalLM"],
    "model_type": "lfm2_moe",
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "num_dense_layers": 2,
    "num_experts_per_tok": 4,
    "rope_parameters": {"rope_theta": 5000000.0, "rope_type": "default"},
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": True,
    "use_expert_bias": True,
    "vocab_size": 128000,
}


def kinds(layers: int, attention: tuple[int, ...], other: str = "conv") -> list[str]:
    return ["full_attention" if layer in attention else other for layer in range(layers)]


def lfm3_kinds() -> list[str]:
    """Full attention where i % 4 == 2, sliding where i % 4 == 0 but for the first."""
    named = {0: "sliding_attention", 2: "full_attention"}
    return ["conv", *(named.get(layer % 4, "conv") for layer in range(1, 24))]


PUBLISHED: dict[str, dict[str, Any]] = {
    "LFM2.5-230M": DENSE
    | {"num_hidden_layers": 14, "layer_types": kinds(14, (2, 4, 6, 8, 10, 12)), "vocab_size": 65536},
    "LFM2.5-2.6B": DENSE
    | {"num_hidden_layers": 30, "layer_types": kinds(30, (2, 5, 9, 13, 17, 21, 24, 27)), "vocab_size": 128000},
    "LFM2.5-8B-A1B": MOE
    | {"num_hidden_layers": 24, "layer_types": kinds(24, (2, 6, 10, 14, 18, 21)), "num_experts": 32},
    "LFM2.5-24B-A2B": MOE
    | {"num_hidden_layers": 40, "layer_types": kinds(40, tuple(range(2, 40, 4))), "num_experts": 64},
    "LFM3-1.7B": COMMON
    | {
        "architectures": ["Lfm3ForCausalLM"],
        "model_type": "lfm3",
        "bos_token_id": 124894,
        "eos_token_id": 124900,
        "pad_token_id": 124893,
        "conv_L_cache": 7,
        "head_dim": 32,
        "intermediate_size": 96,
        "layer_types": lfm3_kinds(),
        "max_position_embeddings": 262144,
        "num_hidden_layers": 24,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.5, "rope_theta": 1000000.0, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 256,
        "tie_word_embeddings": True,
        "vocab_size": 128000,
    },
}


TOLERANCE = 2e-4  # of logits up to 11; found were up to 6e-5
TOKENS = 24
QUANTIZED = ("LFM2.5-8B-A1B",)  # with five seeds 0.83 to 0.90, of 4 bits alone 0.38 to 0.56


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_exported_and_is_the_model(name: str, tmp_path: Path) -> None:
    """In one pass of transformers', and in two chunks and single steps of the exported program."""
    raw = PUBLISHED[name]
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", raw, seed=5)
    read = open_checkpoint(checkpoint).config
    assert (read.num_hidden_layers, read.vocab_size) == (raw["num_hidden_layers"], raw["vocab_size"])
    assert list(read.layer_types) == raw["layer_types"]
    ids = np.random.default_rng(0).integers(0, raw["vocab_size"], TOKENS).tolist()
    expected = reference(checkpoint, raw, ids)
    schemes = ("fp32", "q4") if name in QUANTIZED else ("fp32",)
    lfm2_export.export(checkpoint, scheme=schemes, output=tmp_path / "out")
    found = logits(lfm2_export.load_runner(tmp_path / "out", scheme="fp32", threads=1), ids)
    error = np.abs(found - expected).max()
    print(f"{name}: {error:.1e} of logits to {np.abs(expected).max():.1f}")
    assert error <= TOLERANCE
    if name in QUANTIZED:
        check_quantized(tmp_path / "out", ids, expected)
    wrong = reference(checkpoint, other_theta(raw), ids)
    assert np.abs(wrong - expected).max() > 10 * TOLERANCE


def check_quantized(artifact: Path, ids: list[int], expected: np.ndarray) -> None:
    """Random weights in many layers make much of the rounding; a wrong operator leaves nothing."""
    quantized = logits(lfm2_export.load_runner(artifact, scheme="q4", threads=1), ids)
    alike, other = correlation(quantized, expected), correlation(np.roll(quantized, 1, axis=0), expected)
    print(f"q4: logits correlate by {alike:.2f}, with those of the next position by {other:.2f}")
    assert alike > 0.7 > 0.3 > other


def reference(checkpoint: Path, raw: dict[str, Any], ids: list[int]) -> np.ndarray:
    """transformers' logits of all positions, [T, V]."""
    given = get_family(raw["model_type"]).reference_config(raw)
    fields = copy.deepcopy(raw if given is None else dict(given.raw))
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, config=config, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def logits(runner: Runner, ids: list[int]) -> np.ndarray:
    """Of all positions, [T, V]."""
    first = runner.prefill_scored([ids[: TOKENS - 4]], chunk_size=7)[0]
    return np.concatenate([first, *(runner.decode([token]) for token in ids[TOKENS - 4 :])])


def correlation(found: np.ndarray, expected: np.ndarray) -> float:
    """The mean over the positions."""
    return float(np.mean([np.corrcoef(*rows)[0, 1] for rows in zip(found, expected, strict=True)]))


def other_theta(raw: dict[str, Any]) -> dict[str, Any]:
    """The config with the RoPE of older checkpoints: what a field that is not read would come to."""
    changed = copy.deepcopy(raw)
    ropes = changed["rope_parameters"]
    for rope in ropes.values() if "full_attention" in ropes else (ropes,):
        rope["rope_theta"] = 20_000.0
    return changed
