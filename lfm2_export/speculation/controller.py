"""How many proposals to verify, so that it pays: by what was measured on the way.

In: how long steps took, which proposals were accepted. Out: a number for the next step, 0 for a plain one.

Two rules. The number is the one with the most tokens a second, by the acceptance of proposals of that kind so far and
the time of passes of each width. And there is a credit, in seconds: what speculation may lose before it has to have
gained something. Plain steps add a small share of their time to it, verified ones what they were faster or slower than
plain ones would have been. So a text in which nothing is guessed right takes hardly longer than without all this, and
after a stretch of such text it is tried again from time to time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# Of the time of plain steps: what may be lost on trials.
CREDIT_SHARE = 0.015
# In plain steps: what is lent at first, and the most that is kept of gains, so that they are not all lost again.
FIRST_CREDIT, MOST_CREDIT = 1.0, 6.0
# Plain steps that say how long one takes; so many are taken before the first trial.
_STEPS, _FIRST_STEPS = 15, 2
# Passes of one width that say how long one takes, and how many times that is charged for one at most: a machine that
# is busy elsewhere says nothing of speculation.
_PASSES, _BUSY = 5, 1.5
# Verified steps after which a plain one is taken, for its time.
_REFRESH = 64
# What is believed of acceptance before anything is known, as a count of tokens; and how fast old counts fade.
_BELIEVED, _BELIEVED_WEIGHT, _FADING = 0.7, 1.5, 0.9
# How much longer a pass takes for each further token, as a share of a plain step, before it was measured; and the
# proposals of a first one, which measures it.
_SLOPE, _FIRST_WIDTH = 0.08, 2
# A gain that is not worth a trial.
_LEAST_GAIN = 1.02
# The part of the credit that has to be there for a trial that is not believed to pay.
_CURIOUS = 0.6


@dataclass
class Report:
    """What speculation did. ``plain_steps`` and ``verified_steps``: passes; ``tokens``: what they gave; ``drafted`` and
    ``accepted``: proposals that were verified, and that were chosen; ``seconds``: of all steps, drafting included;
    ``plain_seconds``: of the plain ones."""

    drafter: str
    plain_steps: int = 0
    verified_steps: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    plain_seconds: float = 0.0

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        steps = self.plain_steps + self.verified_steps
        return self.tokens / steps if steps else 0.0

    @property
    def gain(self) -> float:
        """How many times as fast as plain decoding, by the time of the plain steps that were taken in between."""
        if not self.plain_steps or not self.seconds:
            return 1.0
        return self.plain_seconds / self.plain_steps * self.tokens / self.seconds

    def to_json(self) -> dict[str, Any]:
        derived = ("acceptance", "tokens_per_step", "gain")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}

    def summary(self) -> str:
        if not self.drafted:
            return f"{self.drafter}: nothing to verify"
        return (
            f"{self.drafter}: {self.accepted} of {self.drafted} proposals accepted, {self.tokens_per_step:.1f} tokens "
            f"a step, about {self.gain:.2f} times plain decoding"
        )


@dataclass
class _Acceptance:
    """Of one kind of proposal: accepted and looked at, old ones fading."""

    accepted: float = _BELIEVED * _BELIEVED_WEIGHT
    seen: float = _BELIEVED_WEIGHT

    @property
    def rate(self) -> float:
        return min(0.99, self.accepted / self.seen)

    def count(self, accepted: int, rejected: int) -> None:
        self.accepted = self.accepted * _FADING + accepted
        self.seen = self.seen * _FADING + accepted + rejected


@dataclass
class Controller:
    """``most``: proposals of a step at most."""

    most: int
    report: Report
    _plain: deque[float] = field(default_factory=lambda: deque(maxlen=_STEPS))
    _passes: dict[int, deque[float]] = field(default_factory=dict)  # seconds, by the number of proposals
    _kinds: dict[str, _Acceptance] = field(default_factory=dict)
    _drafting_s: float = 0.0  # of one proposal
    _block_s: float = 0.0  # of proposals that come all at once
    _credit: float | None = None
    _since_plain: int = 0

    def width(self, kind: str) -> int:
        """How many proposals of this kind to verify next."""
        if len(self._plain) < _FIRST_STEPS or self._since_plain >= _REFRESH:
            return 0
        step_s = self._step_s()
        credit = FIRST_CREDIT * step_s if self._credit is None else self._credit
        most = self.most if self._passes else min(_FIRST_WIDTH, self.most)
        count = max(range(1, most + 1), key=lambda n: self._tokens(kind, n) / self._cost(n))
        if self._tokens(kind, count) / self._cost(count) < _LEAST_GAIN / step_s:
            count = min(2, self.most) if credit >= _CURIOUS * step_s else 0
        while count and self._cost(count) - step_s > credit:
            count -= 1
        return count

    def took_plain_step(self, seconds: float) -> None:
        self._plain.append(seconds)
        self._since_plain = 0
        self.report.plain_steps += 1
        self._took(1, seconds)
        self.report.plain_seconds += seconds
        step_s = self._step_s()
        if self._credit is None:
            self._credit = FIRST_CREDIT * step_s
        self._add(CREDIT_SHARE * step_s)

    def took_pass(self, kind: str, *, drafted: int, accepted: int, rejected: bool, seconds: float) -> None:
        """``accepted`` of ``drafted`` proposals were chosen; ``rejected``: another token than the next one was.
        ``seconds``: the pass and what became of it."""
        step_s, times = self._step_s(), self._passes.setdefault(drafted, deque(maxlen=_PASSES))
        times.append(min(seconds, (1 + drafted) * step_s))  # what is as dear as its steps is left alone in any case
        self._kinds.setdefault(kind, _Acceptance()).count(accepted, int(rejected))
        self._since_plain += 1
        self.report.verified_steps += 1
        self.report.drafted += drafted
        self.report.accepted += accepted
        self._took(accepted + 1, seconds)
        self._add((accepted + 1) * step_s - min(seconds, _BUSY * _typical(times)))

    def took_drafting(self, count: int, seconds: float, *, at_once: bool = False) -> None:
        """``seconds`` for ``count`` proposals; ``at_once``: for any number of them."""
        if at_once:
            self._block_s = _smoothed(self._block_s, seconds)
        else:
            self._drafting_s = _smoothed(self._drafting_s, seconds / max(1, count))
        self.report.seconds += seconds
        self._add(-seconds)

    def _took(self, tokens: int, seconds: float) -> None:
        self.report.tokens += tokens
        self.report.seconds += seconds

    def _add(self, seconds: float) -> None:
        if self._credit is not None:
            self._credit = min(self._credit + seconds, MOST_CREDIT * self._step_s())

    def _step_s(self) -> float:
        return _typical(self._plain) if self._plain else 0.0

    def _tokens(self, kind: str, count: int) -> float:
        """Expected of a pass with so many proposals."""
        rate = self._kinds.setdefault(kind, _Acceptance()).rate
        return (1 - rate ** (count + 1)) / (1 - rate)

    def _cost(self, count: int) -> float:
        """Seconds of a pass with so many proposals, drafting included: measured, or from the nearest one that was."""
        return self._pass_s(count) + self._block_s + count * self._drafting_s

    def _pass_s(self, count: int) -> float:
        step_s = self._step_s()
        if not self._passes:
            return step_s * (1 + _SLOPE * count)
        nearest = min(self._passes, key=lambda known: abs(known - count))
        pass_s = _typical(self._passes[nearest])
        return pass_s if nearest == count else step_s + max(0.0, pass_s - step_s) * count / nearest


def _smoothed(known: float, seconds: float) -> float:
    return 0.8 * known + 0.2 * seconds if known else seconds


def _typical(times: Sequence[float]) -> float:
    """The lower quartile: what a machine does that is not busy elsewhere at that moment."""
    return sorted(times)[len(times) // 4]


class Always(Controller):
    """As many proposals as there are, whatever they cost: for tests and measurements."""

    def width(self, kind: str) -> int:
        return self.most
