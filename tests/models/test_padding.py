"""Padding never shows: a padded row equals the same row run alone, in a prefill, in a chunk with a past, in decode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lfm2_export.models.decoder import Cache, CausalLMOutput, DecoderForCausalLM
from tests.models.reference import TOLERANCE, largest, models, perturbed, token_ids
from tests.models.test_against_transformers import report

PAD = 99  # a token like any other: that it is padding says the mask alone
LENGTHS = (9, 4, 1, 7)
WIDTH = 11
CASES = [
    "lfm2-plain",
    "lfm2-conv_bias",
    "lfm2-conv_L_cache_7",
    "lfm2-no_conv_layer",
    "lfm2-no_attention_layer",
    "lfm2_moe-plain",
    "lfm2_moe-everything_at_once",
    "lfm3-plain",
    "lfm3-only_sliding_layers",
]
SIDES = ["left", "right", "both", "middle", "scattered"]


def mask_of(side: str, length: int, width: int, row: int) -> Tensor:
    """``length`` ones among ``width`` places."""
    mask = torch.zeros(width, dtype=torch.long)
    gap = width - length
    places = torch.arange(length)
    if side == "left":
        places = places + gap
    elif side == "both":
        places = places + gap // 2
    elif side == "middle":
        places = torch.where(places < (length + 1) // 2, places, places + gap)
    elif side == "scattered":
        order = torch.randperm(width, generator=torch.Generator().manual_seed(row))
        places = order[:length].sort().values
    mask[places] = 1
    return mask


def padded(rows: list[Tensor], side: str, width: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), both [B, width]."""
    mask = torch.stack([mask_of(side, len(row), width, index) for index, row in enumerate(rows)])
    ids = torch.full_like(mask, PAD)
    for index, row in enumerate(rows):
        ids[index, mask[index] == 1] = row
    return ids, mask


def rows_of(lengths: tuple[int, ...], seed: int) -> list[Tensor]:
    return [token_ids(1, length, seed=seed + index)[0] for index, length in enumerate(lengths)]


def alone(model: DecoderForCausalLM, rows: list[Tensor], caches: list[Cache] | None = None) -> list[CausalLMOutput]:
    given = caches or [None] * len(rows)
    return [model(row[None], cache=cache) for row, cache in zip(rows, given, strict=True)]


def error_of_rows(out: CausalLMOutput, mask: Tensor, expected: list[CausalLMOutput]) -> float:
    return max(largest(out.logits[i][mask[i] == 1], one.logits[0]) for i, one in enumerate(expected))


def caches_of(outputs: list[CausalLMOutput]) -> list[Cache]:
    return [out.cache for out in outputs if out.cache is not None]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("side", SIDES)
def test_padded_rows_equal_the_rows_alone(case: str, side: str) -> None:
    _, model = models(case)
    errors, rows = {}, rows_of(LENGTHS, 0)
    ids, mask = padded(rows, side, WIDTH)
    out, expected = model(ids, attention_mask=mask), alone(model, rows)
    errors["prefill"] = error_of_rows(out, mask, expected)
    # A chunk that is itself padded, after a past that was; then one token at a time.
    chunk = rows_of((2, 5, 3, 1), 10)
    chunk_ids, chunk_mask = padded(chunk, side, 6)
    mask = torch.cat([mask, chunk_mask], dim=1)
    out = model(chunk_ids, attention_mask=mask, cache=out.cache)
    expected = alone(model, chunk, caches_of(expected))
    errors["chunk"] = error_of_rows(out, chunk_mask, expected)
    for step in range(3):
        token = rows_of((1, 1, 1, 1), 20 + step)
        mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], dim=1)
        out = model(torch.stack(token), attention_mask=mask, cache=out.cache)
        expected = alone(model, token, caches_of(expected))
        errors[f"decode {step}"] = error_of_rows(out, torch.ones(4, 1), expected)
    report(f"{case} {side}:", errors)


@pytest.mark.parametrize("case", ["lfm2-plain", "lfm2_moe-plain"])
def test_the_comparison_with_rows_alone_can_fail(case: str) -> None:
    _, model = models(case)
    rows = rows_of(LENGTHS, 0)
    ids, mask = padded(rows, "left", WIDTH)
    expected = alone(model, rows)
    wrong = perturbed(model, "model.layers.0.conv.conv.weight")
    errors = {
        "weight": error_of_rows(wrong(ids, attention_mask=mask), mask, expected),
        "no mask": error_of_rows(model(ids), mask, expected),
        "mask off by one": error_of_rows(model(ids, attention_mask=mask.roll(1, dims=1)), mask, expected),
    }
    print("controls:", errors)
    assert min(errors.values()) > 100 * TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ["lfm2-plain", "lfm2_moe-plain"])
