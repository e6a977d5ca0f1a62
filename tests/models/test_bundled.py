"""The bundled checkpoints: trained weights in both libraries' models."""

from __future__ import annotations

import pytest
import torch
import transformers

from lfm2_export.models._common import DecoderForCausalLM
from lfm2_export.source import ASSETS
from tests.models.reference import TOLERANCE, largest, perturbed, token_ids
from tests.models.test_against_transformers import in_chunks, report
from tests.models.test_padding import alone, error_of_rows, padded, rows_of


@pytest.mark.parametrize("name", ["tiny-moe", "tiny-dense"])
def test_bundled_checkpoints_compute_what_transformers_computes(name: str) -> None:
    ours = DecoderForCausalLM.from_pretrained(name, offline=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(ASSETS / name, dtype=torch.float32).eval()
    ids = token_ids(2, 60, vocab_size=ours.config.vocab_size)
    expected = theirs(ids, use_cache=False).logits
    rows = rows_of((20, 3, 33), 0)
    left_ids, left_mask = padded(rows, "left", 35)
    right_ids, right_mask = padded(rows, "right", 35)
    errors = {
        "prefill": largest(ours(ids).logits, expected),
        "chunks": largest(in_chunks(ours, ids, (25, 1, 30, 1, 3)), expected),
        "one by one": largest(in_chunks(ours, ids, (1,) * 60), expected),
        "left padding": error_of_rows(ours(left_ids, attention_mask=left_mask), left_mask, alone(ours, rows)),
        "right padding": error_of_rows(ours(right_ids, attention_mask=right_mask), right_mask, alone(ours, rows)),
    }
    report(f"{name}: logits to {expected.abs().max():.1f}:", errors)
    layer = ours.config.attention_layers[0]
    wrong = perturbed(ours, f"model.layers.{layer}.self_attn.q_proj.weight")
    assert largest(wrong(ids).logits, expected) > 100 * TOLERANCE
