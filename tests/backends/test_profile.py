"""Which steps are taken apart, and what is made of their traces; no runtime."""

from __future__ import annotations

import numpy as np
import pytest

from lfm2_export.backends.profile import (
    DECODE_STEPS,
    ROUNDS,
    OperatorTime,
    Profile,
    Spent,
    Step,
    StepProfile,
    summarize,
    take_steps,
)
from lfm2_export.errors import ContextLimitError, RunnerError


def taken(prompt_tokens: int, **limits: int) -> tuple[list[Step], list[tuple[int, int]]]:
    """The steps, and (tokens, position) of each run."""
    runs: list[tuple[int, int]] = []

    def run(tokens: np.ndarray, position: int) -> None:
        assert tokens.dtype == np.int64
        runs.append((len(tokens), position))

    return take_steps(run, list(range(prompt_tokens)), **{"context_length": 100, "chunk_size": 50, **limits}), runs


def test_every_round_prefills_from_the_start_and_decodes_after_it() -> None:
    steps, runs = taken(7)
    assert runs == (1 + ROUNDS) * [(7, 0), *((1, 7 + index) for index in range(DECODE_STEPS))]
    assert [step.decode for step in steps[: 1 + DECODE_STEPS]] == [False] + DECODE_STEPS * [True]


def test_the_first_round_is_not_counted() -> None:
    steps, _ = taken(7)
    assert [step.counted for step in steps] == (1 + DECODE_STEPS) * [False] + ROUNDS * (1 + DECODE_STEPS) * [True]


def test_long_prompts_go_in_chunks_that_are_one_step() -> None:
    steps, runs = taken(90)
    assert runs[:3] == [(50, 0), (40, 50), (1, 90)]
    assert [step.runs for step in steps[:2]] == [2, 1]


def test_a_prompt_of_one_token_is_a_prefill() -> None:
    steps, _ = taken(1)
    assert not steps[0].decode
    assert steps[1].decode


def test_no_more_decode_steps_than_the_context_has_room_for() -> None:
    _, runs = taken(98)
    assert max(position for _, position in runs) == 99


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(ContextLimitError, match="101 tokens do not fit the context limit of 100"):
        taken(100)


def step(*, decode: bool, ms: float, counted: bool = True, runs: int = 1) -> Step:
    return Step(decode=decode, counted=counted, ms=ms, runs=runs)


def test_medians_of_counted_steps_only() -> None:
    steps = [step(decode=False, ms=900, counted=False), step(decode=True, ms=900, counted=False)]
    steps += [
        step(decode=False, ms=20, runs=2),
        step(decode=True, ms=2),
        step(decode=True, ms=3),
        step(decode=True, ms=9),
    ]
    slow = {("A",): Spent(1, 800.0)}
    traces = [slow, slow, {("A",): Spent(2, 6.0)}, {("A",): Spent(2, 4.0), ("B",): Spent(1, 5.0)}]
    traces += [{("A",): Spent(1, ms), ("A", "inside"): Spent(3, ms / 2)} for ms in (1.0, 2.0, 8.0)]
    found = summarize(steps, traces, prompt_tokens=60)
    assert found == Profile(
        prefill=StepProfile(
            tokens=60,
            steps=1,
            total_ms=20.0,
            outside_ms=5.0,
            outside_share=0.25,
            operators=(
                OperatorTime(operator="A", calls=4, ms=10.0, share=0.5),
                OperatorTime(operator="B", calls=1, ms=5.0, share=0.25),
            ),
        ),
        decode=StepProfile(
            tokens=1,
            steps=3,
            total_ms=3.0,
            outside_ms=1.0,
            outside_share=1 / 3,
            operators=(
                OperatorTime(
                    operator="A",
                    calls=1,
                    ms=2.0,
                    share=2 / 3,
                    parts=(OperatorTime(operator="inside", calls=3, ms=1.0, share=1 / 3),),
                ),
            ),
        ),
    )


def test_a_table_has_every_operator_of_either_step_and_the_parts_that_matter() -> None:
    def part(name: str, share: float) -> OperatorTime:
        return OperatorTime(operator=name, calls=2, ms=share, share=share)

    def made(*operators: OperatorTime) -> StepProfile:
        return StepProfile(tokens=1, steps=1, total_ms=1.0, outside_ms=0.5, outside_share=0.5, operators=operators)

    first = OperatorTime(operator="A", calls=1, ms=0.5, share=0.5, parts=(part("big", 0.4), part("small", 0.001)))
    rows = Profile(prefill=made(first), decode=made(part("B", 0.5))).rows()
    assert rows == [
        ("B", "0", "0.000", "0.0 %", "2", "0.500", "50.0 %"),
        ("A", "1", "0.500", "50.0 %", "0", "0.000", "0.0 %"),
        ("  big", "2", "0.400", "40.0 %", "0", "0.000", "0.0 %"),
        ("outside of operators", "0", "0.500", "50.0 %", "0", "0.500", "50.0 %"),
        ("together", "1", "1.000", "100.0 %", "2", "1.000", "100.0 %"),
    ]
    assert {len(row) for row in rows} == {len(Profile.COLUMNS)}


def test_runs_that_were_not_traced_are_an_error() -> None:
    with pytest.raises(RunnerError, match="traced 1 runs of 2"):
        summarize([step(decode=False, ms=1), step(decode=True, ms=1)], [{}], prompt_tokens=1)