def test_padded_prefill_equals_theirs(case: str, side: str) -> None:
    theirs, model = models(case)
    ids, mask = padded(rows_of(LENGTHS, 0), side, WIDTH)
    expected = theirs(ids, attention_mask=mask, use_cache=False).logits
    found = model(ids, attention_mask=mask).logits
    report(f"{case} {side}:", {"attended": largest(found[mask == 1], expected[mask == 1])})


@pytest.mark.parametrize("case", CASES)
def test_a_mask_without_zeros_changes_nothing(case: str) -> None:
    _, model = models(case)
    ids = token_ids(2, 9)
    first = model(ids[:, :5])
    masked = model(ids[:, :5], attention_mask=torch.ones(2, 5, dtype=torch.long))
    second = model(ids[:, 5:], cache=first.cache)
    masked_second = model(ids[:, 5:], cache=masked.cache, attention_mask=torch.ones(2, 9, dtype=torch.long))
    assert torch.equal(first.logits, masked.logits)
    assert torch.equal(second.logits, masked_second.logits)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.uint8], ids=str)
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    _, model = models("lfm2_moe-plain")
    ids, mask = padded(rows_of(LENGTHS, 0), "both", WIDTH)
    expected = model(ids, attention_mask=mask)
    assert torch.equal(model(ids, attention_mask=mask.to(dtype)).logits, expected.logits)
    assert torch.equal(model(ids, attention_mask=mask * 3).logits, expected.logits)


@pytest.mark.parametrize("case", CASES)
def test_a_row_without_a_token_in_a_chunk_keeps_its_state(case: str) -> None:
    _, model = models(case)
    rows = rows_of((5, 5), 0)
    out, expected = model(torch.stack(rows)), alone(model, rows)
    chunk_mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    mask = torch.cat([torch.ones(2, 5, dtype=torch.long), chunk_mask], dim=1)
    chunk = token_ids(2, 3, seed=5)
    out = model(chunk, attention_mask=mask, cache=out.cache)
    assert torch.isfinite(out.logits).all()
    token = token_ids(2, 1, seed=6)
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    out = model(token, attention_mask=mask, cache=out.cache)
    caches = caches_of(expected)
    first = model(chunk[:1], cache=caches[0])
    wanted = [model(token[:1], cache=first.cache), model(token[1:], cache=caches[1])]
    report(case, {str(i): largest(out.logits[i], one.logits[0]) for i, one in enumerate(wanted)})


def test_attentions_of_padded_rows() -> None:
    _, model = models("lfm2-plain")
    rows = rows_of((6, 3), 0)
    ids, mask = padded(rows, "left", 6)
    found = model(ids, attention_mask=mask, output_attentions=True)
    wanted = [model(row[None], output_attentions=True) for row in rows]
    errors = {}
    for layer, weights in enumerate(found.attentions):
        for index, one in enumerate(wanted):
            own = weights[index][:, mask[index] == 1][:, :, mask[index] == 1]
            errors[f"{layer}.{index}"] = largest(own, one.attentions[layer][0])
            hidden = weights[index][:, mask[index] == 1][:, :, mask[index] == 0]
            assert hidden.abs().sum() == 0
    report("attentions:", errors)


def test_explicit_positions_with_padding_are_taken_as_they_are() -> None:
    theirs, model = models("lfm2-plain")
    ids, mask = padded(rows_of(LENGTHS, 0), "left", WIDTH)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    default = model(ids, attention_mask=mask)
    given = model(ids, attention_mask=mask, position_ids=positions)
    assert torch.equal(default.logits, given.logits)
    expected = theirs(ids, attention_mask=mask, position_ids=positions * 3, use_cache=False).logits
    found = model(ids, attention_mask=mask, position_ids=positions * 3).logits
    report("positions x 3:", {"attended": largest(found[mask == 1], expected[mask == 1])})
    assert largest(found[mask == 1], default.logits[mask == 1]) > TOLERANCE
