"""What proposes tokens: out of the text, and by a smaller model."""

from __future__ import annotations

import numpy as np

from lfm2_export.speculation import ModelDrafter, PromptLookup
from tests.hash_runner import HashRunner


def test_lookup_proposes_what_stood_behind_the_longest_run():
    lookup = PromptLookup()
    assert lookup.propose([1, 2, 3], 4).tokens == ()
    text = [1, 2, 3, 4, 5, 9, 3, 4, 7, 8, 2, 3, 4]
    draft = lookup.propose(text, 3)  # 2 3 4 stood before 5, 3 4 last before 7
    assert (draft.tokens, draft.kind) == ((5, 9, 3), "3 tokens again")
    assert lookup.propose(text, 1).tokens == (5,)
    assert lookup.propose([*text, 5, 9], 2).tokens == (3, 4)


def test_lookup_goes_on_into_its_own_proposal():
    assert PromptLookup().propose([7, 1, 2, 1, 2], 5).tokens == (1, 2, 1, 2, 1)


def test_lookup_follows_another_text():
    lookup = PromptLookup()
    lookup.propose([1, 2, 3, 1, 2], 2)
    assert lookup.propose([4, 5, 6, 4, 5], 2).tokens == (6, 4)
    assert lookup.propose([4, 5, 1, 2], 2).tokens == ()


class Sharp(HashRunner):
    """A runner that is sure of its tokens."""

    def logits_of(self, row):
        return super().logits_of(row) * 50


def likeliest(history: list[int], count: int) -> tuple[int, ...]:
    runner, found = Sharp(), list(history)
    for _ in range(count):
        found.append(int(np.argmax(runner.logits_of(found))))
    return tuple(found[len(history) :])


def test_a_model_proposes_its_likeliest_tokens_whatever_became_of_the_last_ones():
    runner = Sharp()
    drafter, text = ModelDrafter(runner), [1, 2, 3]
    rng = np.random.default_rng(0)
    for _ in range(20):
        draft = drafter.propose(text, 5)
        assert draft.tokens == likeliest(text, 5)
        kept = int(rng.integers(0, 6))
        text = [*text, *draft.tokens[:kept], int(rng.integers(40))]
    assert drafter.propose([9, 9], 3).tokens == likeliest([9, 9], 3)
    assert sum(sum(lengths) for lengths in runner.prefilled) < 3 * len(text)  # it did not begin anew each time


def test_a_model_proposes_nothing_it_is_not_sure_of_or_has_no_room_for():
    assert ModelDrafter(HashRunner(vocab_size=4000)).propose([1, 2, 3], 5).tokens == ()
    full = Sharp(context_length=6)
    assert len(ModelDrafter(full).propose([1, 2, 3, 4], 5).tokens) == 2
    assert ModelDrafter(full).propose([1, 2, 3, 4, 5, 6], 5).tokens == ()
