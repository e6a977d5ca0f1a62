"""How many proposals are verified: on a clock of the test's own, where a pass takes so much longer for each token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from lfm2_export.generation import complete
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.speculation import Draft, SpeculativeRunner
from tests.hash_runner import HashRunner
from tests.speculation.test_runner import PROMPT, Oracle

STEP = 10.0


class TimedRunner(HashRunner):
    """A step takes ``STEP`` seconds, a pass a share ``slope`` of it more for each further token."""

    def __init__(self, slope: float):
        super().__init__()
        self.can_score, self.slope, self.now = True, slope, 0.0

    def decode(self, tokens):
        self.now += STEP
        return super().decode(tokens)

    def verify(self, tokens):
        self.now += STEP * (1 + self.slope * (len(tokens) - 1))
        return super().verify(tokens)

    def clock(self) -> float:
        return self.now


def run(
    slope: float, rates: Sequence[float], tokens: int, *, costs: float = 0.0, block: float = 0.0
) -> tuple[float, SpeculativeRunner]:
    """Times as fast as plain decoding, where proposals are right with each of ``rates`` for ``tokens`` tokens; they
    take ``costs`` seconds each, or ``block`` for all at once."""
    config = GenerationConfig(max_new_tokens=tokens * len(rates))
    (plain,) = complete(HashRunner(), [PROMPT], config)
    inner = TimedRunner(slope)

    class Changing(Oracle):
        def propose(self, history, most):
            self.rate = rates[min(len(rates) - 1, (len(history) - len(PROMPT)) // tokens)]
            inner.now += costs * most + block
            return super().propose(history, most)

    drafter = Changing([*PROMPT, *plain.tokens], costs=costs + block > 0, at_once=block > 0)
    runner = SpeculativeRunner(inner, drafter, draft_tokens=8, clock=inner.clock)
    assert complete(runner, [PROMPT], config) == [plain]
    return STEP * (len(plain.tokens) - 1) / inner.now, runner


@pytest.mark.parametrize("tokens", [64, 128, 600])
@pytest.mark.parametrize("slope", [0.05, 0.12, 0.5, 1.0])
def test_it_turns_itself_off_where_nothing_is_guessed_right(slope: float, tokens: int):
    gain, runner = run(slope, [0.0], tokens)
    print(f"{gain:.3f}, {runner.report.summary()}")
    # A pass that takes a step for each token, on a short text: the first one, which finds that out, is seen.
    assert gain > (0.95 if slope * 64 / tokens > 0.5 else 0.97)
    assert runner.report.verified_steps < 8 + tokens / 5


def test_it_is_tried_again_when_a_text_changes():
    gain, runner = run(0.08, [0.0, 1.0], 300)
    print(f"{gain:.2f}, {runner.report.summary()}")
    assert gain > 1.5
    gain, _ = run(0.08, [1.0, 0.0], 300)
    print(f"{gain:.2f}")
    assert gain > 1.5


@pytest.mark.parametrize(("rate", "slope", "least"), [(1.0, 0.08, 4.0), (0.8, 0.08, 2.2), (0.5, 0.08, 1.35)])
def test_it_gains_where_proposals_are_right(rate: float, slope: float, least: float):
    gain, runner = run(slope, [rate], 400)
    print(f"{gain:.2f}, {runner.report.summary()}")
    assert gain > least
    assert runner.report.gain == pytest.approx(gain, rel=0.05)


def test_it_does_not_lose_where_a_pass_is_as_dear_as_its_steps():
    gain, _ = run(1.0, [0.9], 400)
    print(f"{gain:.3f}")
    assert gain > 0.965


def test_a_drafter_that_takes_longer_than_it_saves_is_left_alone():
    gain, runner = run(0.08, [0.6], 400, costs=8.0)
    print(f"{gain:.3f}, {runner.report.summary()}")
    assert gain > 0.93
    gain, _ = run(0.08, [0.8], 400, costs=1.0)
    print(f"{gain:.2f}")
    assert gain > 1.3


def test_a_draft_may_be_empty():
    class Nothing:
        name, costs = "nothing", False

        def propose(self, history, most):
            return Draft()

    inner = TimedRunner(0.1)
    runner = SpeculativeRunner(inner, Nothing(), clock=inner.clock)
    complete(runner, [PROMPT], GenerationConfig(max_new_tokens=20))
    assert runner.report.verified_steps == 0
    assert runner.report.to_json()["tokens"] == 19
    assert np.isclose(runner.report.gain, 1.0)


def test_proposals_that_come_all_at_once_are_asked_for_and_verified_by_the_block():
    gain, runner = run(0.06, [0.8], 400, block=0.4 * STEP)
    widths = runner.report.drafted / runner.report.verified_steps
    print(f"{gain:.2f}, {widths:.1f} at once, {runner.report.summary()}")
    assert gain > 1.7
    assert widths > 5
    dearer, _ = run(0.06, [0.8], 400, costs=0.4 * STEP)
    assert dearer < gain


def test_blocks_of_which_nothing_is_right_are_soon_left_alone():
    gain, runner = run(0.06, [0.0], 400, block=0.4 * STEP)
    print(f"{gain:.3f}, {runner.report.summary()}")
    assert gain > 0.97
