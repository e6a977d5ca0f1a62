"""Settings that keep tokens from being chosen: the same choices as transformers' processors make, step by step."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from lfm2_export.errors import GenerationError
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.sampling import Sampler

VOCAB, STOPS = 12, (2, 7)


def their_choices(logits_TV: np.ndarray, prompt: list[int], options: dict) -> list[int]:
    """What transformers' generate would choose from these logits: its own factory chooses the processors."""
    torch = pytest.importorskip("torch")
    from transformers import GenerationConfig as TheirConfig
    from transformers import GenerationMixin, PreTrainedConfig

    class Model(GenerationMixin):
        config = PreTrainedConfig()

    config = TheirConfig(do_sample=False, num_beams=1, **options)
    config._eos_token_tensor = torch.tensor(STOPS)
    processors = Model()._get_logits_processor(config, input_ids_seq_length=len(prompt), device="cpu")
    tokens = list(prompt)
    for logits_V in logits_TV:
        scores_V = processors(torch.tensor([tokens]), torch.from_numpy(logits_V)[None])[0]
        tokens.append(int(scores_V.argmax()))
    return tokens[len(prompt) :]


def our_choices(logits_TV: np.ndarray, prompt: list[int], options: dict) -> list[int]:
    sampler = Sampler(GenerationConfig(stop_token_ids=STOPS, **options), VOCAB, prompt)
    return [sampler.choose(logits_V) for logits_V in logits_TV]


def logits(seed: int, steps: int = 30) -> np.ndarray:
    """Few of them stand out, so that what repeats does so soon."""
    rng = np.random.default_rng(seed)
    return (rng.normal(0, 1, (steps, VOCAB)) + 2 * (np.arange(VOCAB) < 4)).astype(np.float32)


OPTIONS = [
    {"min_new_tokens": 9},
    {"min_length": 12},
    {"min_length": 3},
    {"suppress_tokens": [0, 1, 3, 900, -1]},
    {"begin_suppress_tokens": [0, 1, 2, 3]},
    {"bad_words_ids": [[0], [1, 2], [3, 3, 1], [2]]},
    {"bad_words_ids": [[2, 1], [7], [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]]},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"no_repeat_ngram_size": 40},
    {
        "no_repeat_ngram_size": 4,
        "repetition_penalty": 1.4,
        "bad_words_ids": [[1, 1]],
        "suppress_tokens": [3],
        "begin_suppress_tokens": [0],
        "min_new_tokens": 4,
        "min_length": 6,
    },
]


# On prompts and texts as long as these.
WITHOUT_EFFECT = ({"min_length": 3}, {"no_repeat_ngram_size": 40})


@pytest.mark.parametrize("prompt", [[5], [0, 1, 2, 3, 0, 1, 2]], ids=["one", "seven"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_choices_equal_transformers(options, prompt):
    changed = 0
    for seed in range(10):
        rows = logits(seed)
        found = our_choices(rows, prompt, options)
        assert found == their_choices(rows, prompt, options)
        changed += found != our_choices(rows, prompt, {})
    print(f"{changed} of 10 texts are others than without the settings")
    assert changed or options in WITHOUT_EFFECT


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8),
    words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=6),
    size=st.integers(0, 4).filter(lambda size: size != 1),  # 1 leaves no token after a while
    lengths=st.tuples(st.integers(0, 20), st.integers(0, 12)),
    suppressed=st.lists(st.integers(0, 14), min_size=1, max_size=4),
)
def test_any_settings_choose_as_transformers(seed, prompt, words, size, lengths, suppressed):
    options = {
        "bad_words_ids": words,
        "no_repeat_ngram_size": size,
        "min_length": lengths[0],
        "min_new_tokens": lengths[1],
        "suppress_tokens": suppressed,
        "begin_suppress_tokens": suppressed[:1],
    }
    rows = logits(seed, 15)
    try:
        found = our_choices(rows, prompt, options)
    except GenerationError:  # nothing is left, which transformers does not look for
        reject()
    assert found == their_choices(rows, prompt, options)


@pytest.mark.parametrize("do_sample", [False, True])
def test_settings_that_leave_no_token_are_refused(do_sample):
    config = GenerationConfig(do_sample=do_sample, suppress_tokens=tuple(range(VOCAB)))
    with pytest.raises(GenerationError, match=r"the settings exclude every token \(suppress_tokens, .*; relax one"):
        Sampler(config, VOCAB).choose(np.zeros(VOCAB, dtype=np.float32))


def test_a_sampled_token_is_none_that_is_excluded():
    config = GenerationConfig(do_sample=True, seed=3, top_k=0, suppress_tokens=(0, 1, 2), no_repeat_ngram_size=2)
    sampler = Sampler(config, VOCAB)
    tokens = [sampler.choose(np.zeros(VOCAB, dtype=np.float32)) for _ in range(60)]
    assert min(tokens) == 3
    pairs = list(pairwise(tokens))
    assert len(set(pairs)) == len(pairs)
