"""Which tokens may come next: a schema's, and only behind a marker where there is one."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lfm2_export.constraints import After, Constraint, Grammars
from lfm2_export.errors import GenerationError
from lfm2_export.generation import continue_from
from lfm2_export.generation_config import GenerationConfig
from tests.hash_runner import TOKENIZER, HashRunner

END = TOKENIZER.token_id("<|im_end|>")
SCHEMA = {"type": "array", "items": {"enum": ["yes", "no", 1]}, "minItems": 2, "maxItems": 3}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKENIZER, TOKENIZER.vocab_size, (END,))


def written(constraint: Constraint | None, seed: int, new: int = 60) -> str:
    """By a runner whose logits are noise."""
    runner = HashRunner(TOKENIZER.vocab_size)
    runner.reset()
    prompt = [[3, seed]]
    config = GenerationConfig(max_new_tokens=new, stop_token_ids=(END,), do_sample=seed % 2 == 1, seed=seed)
    events = continue_from(runner, runner.prefill(prompt), prompt, config, constraint=constraint)
    return TOKENIZER.decode([event.token for event in events], stop_tokens=(END,))


def test_noise_becomes_json_of_the_schema(grammars: Grammars) -> None:
    texts = {written(grammars.of_schema(SCHEMA), seed) for seed in range(8)}
    print(texts)
    assert len(texts) > 1
    for text in texts:
        assert 2 <= len(json.loads(text)) <= 3
        assert set(json.loads(text)) <= {"yes", "no", 1}
    with pytest.raises(json.JSONDecodeError):
        json.loads(written(None, 0))


def test_a_constraint_behind_a_marker_lets_all_tokens_come_before(grammars: Grammars) -> None:
    constraint = After("</think>", grammars.of_schema(SCHEMA), TOKENIZER)
    for token in TOKENIZER.encode("so {] </thi", add_special_tokens=False):
        assert constraint.allowed() is None
        constraint.accept(token)
    for token in TOKENIZER.encode("nk>", add_special_tokens=False):
        assert constraint.allowed() is None
        constraint.accept(token)
    allowed = constraint.allowed()
    assert allowed is not None
    assert "[" in (texts := [TOKENIZER.decode([token]) for token in np.flatnonzero(allowed)])
    assert all(text.startswith("[") for text in texts)


def test_without_a_stop_token_json_would_never_end() -> None:
    with pytest.raises(GenerationError, match="has no stop token"):
        Grammars(TOKENIZER, TOKENIZER.vocab_size, ()).of_schema(SCHEMA)
