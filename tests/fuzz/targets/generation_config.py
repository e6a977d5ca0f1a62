"""generation_config.json, and what it does to the choice of a token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lfm2_export.generation_config import GenerationConfig
from lfm2_export.sampling import Sampler
from tests.fuzz.findings import attempt
from tests.fuzz.guard import Finding
from tests.fuzz.mutation import json_mutator
from tests.fuzz.workspace import workspace

_V = 48
# As different as programs give them: spread, equal, far apart, with ruled-out tokens.
_LOGITS = (
    np.linspace(-8, 8, _V, dtype=np.float32),
    np.zeros(_V, np.float32),
    np.where(np.arange(_V) == 5, 3e4, -3e4).astype(np.float32),
    np.where(np.arange(_V) % 2 == 0, 1.0, -np.inf).astype(np.float32),
)

mutate = json_mutator(
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "eos_token_id"),
    *("bos_token_id", "pad_token_id", "seed", "stop_token_ids", "min_new_tokens", "suppress_tokens", "bad_words_ids"),
    *("begin_suppress_tokens", "forced_eos_token_id", "no_repeat_ngram_size", "typical_p", "num_beams", "max_length"),
)


def fuzz_one(data: bytes) -> None:
    workspace().empty()
    path = workspace().put("generation_config.json", data)
    config = attempt(GenerationConfig.from_file, path)
    if config is None:
        return
    for logits_V in _LOGITS:
        for sampled in (config, replace(config, do_sample=True, seed=0)):
            _choose(sampled, logits_V)


def _choose(config: GenerationConfig, logits_V: np.ndarray) -> None:
    """A few tokens; each must be one of those that were not ruled out."""
    sampler = Sampler(config, _V, history=(1, 5))
    for _ in range(3):
        token = attempt(sampler.choose, logits_V)
        if token is not None and not (0 <= token < _V and logits_V[token] > -np.inf):
            raise Finding(f"the token {token} was chosen, which was ruled out")
