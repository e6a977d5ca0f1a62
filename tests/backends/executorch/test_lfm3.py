"""LFM3 as a .pte: sliding layers keep no more than their window, whatever the context, the chunks and the way back."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("executorch")

from lfm2_export.backends.eager import EagerRunner
from lfm2_export.backends.executorch.lower import LONGEST_CALL
from lfm2_export.cache import CacheSpec
from lfm2_export.models.loading import load_model
from tests.backends.executorch.programs import Made, checkpoint_of, divergence, make, max_error, prompt
from tests.backends.executorch.test_parity import FP32_TOLERANCE, KL_TOLERANCE, greedy
from tests.shows import shows

WINDOW, CONTEXT = 256, 900
LAYERS = ("conv", "sliding_attention", "full_attention", "sliding_attention")


def made_of(scheme: str, window: int = WINDOW, context: int = CONTEXT) -> Made:
    layers = checkpoint_of("lfm3", layer_types=LAYERS, sliding_window=window, max_position_embeddings=1024)
    return make(layers, scheme, max_context=context)


@pytest.fixture(scope="module")
def fp32() -> Made:
    return made_of("fp32")


@shows("pte", "greedy", "logits", "chunks", "states", family="lfm3", scheme="fp32")
@pytest.mark.parametrize("context", [WINDOW - 1, WINDOW, WINDOW + 1, 700])
def test_64_greedy_tokens_in_chunks_of_any_size_after_a_reset_and_from_a_snapshot(fp32: Made, context: int) -> None:
    runner, eager, tokens = fp32.runner(context=CONTEXT), fp32.eager(context=CONTEXT), prompt(fp32, context)
    eager.reset()
    expected, worst = eager.prefill([tokens]), 0.0
    for chunk_size in (None, 300, 100, 37):
        runner.reset()
        worst = max(worst, max_error(expected, runner.prefill([tokens], chunk_size=chunk_size)))
    snapshot, mark, following = runner.snapshot(), runner.mark(), prompt(fp32, 60, seed=1)
    expected = eager.prefill([following])
    worst = max(worst, max_error(expected, runner.prefill([following], chunk_size=7)))
    runner.rewind(mark)
    worst = max(worst, max_error(expected, runner.prefill([following])))
    runner.reset()
    runner.prefill([following])
    runner.restore(snapshot)
    worst = max(worst, max_error(expected, runner.prefill([following])))
    print(f"context {context}: largest logit error {worst:.1e}")
    assert worst <= FP32_TOLERANCE
    assert greedy(runner, tokens, 64) == greedy(eager, tokens, 64)
    assert greedy(runner, tokens, 64) == greedy(eager, tokens, 64), "again after a reset"


@shows("pte", "window", family="lfm3", scheme="fp32")
def test_what_a_sliding_layer_keeps_does_not_grow(fp32: Made) -> None:
    cache, config = fp32.exported.cache, fp32.checkpoint.config
    kept = 2 * 2 * (WINDOW - 1) * config.num_key_value_heads * config.head_dim * 4
    conv = (config.conv_L_cache - 1) * config.hidden_size * 4
    print(f"{cache.bytes_per_token()} bytes a token, {cache.fixed_bytes()} more")
    assert cache.fixed_bytes() == kept + conv
    assert cache.bytes_per_token() == 2 * config.num_key_value_heads * config.head_dim * 4
    assert CacheSpec.from_json(cache.to_json()) == cache
    runner = fp32.runner(context=CONTEXT)
    runner.prefill([prompt(fp32, 700)])
    tensors = runner.snapshot().tensors
    assert {tensors[t.past_name].shape[2] for t in cache.bounded} == {WINDOW - 1}
    assert {tensors[t.past_name].shape[2] for t in cache.growing} == {700}
    assert runner._session.input_shapes("forward")[0] == (1, LONGEST_CALL)


def test_nothing_of_the_last_text_is_left_after_a_reset(fp32: Made) -> None:
    """Whatever the kept positions hold, a NaN included, which no weight of 0 would take away. XNNPACK's own sums differ
    from call to call by 2.1e-6 on a busy machine, a state left as it was by NaN."""
    runner, tokens = fp32.runner(context=CONTEXT), prompt(fp32, 9)
    clean = runner.prefill([tokens])
    state = runner._read()
    for buffer in state:
        buffer[:] = math.nan
    runner._session.call("write_state", state)
    runner.reset()
    error = max_error(runner.prefill([tokens]), clean)
    print(f"after a reset: {error:.1e}")
    assert error <= FP32_TOLERANCE  # of NaN nothing is


def test_a_window_that_is_wider_by_one_is_noticed(fp32: Made) -> None:
    """The control."""
    model = load_model(fp32.checkpoint)
    other = type(model)(replace(model.config, sliding_window=WINDOW + 1))
    other.load_state_dict(model.state_dict())
    wider = EagerRunner(other, context_length=CONTEXT)
    runner, tokens = fp32.runner(context=CONTEXT), prompt(fp32, WINDOW + 1)
    errors = []
    for part in (tokens[:WINDOW], tokens):
        wider.reset()
        runner.reset()
        errors.append(max_error(wider.prefill([part]), runner.prefill([part])))
    print(f"a window wider by one: {errors[0]:.1e} at {WINDOW} tokens, {errors[1]:.1e} at {WINDOW + 1}")
    assert errors[0] <= FP32_TOLERANCE < errors[1]


@shows("pte", "logits", "chunks", family="lfm3", scheme="8da4w")
def test_int4_weights_on_int8_activations() -> None:
    made = made_of("8da4w", window=16)
    runner, eager, tokens = made.runner(context=CONTEXT), made.eager(context=CONTEXT), prompt(made, 80)
    found = divergence(eager.score([tokens])[0], runner.score([tokens])[0])
    print(f"KL divergence, median {np.median(found):.1e}, mean {found.mean():.1e}")
    assert np.median(found) <= KL_TOLERANCE
    last = runner.prefill([tokens])
    runner.reset()
    assert divergence(last, runner.prefill([tokens], chunk_size=9)).max() <= 1e-3
