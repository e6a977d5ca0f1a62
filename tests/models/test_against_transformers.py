"""Our eager models against transformers' own classes with the same random weights: every output, over many configs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lfm2_export.models.decoder import Cache, DecoderForCausalLM
from tests.checkpoints import tiny_config
from tests.models.reference import (
    ATTENTION,
    CASES,
    CONV,
    TOLERANCE,
    largest,
    models,
    our_model,
    perturbed,
    published,
    their_model,
    token_ids,
)

CHUNKS = (5, 1, 7, 1, 1, 2)
BOTH = ["lfm2-plain", "lfm2_moe-plain", "lfm3-plain"]
CONTROL = "model.layers.1.self_attn.k_proj.weight"


def report(what: str, errors: dict[str, float], limit: float = TOLERANCE) -> None:
    """Prints every figure and fails on the first that is above the limit."""
    print(what, ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    assert {name: error for name, error in errors.items() if not error <= limit} == {}


def in_chunks(model: DecoderForCausalLM, ids: Tensor, chunks: tuple[int, ...] = CHUNKS) -> Tensor:
    """Logits of all positions, computed chunk by chunk over the cache."""
    assert sum(chunks) == ids.shape[1]
    cache: Cache | None = None
    logits = []
    for part in ids.split(list(chunks), dim=1):
        out = model(part, cache=cache)
        logits.append(out.logits)
        cache = out.cache
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("case", CASES)
def test_logits_of_prefill_chunks_and_decode(case: str) -> None:
    theirs, ours = models(case)
    ids = token_ids(3, 17)
    expected = theirs(ids, use_cache=False).logits
    assert 1 < expected.abs().max() < 12, "the weights' scale makes the tolerance meaningless"
    errors = {
        "prefill": largest(ours(ids).logits, expected),
        "cacheless": largest(ours(ids, use_cache=False).logits, expected),
        "chunks": largest(in_chunks(ours, ids), expected),
        "one by one": largest(in_chunks(ours, ids, (1,) * 17), expected),
        "batch of one": largest(in_chunks(ours, ids[1:2]), expected[1:2]),
    }
    report(f"{case}: logits to {expected.abs().max():.1f}:", errors)


def test_logits_equal_those_of_their_default_experts() -> None:
    raw = tiny_config("lfm2_moe")
    theirs = their_model(raw, experts="grouped_mm")
    ids = token_ids(3, 17)
    errors = {"prefill": largest(our_model(raw, theirs)(ids).logits, theirs(ids, use_cache=False).logits)}
    report("grouped_mm:", errors)


@pytest.mark.parametrize("case", BOTH)
def test_each_of_these_comparisons_can_fail(case: str) -> None:
    theirs, ours = models(case)
    ids = token_ids(3, 17)
    expected = theirs(ids, use_cache=False).logits
    wrong = perturbed(ours, CONTROL)
    errors = [largest(wrong(ids).logits, expected), largest(in_chunks(wrong, ids), expected)]
    print("control:", errors)
    assert min(errors) > 100 * TOLERANCE


@pytest.mark.parametrize("case", ["lfm2-conv_bias", "lfm2-untied", "lfm2_moe-all_experts_per_token"])
def test_every_weight_takes_part(case: str) -> None:
    _, ours = models(case)
    ids = token_ids(2, 9)
    ids[0, 0] = 0  # the embedding's first value belongs to token 0
    expected = ours(ids).logits
    effects = {}
    for name, _ in [*ours.named_parameters(), *ours.named_buffers()]:
        if not name.endswith("expert_bias"):  # nothing to choose where all experts are taken
            effects[name] = largest(perturbed(ours, name)(ids).logits, expected)
    print(f"{case}: smallest effect of one value {min(effects.values()):.1e}")
    assert {name: effect for name, effect in effects.items() if not effect > TOLERANCE} == {}


def test_the_expert_bias_selects_and_nothing_else() -> None:
    _, ours = models("lfm2_moe-plain")
    ids = token_ids(1, 9)
    bias = "model.layers.2.feed_forward.expert_bias"
    expected = ours(ids).logits
    assert largest(perturbed(ours, bias, 10.0)(ids).logits, expected) > TOLERANCE
    _, no_choice = models("lfm2_moe-all_experts_per_token")
    assert largest(perturbed(no_choice, bias, 10.0)(ids).logits, no_choice(ids).logits) < TOLERANCE


@pytest.mark.parametrize("case", [name for name in CASES if "no_attention" not in name])
def test_decode_equals_their_decode(case: str) -> None:
    theirs, ours = models(case)
    ids = token_ids(2, 12, seed=1)
    their_out = theirs(ids[:, :7], use_cache=True)
    out = ours(ids[:, :7])
    errors = {"prefill": largest(out.logits, their_out.logits)}
    for step in range(7, 12):
        token = ids[:, step : step + 1]
        their_out = theirs(token, past_key_values=their_out.past_key_values, use_cache=True)
        out = ours(token, cache=out.cache)
        errors[f"step {step}"] = largest(out.logits, their_out.logits)
    report(f"{case}:", errors)


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_attentions_router_logits_and_loss(case: str) -> None:
    theirs, ours = models(case, attention="eager")
    ids = token_ids(2, 11, seed=2)
    labels = ids.clone()
    labels[0, :4] = labels[1, -1] = -100
    asked = {"output_hidden_states": True, "output_attentions": True}
    if case.startswith("lfm2_moe"):
        asked["output_router_logits"] = True
    expected = theirs(ids, labels=labels, use_cache=False, **asked)
    out = ours(ids, labels=labels, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert out.loss is not None
    errors = {"logits": largest(out.logits, expected.logits), "loss": largest(out.loss, expected.loss)}
    for kind in ("hidden_states", "attentions", "router_logits"):
        found, wanted = getattr(out, kind), getattr(expected, kind, None) or ()
        assert len(found) == len(wanted)
        errors |= {f"{kind}.{i}": largest(a, b) for i, (a, b) in enumerate(zip(found, wanted, strict=True))}
    assert len(out.hidden_states or ()) == ours.config.num_hidden_layers + 1
    assert len(out.attentions or ()) == len(ours.config.attention_layers)
    assert len(out.router_logits or ()) == len(ours.config.moe_layers)
    report(f"{case}: loss {expected.loss:.3f}:", {kind: _worst(errors, kind) for kind in _kinds(errors)})


def _kinds(errors: dict[str, float]) -> list[str]:
    return list(dict.fromkeys(name.split(".")[0] for name in errors))


def _worst(errors: dict[str, float], kind: str) -> float:
    return max(error for name, error in errors.items() if name.split(".")[0] == kind)


def test_attentions_of_a_chunk_with_a_past() -> None:
    theirs, ours = models("lfm2-plain", attention="eager")
    ids = token_ids(2, 11)
    expected = theirs(ids, use_cache=False, output_attentions=True).attentions
    cache = ours(ids[:, :6]).cache
    found = ours(ids[:, 6:], cache=cache, output_attentions=True).attentions
    report(
        "attentions:", {str(i): largest(a, b[:, :, 6:]) for i, (a, b) in enumerate(zip(found, expected, strict=True))}
    )


def test_what_was_not_asked_for_is_not_there() -> None:
    _, ours = models("lfm2_moe-plain")
    out = ours(token_ids(1, 3), use_cache=False)
    assert (out.cache, out.loss, out.hidden_states, out.attentions, out.router_logits) == (None,) * 5


@pytest.mark.parametrize("case", BOTH)
@pytest.mark.parametrize("keep", [0, 1, 4, 50, torch.tensor([0, 3, 3, 8]), torch.tensor([-1])], ids=str)
def test_logits_to_keep(case: str, keep: int | Tensor) -> None:
    theirs, ours = models(case)
    ids = token_ids(2, 9)
    expected = theirs(ids, logits_to_keep=keep, use_cache=False).logits
    report(f"{list(expected.shape)}", {case: largest(ours(ids, logits_to_keep=keep).logits, expected)})


@pytest.mark.parametrize("case", BOTH)
def test_inputs_embeds_and_the_model_without_head(case: str) -> None:
    theirs, ours = models(case)
    embeds = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    expected = theirs(inputs_embeds=embeds, use_cache=False, output_hidden_states=True)
    out = ours.model(inputs_embeds=embeds)
    errors = {
        "embeds": largest(ours(inputs_embeds=embeds).logits, expected.logits),
        "last_hidden_state": largest(out.last_hidden_state, expected.hidden_states[-1]),
        "backbone": largest(out.last_hidden_state, theirs.model(inputs_embeds=embeds).last_hidden_state),
    }
    ids = token_ids(2, 9)
    errors["of ids"] = largest(ours(inputs_embeds=ours.model.embed_tokens(ids)).logits, ours(ids).logits)
    report(case, errors)


@pytest.mark.parametrize("case", BOTH)
def test_position_ids(case: str) -> None:
    theirs, ours = models(case)
    ids = token_ids(2, 9)
    shifted = torch.arange(9)[None] + torch.tensor([[3], [40]])
    spread = torch.arange(0, 27, 3)[None]
    errors = {}
    for name, positions in {"shifted": shifted, "spread": spread, "far": spread + 400}.items():
        # With a cache they take these for positions; without one, jumps would mean packed sequences.
        expected = theirs(ids, position_ids=positions, use_cache=True).logits
        errors[name] = largest(ours(ids, position_ids=positions).logits, expected)
        assert largest(ours(ids).logits, expected) > TOLERANCE or name == "shifted"
    cache = ours(ids[:, :5], position_ids=spread[:, :5]).cache
    expected = theirs(ids, position_ids=spread, use_cache=True).logits[:, 5:]
    errors["chunk"] = largest(ours(ids[:, 5:], position_ids=spread[:, 5:], cache=cache).logits, expected)
    report(case, errors)


def test_labels_that_are_all_ignored_give_no_number_in_both() -> None:
    theirs, ours = models("lfm2-plain")
    ids = token_ids(1, 4)
    none = torch.full_like(ids, -100)
    assert torch.isnan(theirs(ids, labels=none, use_cache=False).loss)
    assert torch.isnan(ours(ids, labels=none).loss)


@pytest.mark.parametrize("case", BOTH)
def test_gradients_of_the_loss(case: str) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        theirs = their_model(tiny_config(*case.split("-")[:1]))
        ours = our_model(tiny_config(*case.split("-")[:1]), theirs)
        ids = token_ids(2, 9).clone()
        theirs(ids, labels=ids, use_cache=False).loss.backward()
        loss = ours(ids, labels=ids).loss
        assert loss is not None
        loss.backward()
        wanted = {published(name): parameter.grad for name, parameter in theirs.named_parameters()}
        found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert found.keys() == wanted.keys()
    print(f"{case}: gradients up to {max(g.abs().max().item() for g in wanted.values()):.2f}")
    report(case, {"worst": max(largest(found[name], wanted[name]) for name in wanted)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", BOTH)
def test_half_precision_is_as_close_as_that_precision_allows(case: str, dtype: torch.dtype) -> None:
    theirs, ours = (copy.deepcopy(model) for model in models(case))
    ids = token_ids(2, 17)
    exact = ours(ids).logits
    for model in (theirs, ours):
        for parameter in model.parameters():  # as from_pretrained does: buffers stay fp32
            parameter.data = parameter.data.to(dtype)
    expected, found = theirs(ids, use_cache=False).logits, ours(ids).logits
    assert found.dtype == dtype

    def noise(logits: Tensor) -> float:
        return (logits.float() - exact).abs().mean().item()

    errors = {"theirs": noise(expected), "ours": noise(found), "ours in chunks": noise(in_chunks(ours, ids))}
    print(f"{case} {dtype}: mean error to fp32 {errors}; to theirs at most {largest(found, expected):.1e}")
    assert largest(found, expected) < (0.1 if case.startswith("lfm3") else 0.05)  # 0.051 in bfloat16
    assert max(errors.values()) < 2 * errors["theirs"]


def test_moving_a_model_to_half_precision_keeps_the_positions_exact() -> None:
    _, ours = models("lfm2-no_conv_layer")
    ids = token_ids(1, 3)
    far = torch.tensor([[2000, 2001, 2002]])
    half = copy.deepcopy(ours).to(torch.bfloat16)
    error = largest(half(ids, position_ids=far).logits, half(ids).logits)
    scale = largest(half(ids).logits, ours(ids).logits)
    print(f"positions 2000 further on change bf16 logits by {error:.1e}; bf16 itself by {scale:.1e}")
    assert error < 2 * scale


@st.composite
def raw_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Any combination of what the families can express, at tiny widths."""
    model_type = draw(st.sampled_from(["lfm2", "lfm2_moe"]))
    layers = draw(st.integers(1, 4))
    kv_heads = draw(st.integers(1, 3))
    raw = {
        "num_hidden_layers": layers,
        "layer_types": draw(st.lists(st.sampled_from([CONV, ATTENTION]), min_size=layers, max_size=layers)),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "head_dim": 2 * draw(st.integers(1, 12)),
        "hidden_size": draw(st.integers(1, 40)),
        "intermediate_size": draw(st.integers(3, 60)),
        "vocab_size": draw(st.integers(3, 140)),
        "conv_L_cache": draw(st.integers(2, 7)),
        "conv_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "rope_theta": draw(st.sampled_from([100.0, 1e4, 1e6])),
    }
    if model_type == "lfm2_moe":
        experts = draw(st.integers(1, 6))
        raw |= {
            "num_experts": experts,
            "num_experts_per_tok": draw(st.integers(1, experts)),
            "num_dense_layers": draw(st.integers(0, layers + 1)),
            "moe_intermediate_size": draw(st.integers(1, 30)),
            "use_expert_bias": draw(st.booleans()),
            "norm_topk_prob": draw(st.booleans()),
            "routed_scaling_factor": draw(st.sampled_from([0.5, 1.0, 2.5])),
        }
    return tiny_config(model_type, **raw)


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(raw=raw_configs(), tokens=st.integers(1, 14), batch=st.integers(1, 3), data=st.data())
def test_random_configs(raw: dict[str, Any], tokens: int, batch: int, data: st.DataObject) -> None:
    theirs = their_model(raw)
    ours = our_model(raw, theirs)
    ids = token_ids(batch, tokens, vocab_size=raw["vocab_size"])
    cut = data.draw(st.integers(1, tokens))
    chunks = (cut, tokens - cut) if cut < tokens else (cut,)
    expected = theirs(ids, use_cache=False).logits
    limit = TOLERANCE * max(1.0, expected.abs().max().item() / 5)
    errors = {"prefill": largest(ours(ids).logits, expected), "chunks": largest(in_chunks(ours, ids, chunks), expected)}
    report(f"{raw['model_type']} {batch}x{tokens}:", errors, limit)
