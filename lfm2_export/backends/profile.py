"""Where the time of one prefill and of one decode step goes, operator by operator.

In: a way to run a program, and after it what the runtime's own tracer recorded of each run. Out: ``Profile``. How a
program is run and its trace read is each backend's matter; which steps are taken, and what is made of their traces, is
the same for all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from lfm2_export.backends.arguments import check_fits
from lfm2_export.errors import RunnerError

# Of a prefill and the decode steps behind it; one more round comes first and is not counted.
ROUNDS, DECODE_STEPS = 3, 4
# Parts of operators that take less of either step than this are left to the JSON.
_SHOWN_SHARE = 0.01


class Spent(NamedTuple):
    calls: int
    ms: float

    def plus(self, ms: float) -> Spent:
        return Spent(self.calls + 1, self.ms + ms)


NOTHING = Spent(0, 0.0)
# What one run of a program spent: by operator, and in entries of their own by (operator, part of it).
Trace = Mapping[tuple[str, ...], Spent]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A prefill or a decode step: its time on the clock, and how often it ran the program."""

    decode: bool
    counted: bool
    ms: float
    runs: int


@dataclass(frozen=True, kw_only=True)
class OperatorTime:
    """``share`` of the whole step. ``parts``: what the tracer tells of its insides; they need not add up to it."""

    operator: str
    calls: int
    ms: float
    share: float
    parts: tuple[OperatorTime, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """Medians over ``steps`` steps of ``tokens`` new tokens each; ``total_ms`` is their sum, so that shares add up to
    1. ``outside_ms`` passed between operators: the runtime's own work, Python's, and the tracer's."""

    tokens: int
    steps: int
    total_ms: float
    outside_ms: float
    outside_share: float
    operators: tuple[OperatorTime, ...]


@dataclass(frozen=True, kw_only=True)
class Profile:
    prefill: StepProfile
    decode: StepProfile

    COLUMNS = ("operator", "prefill calls", "ms", "share", "decode calls", "ms", "share")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        """A line for every operator, what takes longest in a decode step first; then the rest, and the sum."""
        rows = list(_rows(self.prefill.operators, self.decode.operators))
        both = (self.prefill, self.decode)
        rows.append(_row("outside of operators", [(0, step.outside_ms, step.outside_share) for step in both]))
        rows.append(_row("together", [(sum(o.calls for o in step.operators), step.total_ms, 1.0) for step in both]))
        return rows


def take_steps(
    run: Callable[[np.ndarray, int], None], prompt: Sequence[int], *, context_length: int, chunk_size: int
) -> list[Step]:
    """Prefills ``prompt`` and decodes a few tokens after it, several times from the start.

    Args:
        run: runs the program once on int64 tokens [T] that stand from a position on; position 0 begins anew.

    Raises:
        ContextLimitError: the prompt and one token more do not fit.
    """
    tokens = np.asarray(prompt, dtype=np.int64)
    check_fits(np.zeros(1, dtype=np.int64), [len(tokens) + 1], context_length)
    decode_steps = min(DECODE_STEPS, context_length - len(tokens))
    steps = []
    for round_ in range(1 + ROUNDS):
        steps.append(_timed(run, tokens, 0, chunk_size, counted=round_ > 0))
        for index in range(decode_steps):
            token = tokens[index % len(tokens)][None]
            steps.append(_timed(run, token, len(tokens) + index, chunk_size, counted=round_ > 0))
    return steps


def _timed(
    run: Callable[[np.ndarray, int], None], tokens: np.ndarray, position: int, chunk_size: int, *, counted: bool
) -> Step:
    starts = range(0, len(tokens), chunk_size)
    started = time.perf_counter()
    for start in starts:
        run(tokens[start : start + chunk_size], position + start)
    ms = 1e3 * (time.perf_counter() - started)
    return Step(decode=position > 0, counted=counted, ms=ms, runs=len(starts))


def summarize(steps: Sequence[Step], traces: Sequence[Trace], *, prompt_tokens: int) -> Profile:
    """Medians of the counted steps.

    Args:
        traces: one for each run of the program, in order.

    Raises:
        RunnerError: there are not as many traces as runs.
    """
    runs = sum(step.runs for step in steps)
    if len(traces) != runs:
        raise RunnerError(f"the runtime traced {len(traces)} runs of {runs}; ask for fewer --prompt-tokens")
    left = iter(traces)
    traced = [(step, _merge(islice(left, step.runs))) for step in steps]

    def of(*, decode: bool) -> StepProfile:
        return _medians([t for t in traced if t[0].counted and t[0].decode == decode], 1 if decode else prompt_tokens)

    return Profile(prefill=of(decode=False), decode=of(decode=True))


def _merge(traces: Iterable[Trace]) -> Trace:
    """One step's runs as one."""
    merged: dict[tuple[str, ...], Spent] = {}
    for trace in traces:
        for key, spent in trace.items():
            before = merged.get(key, NOTHING)
            merged[key] = Spent(before.calls + spent.calls, before.ms + spent.ms)
    return merged


def _medians(steps: Sequence[tuple[Step, Trace]], tokens: int) -> StepProfile:
    spent = {key: _median([trace.get(key, NOTHING) for _, trace in steps]) for _, trace in steps for key in trace}
    outside = statistics.median(
        step.ms - sum(t.ms for key, t in trace.items() if len(key) == 1) for step, trace in steps
    )
    total = outside + sum(found.ms for key, found in spent.items() if len(key) == 1)

    def times(above: tuple[str, ...]) -> tuple[OperatorTime, ...]:
        found = [
            OperatorTime(operator=key[-1], calls=calls, ms=ms, share=ms / total, parts=times(key))
            for key, (calls, ms) in spent.items()
            if key[:-1] == above
        ]
        return tuple(sorted(found, key=lambda entry: -entry.ms))

    return StepProfile(
        tokens=tokens,
        steps=len(steps),
        total_ms=total,
        outside_ms=outside,
        outside_share=outside / total,
        operators=times(()),
    )


def _median(values: Sequence[Spent]) -> Spent:
    return Spent(statistics.median_low(v.calls for v in values), statistics.median(v.ms for v in values))


def _rows(
    prefill: Sequence[OperatorTime], decode: Sequence[OperatorTime], indent: str = ""
) -> Iterator[tuple[str, ...]]:
    steps = [{entry.operator: entry for entry in step} for step in (prefill, decode)]
    for name in dict.fromkeys([entry.operator for entry in (*decode, *prefill)]):
        entries = [step.get(name, OperatorTime(operator=name, calls=0, ms=0.0, share=0.0)) for step in steps]
        if indent and max(entry.share for entry in entries) < _SHOWN_SHARE:
            continue
        yield _row(indent + name, [(entry.calls, entry.ms, entry.share) for entry in entries])
        yield from _rows(entries[0].parts, entries[1].parts, indent + "  ")


def _row(name: str, steps: Iterable[tuple[int, float, float]]) -> tuple[str, ...]:
    return (name, *(cell for calls, ms, share in steps for cell in (str(calls), f"{ms:.3f}", f"{100 * share:.1f} %")))
