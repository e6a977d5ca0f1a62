"""What LFM3 has beyond LFM2: the half rotation and how transformers misreads it, windows, its config's faults."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import transformers

from lfm2_export.errors import ConfigError
from lfm2_export.families import get_family
from lfm2_export.models.layers import rope_tables
from tests.checkpoints import tiny_config
from tests.models.reference import TOLERANCE, largest, models, our_model, their_config, their_model, token_ids
from tests.models.test_against_transformers import in_chunks, report

HALF = {"partial_rotary_factor": 0.5, "rope_theta": 1e6, "rope_type": "default"}
SLIDING = {"rope_theta": 1e4, "rope_type": "default"}
PUBLISHED = {"full_attention": HALF, "sliding_attention": SLIDING}


def parse(**changes: Any) -> Any:
    raw = tiny_config("lfm3")
    return get_family("lfm3").parse_config({**raw, **changes})


def test_half_of_each_head_turns_whatever_the_label_and_transformers_default_is_another_model() -> None:
    raw = tiny_config("lfm3")
    ours = our_model(raw, theirs := their_model(raw))
    as_published = transformers.Lfm3ForCausalLM._from_config(their_config(raw)).eval()
    as_published.load_state_dict(theirs.state_dict())
    ids = token_ids(2, 17)
    found = ours(ids).logits
    errors = [largest(found, one(ids, use_cache=False).logits) for one in (theirs, as_published)]
    print(f"to transformers as relabelled {errors[0]:.1e}, as the published label is read there {errors[1]:.1e}")
    assert errors[0] <= TOLERANCE
    assert errors[1] > 100 * TOLERANCE


def test_what_is_relabelled_and_what_is_left() -> None:
    raw = tiny_config("lfm3")
    before = copy.deepcopy(raw)
    family = get_family("lfm3")
    reference = family.reference_config(raw)
    assert reference is not None
    print(reference.note)
    assert raw == before
    relabelled = {**PUBLISHED, "full_attention": {**HALF, "rope_type": "proportional"}}
    assert reference.raw == {**raw, "rope_parameters": relabelled}
    assert 'rope_type "proportional" for full_attention' in reference.note
    for whole in (None, relabelled, dict.fromkeys(PUBLISHED, SLIDING)):
        assert family.reference_config({**raw, "rope_parameters": whole}) is None


def test_pairs_beyond_the_share_stay_as_they_are() -> None:
    config = parse()
    cos, sin = rope_tables(config, "full_attention")
    assert cos.shape == (512, 16)
    assert bool((cos[:, 8:] == 1).all() and (sin[:, 8:] == 0).all())
    assert bool((sin[1, :8] > 0).all())
    wide = 1e6 ** -(torch.arange(8) / 16)  # as if all pairs turned
    assert largest(sin[1, :8], wide.sin()) < 1e-7
    assert bool((rope_tables(config, "sliding_attention")[1][1] > 0).all())


@pytest.mark.parametrize("window", [2, 5, 64])
def test_chunks_that_end_before_at_and_behind_the_windows_edge(window: int) -> None:
    raw = tiny_config("lfm3", sliding_window=window)
    theirs = their_model(raw)
    ours = our_model(raw, theirs)
    ids = token_ids(2, 3 * window + 3)
    expected = theirs(ids, use_cache=False).logits
    tokens = ids.shape[1]
    errors = {"prefill": largest(ours(ids).logits, expected)}
    for first in {window - 1, window, window + 1, 2 * window}:
        chunks = (first, 1, tokens - first - 1)
        errors[f"chunks {chunks}"] = largest(in_chunks(ours, ids, chunks), expected)
    errors["one by one"] = largest(in_chunks(ours, ids, (1,) * tokens), expected)
    report(f"window {window}: logits to {expected.abs().max():.1f}:", errors)


def test_a_token_behind_the_window_changes_nothing_and_one_inside_does() -> None:
    _, model = models("lfm3-only_sliding_layers")
    one_layer = our_model(tiny_config("lfm3", num_hidden_layers=1, layer_types=["sliding_attention"]))
    ids = token_ids(1, 12)
    changed = [ids.clone(), ids.clone()]
    changed[0][0, 5], changed[1][0, 6] = 1, 1  # the last of 12 sees the window of 6: 6 to 11
    expected = one_layer(ids).logits[:, -1]
    behind, inside = (largest(one_layer(other).logits[:, -1], expected) for other in changed)
    print(f"behind the window {behind:.1e}, inside {inside:.1e}")
    assert behind == 0.0
    assert inside > 1e-3
    assert model.config.window("sliding_attention") == 6


BAD = {
    "window_missing": ({"sliding_window": None}, "sliding_window is missing, but layer_types has sliding_attention"),
    "window_0": ({"sliding_window": 0}, "sliding_window=0 is not supported; expected an integer from 1"),
    "window_text": ({"sliding_window": "wide"}, "sliding_window='wide' is not supported"),
    "kind": (
        {"layer_types": ["conv", "chunked_attention", "conv", "conv", "conv"]},
        'layer_types[1]=\'chunked_attention\' is not supported; expected "conv", "full_attention" or "sliding',
    ),
    "kinds": ({"layer_types": "conv"}, "expected a list of"),
    "full_attn_idxs": ({"layer_types": None, "full_attn_idxs": [1]}, "full_attn_idxs does not say which layers are"),
    "flat": ({"rope_parameters": SLIDING}, "expected an object with full_attention and sliding_attention alone"),
    "rope_kind": ({"rope_parameters": {**PUBLISHED, "conv": SLIDING}}, "expected an object with full_attention and"),
    "rope_missing": ({"rope_parameters": {"full_attention": HALF}}, "rope_parameters[sliding_attention]=None is not"),
    "rope_list": ({"rope_parameters": [1]}, "rope_parameters=[1] is not supported"),
    "yarn": (
        {"rope_parameters": {**PUBLISHED, "full_attention": {"rope_type": "yarn"}}},
        'rope_parameters: full_attention: rope_type=\'yarn\' is not supported; expected "default" or "proportional"',
    ),
    "share": (
        {"rope_parameters": {**PUBLISHED, "full_attention": {**HALF, "partial_rotary_factor": 1.5}}},
        "partial_rotary_factor=1.5 is not supported; expected a number up to 1",
    ),
    "share_0": (
        {"rope_parameters": {**PUBLISHED, "full_attention": {**HALF, "partial_rotary_factor": 0}}},
        "partial_rotary_factor=0 is not supported; expected a number above 0",
    ),
    "factor": (
        {"rope_parameters": {**PUBLISHED, "full_attention": {**HALF, "factor": 4}}},
        "factor=4 is not supported; expected 1.0",
    ),
    "theta_outside": ({"rope_theta": 5e3}, "rope_theta=5000.0 is not supported; expected no such key beside"),
    "share_outside": ({"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25 is not supported; expected no such"),
    "scaling": ({"rope_scaling": {"type": "linear"}}, "rope_scaling={'type': 'linear'} is not supported"),
    "gate": ({"use_attention_gate": "yes"}, "use_attention_gate='yes' is not supported; expected true or false"),
    "norms": ({"use_sandwich_norm": 1}, "use_sandwich_norm=1 is not supported; expected true or false"),
    "width": ({"block_ff_dim": 7}, "block_ff_dim=7 is not supported; expected 96"),
    "tied": ({"tie_embedding": False}, "tie_embedding=False is not supported"),
    "eps": ({"rms_norm_eps": 0.5}, "rms_norm_eps=0.5 is not supported; expected what norm_eps says"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_refused_in_one_readable_line(case: str) -> None:
    changes, text = BAD[case]
    with pytest.raises(ConfigError) as caught:
        parse(**changes)
    found = str(caught.value)
    print(found)
    assert found.startswith("config.json: ")
    assert text in found
    assert "\n" not in found
    assert len(found) < 300


def test_what_has_no_effect_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        changed = parse(block_auto_adjust_ff_dim=True, sliding_window=6)
    assert changed == parse()
    assert "block_auto_adjust_ff_dim has no effect in lfm3 and is left out" in caplog.text


def test_the_published_config() -> None:
    kinds = ["conv", "conv", "full_attention"] + ["conv", "sliding_attention", "conv", "full_attention"] * 5 + ["conv"]
    raw = {
        **{"architectures": ["Lfm3ForCausalLM"], "model_type": "lfm3", "conv_L_cache": 7, "conv_bias": False},
        **{"head_dim": 128, "hidden_size": 2048, "intermediate_size": 7680, "num_hidden_layers": 24},
        **{"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 262144, "norm_eps": 1e-5},
        **{"bos_token_id": 124894, "eos_token_id": 124900, "pad_token_id": 124893, "vocab_size": 128000},
        **{"sliding_window": 256, "layer_types": kinds, "rope_parameters": PUBLISHED},
    }
    config = get_family("lfm3").parse_config(raw)
    assert (len(config.conv_layers), len(config.attention_layers)) == (13, 11)
    assert [config.layer_types.count(kind) for kind in ("full_attention", "sliding_attention")] == [6, 5]
    assert (config.rope_share, config.ropes["sliding_attention"].theta, config.window("full_attention")) == (
        0.5,
        1e4,
        None,
    )
    count = sum(torch.Size(tensor.shape).numel() for tensor in get_family("lfm3").tensors(config).values())
    print(f"{count:,} parameters")
    assert 1.6e9 < count < 1.8e9
    del raw["layer_types"], raw["rope_parameters"]
    assert get_family("lfm3").parse_config(raw) == config
