"""What forward refuses, and how config and arguments decide what it returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.checkpoints import tiny_config
from tests.models.reference import models, our_model, token_ids

IDS = token_ids(2, 5)


def cache_of(case: str = "lfm2-plain", batch: int = 2) -> dict[str, torch.Tensor]:
    _, model = models(case)
    cache = model(token_ids(batch, 3)).cache
    assert cache is not None
    return cache


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({}, "pass exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 5, 64)}, "pass exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS[0]}, "input_ids has the shape [5]; expected [batch, tokens]"),
        ({"input_ids": IDS[:, :0]}, "input_ids has the shape [2, 0]; expected [batch, tokens]"),
        (
            {"inputs_embeds": torch.zeros(2, 5, 32)},
            "inputs_embeds has the shape [2, 5, 32]; expected [batch, tokens, 64]",
        ),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(2, 4)},
            "attention_mask has the shape [2, 4]; expected [2, 5]",
        ),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(1, 5)},
            "attention_mask has the shape [1, 5]; expected [2, 5]",
        ),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 5, 5)},
            "attention_mask has the shape [2, 1, 5, 5]; expected [2, 5]",
        ),
        ({"input_ids": IDS, "position_ids": torch.zeros(2, 4)}, "position_ids has the shape [2, 4]; expected [2, 5]"),
        ({"input_ids": IDS, "position_ids": torch.zeros(5)}, "position_ids has the shape [5]; expected [2, 5]"),
        ({"input_ids": IDS, "cache": {}}, "cache holds nothing; pass what the last call returned"),
        ({"input_ids": IDS, "cache": {"past_conv.0": IDS}}, "cache holds past_conv.0; pass what the last call"),
        ({"input_ids": IDS, "logits_to_keep": -1}, "logits_to_keep=-1; pass 0 for all positions"),
        (
            {"input_ids": IDS, "labels": IDS, "logits_to_keep": 1},
            "labels have the shape (2, 5) but the logits cover (2, 1); use logits_to_keep=0 with labels",
        ),
    ],
)
def test_inputs_that_contradict_each_other_are_refused(inputs: dict[str, Any], text: str) -> None:
    _, model = models("lfm2-plain")
    with pytest.raises(ValueError, match=r"\w") as caught:
        model(**inputs)
    print(caught.value)
    assert text in str(caught.value)


def test_a_cache_of_another_batch_model_or_length_is_refused() -> None:
    _, model = models("lfm2-plain")
    with pytest.raises(ValueError, match=r"past_conv.0 has the shape \[3, 2, 64\]; expected \[2, 2, 64\]"):
        model(IDS, cache=cache_of(batch=3))
    with pytest.raises(ValueError, match=r"past_conv.0 has the shape \[2, 6, 64\]; expected \[2, 2, 64\]"):
        model(IDS, cache=cache_of("lfm2-conv_L_cache_7"))
    longer = cache_of()
    longer["past_key_values.3.key"] = torch.zeros(2, 2, 9, 16)
    with pytest.raises(
        ValueError, match=r"past_key_values.3.key has the shape \[2, 2, 9, 16\]; expected \[2, 2, 3, 16\]"
    ):
        model(IDS, cache=longer)
    with pytest.raises(ValueError, match=r"attention_mask has the shape \[2, 5\]; expected \[2, 8\]"):
        model(IDS, cache=cache_of(), attention_mask=torch.ones(2, 5))


def test_without_attention_a_mask_may_be_any_length_that_covers_the_tokens() -> None:
    _, model = models("lfm2-no_attention_layer")
    cache = cache_of("lfm2-no_attention_layer")
    for width in (5, 8):
        assert torch.equal(
            model(IDS, cache=cache, attention_mask=torch.ones(2, width)).logits, model(IDS, cache=cache).logits
        )
    with pytest.raises(ValueError, match=r"attention_mask has the shape \[2, 4\]; expected \[2, 5\]"):
        model(IDS, cache=cache, attention_mask=torch.ones(2, 4))


def test_a_call_leaves_its_cache_as_it_was() -> None:
    _, model = models("lfm2_moe-plain")
    cache = cache_of("lfm2_moe-plain")
    before = {name: tensor.clone() for name, tensor in cache.items()}
    first = model(IDS, cache=cache)
    second = model(IDS, cache=cache)
    assert cache.keys() == before.keys()
    assert all(torch.equal(cache[name], before[name]) for name in before)
    assert torch.equal(first.logits, second.logits)


def test_the_config_decides_what_the_caller_leaves_open() -> None:
    asked = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    model = our_model(tiny_config("lfm2_moe", use_cache=False, **asked))
    out = model(IDS)
    assert out.cache is None
    assert (len(out.hidden_states), len(out.attentions), len(out.router_logits)) == (6, 2, 4)
    explicit = model(IDS, use_cache=True, **dict.fromkeys(asked, False))
    assert explicit.cache is not None
    assert (explicit.hidden_states, explicit.attentions, explicit.router_logits) == (None, None, None)
    # Who passes a cache wants the next one.
    assert model(IDS, cache=explicit.cache).cache is not None
    assert model(IDS, cache=explicit.cache, use_cache=False).cache is None
