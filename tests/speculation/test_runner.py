"""Speculative decoding gives the tokens of plain decoding: on a runner whose logits are a hash of the whole row, so
that any token too many or too few in its state changes everything that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from lfm2_export.backends.base import Runner
from lfm2_export.errors import ContextLimitError, RunnerError
from lfm2_export.generation import complete
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.speculation import Draft, Report, SpeculativeRunner
from lfm2_export.speculation.controller import Always
from lfm2_export.speculation.runner import _Block
from tests.hash_runner import HashRunner

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@dataclass
class Oracle:
    """Proposes what plain decoding chose, each token right with probability ``rate``."""

    answer: Sequence[int]
    rate: float = 0.7
    name: str = "oracle"
    costs: bool = False
    at_once: bool = False
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def propose(self, history: Sequence[int], most: int) -> Draft:
        after = self.answer[len(history) : len(history) + most]
        return Draft(tokens=tuple(t if self.random.random() < self.rate else (t + 1) % 40 for t in after), kind="any")


def hash_runner(**options: int) -> HashRunner:
    runner = HashRunner(**options)
    runner.can_score = True
    return runner


def speculative(runner: Runner, answer: Sequence[int], *, rate: float = 0.7, most: int = 4) -> SpeculativeRunner:
    drafter = Oracle(answer, rate)
    return SpeculativeRunner(runner, drafter, controller=Always(most=most, report=Report(drafter="oracle")))


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("most", [1, 3, 9])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 30, "stop_token_ids": (7, 8)},
        {"do_sample": True, "temperature": 1.5, "top_k": 0, "seed": 3, "bad_words_ids": ((5, 6), (9,))},
    ],
    ids=["greedy", "history", "sampled"],
)
def test_the_tokens_are_those_of_plain_decoding(rate: float, most: int, settings: dict[str, object]):
    config = GenerationConfig(max_new_tokens=120, **settings)
    (plain,) = complete(HashRunner(), [PROMPT], config)
    inner = hash_runner()
    runner = speculative(inner, [*PROMPT, *plain.tokens], rate=rate, most=most)
    (found,) = complete(runner, [PROMPT], config)
    assert found == plain
    assert inner.rows[0][: len(PROMPT)] == PROMPT
    report = runner.report
    print(f"{report.accepted} of {report.drafted}, {report.tokens_per_step:.2f} tokens a step")
    if rate == 1.0:
        assert report.verified_steps <= -(-len(plain.tokens) // (most + 1)) + 1
    if rate == 0.0:
        assert report.accepted == 0
    runner.mark()  # whatever was proposed and not chosen is gone
    assert inner.rows[0] == [*PROMPT, *plain.tokens[:-1]]


def test_a_stop_token_within_a_block_ends_there():
    config = GenerationConfig(max_new_tokens=50)
    (plain,) = complete(HashRunner(), [PROMPT], config)
    for place in (0, 1, 4, 5, 17):
        stop = plain.tokens[place]
        stopping = GenerationConfig(max_new_tokens=50, stop_token_ids=(stop,))
        (want,) = complete(HashRunner(), [PROMPT], stopping)
        (found,) = complete(speculative(hash_runner(), [*PROMPT, *plain.tokens], rate=1.0), [PROMPT], stopping)
        assert found == want
        assert found.finish_reason == "stop"


@pytest.mark.parametrize("context", range(len(PROMPT), len(PROMPT) + 12))
def test_the_context_ends_where_it_ends_for_plain_decoding(context: int):
    config = GenerationConfig(max_new_tokens=30)
    (plain,) = complete(HashRunner(context_length=context), [PROMPT], config)
    answer = [*PROMPT, *complete(HashRunner(), [PROMPT], config)[0].tokens]
    runner = speculative(hash_runner(context_length=context), answer, rate=1.0)
    assert complete(runner, [PROMPT], config) == [plain]
    assert plain.finish_reason == "context"
    with pytest.raises(ContextLimitError):
        runner.decode([1])


def served(make: Callable[[], Runner]) -> list[object]:
    """What each call of a runner returns, in the midst of blocks."""
    runner, found = make(), []
    runner.prefill([PROMPT])
    answer = plain_answer()
    for token in answer[len(PROMPT) : len(PROMPT) + 3]:
        found.append(runner.decode([token]))
    found.append(runner.lengths.tolist())
    mark = runner.mark()
    found.append(runner.decode([answer[len(PROMPT) + 3]]))
    snapshot = runner.snapshot()
    found.append(runner.decode([answer[len(PROMPT) + 4]]))
    runner.rewind(mark)
    found += [runner.lengths.tolist(), runner.decode([answer[len(PROMPT) + 3]]), runner.prefill([[2, 2, 2]])]
    runner.restore(snapshot)
    found.append(runner.decode([answer[len(PROMPT) + 4]]))
    runner.reorder([0, 0])
    found += [runner.decode([1, 2]), runner.decode([3, 4])]
    runner.reorder([1])
    found.append(runner.decode([5]))
    found.append(runner.verify([5, 6, 7]))
    runner.accept(1)
    found.append(runner.prefill([[8]]))
    runner.reset()
    found += [runner.prefill([PROMPT]), runner.decode([answer[len(PROMPT)]])]
    return found


def plain_answer() -> list[int]:
    return [*PROMPT, *complete(HashRunner(), [PROMPT], GenerationConfig(max_new_tokens=30))[0].tokens]


def test_every_call_within_a_block_is_that_of_the_plain_runner():
    want = served(hash_runner)
    for rate in (0.0, 0.6, 1.0):
        found = served(lambda rate=rate: speculative(hash_runner(), plain_answer(), rate=rate))
        for got, expected in zip(found, want, strict=True):
            np.testing.assert_array_equal(got, expected)


def test_what_is_refused():
    with pytest.raises(RunnerError, match="graph with the logits of every position"):
        SpeculativeRunner(HashRunner(), Oracle([]))
    inexact = hash_runner()
    inexact.verifies_exactly = False
    with pytest.raises(RunnerError, match=r"may change tokens here.*--speculate-inexact"):
        SpeculativeRunner(inexact, Oracle([]))
    SpeculativeRunner(inexact, Oracle([]), inexact=True)
    for count in (0, 65, 2.5):
        with pytest.raises(RunnerError, match="give a number from 1 to 64"):
            SpeculativeRunner(hash_runner(), Oracle([]), draft_tokens=count)


VOCABULARY, DRAWS, HOT = 4, 2500, 3.0


def chi_squared(answers: Sequence[Sequence[int]], expected: np.ndarray) -> float:
    """Of counts against probabilities of all answers of three tokens, per degree of freedom."""
    counts = np.zeros_like(expected)
    for answer in answers:
        counts[tuple(answer)] += 1
    return float(((counts - expected * len(answers)) ** 2 / (expected * len(answers))).sum() / (expected.size - 1))


def of_three_tokens(runner: HashRunner) -> np.ndarray:
    """The probability of each answer, [V, V, V]."""
    found = np.ones((VOCABULARY,) * 3)
    for a, b in np.ndindex(VOCABULARY, VOCABULARY):
        found[a, b] *= softmax_of(runner.logits_of([*PROMPT, a, b]))
    for a in range(VOCABULARY):
        found[a] *= softmax_of(runner.logits_of([*PROMPT, a]))[:, None]
    return found * softmax_of(runner.logits_of(PROMPT))[:, None, None]


def softmax_of(logits_V: np.ndarray) -> np.ndarray:
    weights_V = np.exp(logits_V.astype(np.float64) / HOT)
    return weights_V / weights_V.sum()


def test_sampling_keeps_the_settings_distribution(monkeypatch: pytest.MonkeyPatch):
    prompt = [token % VOCABULARY for token in PROMPT]
    monkeypatch.setattr("tests.speculation.test_runner.PROMPT", prompt)
    inner = hash_runner(vocab_size=VOCABULARY)
    expected, drafter = of_three_tokens(inner), Oracle([*prompt, 1, 2, 1, 0])

    def statistic() -> float:
        runner = SpeculativeRunner(inner, drafter, controller=Always(most=2, report=Report(drafter="oracle")))
        settings = {"do_sample": True, "temperature": HOT, "top_k": 0, "max_new_tokens": 3}
        answers = [complete(runner, [prompt], GenerationConfig(**settings, seed=seed))[0] for seed in range(DRAWS)]
        return chi_squared([answer.tokens for answer in answers], expected)

    ours = statistic()
    # The control: what was proposed counts as chosen.
    monkeypatch.setattr(_Block, "expects", lambda block, token: block.served <= len(block.draft.tokens))
    control = statistic()
    print(f"chi-squared per degree of freedom: {ours:.2f}, control {control:.1f}")
    assert ours < 1.6  # 63 degrees: beyond it once in 500 times
    assert control > 5
