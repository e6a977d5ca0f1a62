"""The bundled checkpoints: trained weights in both libraries' models."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.families import get_family
from lfm2_export.models.decoder import DecoderForCausalLM
from lfm2_export.parity.sample import HELD_OUT
from lfm2_export.source import ASSETS, BUNDLED
from lfm2_export.text import Tokenizer
from tests.models.reference import TOLERANCE, largest, perturbed, token_ids
from tests.models.test_against_transformers import in_chunks, report
from tests.models.test_padding import alone, error_of_rows, padded, rows_of


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_checkpoints_compute_what_transformers_computes(name: str) -> None:
    ours = DecoderForCausalLM.from_pretrained(name, offline=True)
    theirs = reference_model(name)
    ids = token_ids(2, 60, vocab_size=ours.config.vocab_size)
    expected = theirs(ids, use_cache=False).logits
    rows = rows_of((20, 3, 33), 0)
    left_ids, left_mask = padded(rows, "left", 35)
    right_ids, right_mask = padded(rows, "right", 35)
    steps = {"prefill": (60,), "chunks": (25, 1, 30, 1, 3), "one by one": (1,) * 60}
    found = {case: their_chunks(theirs, ids, sizes) for case, sizes in steps.items()}
    errors = {case: largest(in_chunks(ours, ids, sizes), found[case]) for case, sizes in steps.items()}
    report(f"{name}: logits to {expected.abs().max():.1f}:", errors)
    # What is padded is added up in another order, which moves transformers' own logits by up to 1.5e-5.
    order = max(largest(logits, expected) for logits in found.values())
    padding = {
        "left padding": error_of_rows(ours(left_ids, attention_mask=left_mask), left_mask, alone(ours, rows)),
        "right padding": error_of_rows(ours(right_ids, attention_mask=right_mask), right_mask, alone(ours, rows)),
    }
    report(f"{name}, by the order alone {order:.1e}:", padding, TOLERANCE + 2 * order)
    layer = ours.config.attention_layers[0]
    wrong = perturbed(ours, f"model.layers.{layer}.self_attn.q_proj.weight")
    assert largest(wrong(ids).logits, expected) > 100 * TOLERANCE


def reference_model(name: str) -> Any:
    """transformers' model, its config relabelled where the published one says something else than it means."""
    raw = json.loads((ASSETS / name / "config.json").read_text())
    given = get_family(raw["model_type"]).reference_config(raw)
    config = transformers.AutoConfig.for_model(**(raw if given is None else copy.deepcopy(dict(given.raw))))
    return transformers.AutoModelForCausalLM.from_pretrained(ASSETS / name, config=config, dtype=torch.float32).eval()


def their_chunks(model: Any, ids: Tensor, chunks: tuple[int, ...]) -> Tensor:
    """transformers' logits of all positions, in the same steps: sums depend on what is computed at once."""
    cache, logits = None, []
    for part in ids.split(list(chunks), dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


WINDOW, WINDOWS = 512, 16


@pytest.mark.parametrize(("name", "perplexity"), [("tiny-moe", 46.96), ("tiny-dense", 45.22), ("tiny-lfm3", 53.35)])
def test_held_out_perplexity_is_what_the_model_card_states(name: str, perplexity: float) -> None:
    """On the part of the held-out text that the package carries, so only about."""
    assert f"{perplexity:.2f}" in (ASSETS / name / "README.md").read_text()
    model = DecoderForCausalLM.from_pretrained(name, offline=True)
    ids = held_out(name)
    logits = model(ids[:, :-1]).logits
    found = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp().item()
    print(f"{name}: perplexity {found:.2f} of {ids.numel()} tokens, the card says {perplexity}")
    assert abs(found / perplexity - 1) < 0.05


def test_no_expert_is_idle() -> None:
    """Every expert gets at least a quarter of its fair share, in every layer, on text that was kept out of training."""
    model = DecoderForCausalLM.from_pretrained("tiny-moe", offline=True)
    config = model.config
    with torch.no_grad():
        logits = model(held_out("tiny-moe"), output_router_logits=True).router_logits
    assert len(logits) == len(config.moe_layers) >= 3
    for layer, scores in zip(config.moe_layers, logits, strict=True):
        bias = model.get_buffer(f"model.layers.{layer}.feed_forward.expert_bias")
        chosen = (scores.float().sigmoid() + bias).topk(config.num_experts_per_tok).indices
        share = chosen.flatten().bincount(minlength=config.num_experts) / chosen.numel() * config.num_experts
        print(f"layer {layer}: {' '.join(f'{one:.2f}' for one in share)} of a fair share")
        assert share.min() >= 0.25


@pytest.mark.parametrize("name", ["tiny-moe", "tiny-dense"])
def test_shapes_leave_nothing_to_chance(name: str) -> None:
    """Every matrix's rows can be cut into groups of 128, and the vocabulary is mistaken for no other width."""
    checkpoint = open_checkpoint(name)
    config = checkpoint.config
    shapes = {tensor: info.shape for tensor, info in checkpoint.tensors.items()}
    matrices = {tensor: shape for tensor, shape in shapes.items() if len(shape) == 2}
    assert not {tensor: shape for tensor, shape in matrices.items() if shape[-1] % 128}
    assert config.vocab_size not in {size for t, s in shapes.items() if "embed_tokens" not in t for size in s}
    assert len(config.attention_layers) >= 2


def held_out(name: str) -> torch.Tensor:
    """int64 [WINDOWS, WINDOW] of the bundled text."""
    tokens = Tokenizer.from_dir(ASSETS / name).encode(HELD_OUT.read_text(encoding="utf-8"), add_special_tokens=False)
    return torch.from_numpy(np.array(tokens[: WINDOW * WINDOWS], dtype=np.int64)).reshape(WINDOWS, WINDOW)
