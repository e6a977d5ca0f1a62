"""The prefill and decode loop, for any runner; no torch.

In: a runner, prompts as token ids, settings. Out: tokens as they are chosen, or whole completions. Rows of a batch
end separately; a row that has ended is dropped from the runner's state, so it costs nothing while the others go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from lfm2_export.backends.arguments import check_fits, check_rows
from lfm2_export.backends.base import Runner, TokenRows
from lfm2_export.backends.guard import guard_of
from lfm2_export.constraints import Constraint
from lfm2_export.errors import GenerationError
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.messages import shown
from lfm2_export.sampling import Sampler

FinishReason = Literal["stop", "length", "context"]


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """One chosen token of one row; ``finish_reason`` is set on the row's last one.

    "stop": it is a stop token. "length": ``max_new_tokens`` reached. "context": the context is full. ``logits``,
    float32 [V]: what it was chosen from, before penalties and temperature.
    """

    row: int
    token: int
    finish_reason: FinishReason | None = None
    logits: np.ndarray | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What one prompt led to; ``tokens`` includes the stop token."""

    tokens: list[int]
    finish_reason: FinishReason
    prompt_tokens: int


def generate(
    runner: Runner, prompts: TokenRows, config: GenerationConfig, *, chunk_size: int | None = None
) -> Iterator[TokenEvent]:
    """Continues every prompt; the runner's former state is replaced.

    The prompts are checked and prefilled before this returns; tokens are computed as the result is iterated over.
    More prompts than the runner takes at once run one group after the other.

    Raises:
        RunnerError: a prompt is empty or has an id outside the vocabulary.
        ContextLimitError: a prompt is longer than the context.
        GenerationError: no prompts, or a stop token outside the vocabulary.
    """
    rows = _check_prompts(runner, prompts, config)
    size = runner.max_batch_size or len(rows)
    first = _start(runner, rows[:size], 0, config, chunk_size)
    return _run_groups(runner, rows, size, config, chunk_size, first)


def complete(
    runner: Runner, prompts: TokenRows, config: GenerationConfig, *, chunk_size: int | None = None
) -> list[Completion]:
    """``generate`` until every row has ended; one Completion per prompt, in order."""
    events = generate(runner, prompts, config, chunk_size=chunk_size)
    tokens: list[list[int]] = [[] for _ in prompts]
    reasons: dict[int, FinishReason] = {}
    for event in events:
        tokens[event.row].append(event.token)
        if event.finish_reason:
            reasons[event.row] = event.finish_reason
    return [
        Completion(tokens=new, finish_reason=reasons[row], prompt_tokens=len(prompts[row]))
        for row, new in enumerate(tokens)
    ]


def continue_from(
    runner: Runner,
    logits_BV: np.ndarray,
    histories: TokenRows,
    config: GenerationConfig,
    *,
    first_row: int = 0,
    constraint: Constraint | None = None,
) -> Iterator[TokenEvent]:
    """The decode loop alone: chooses from ``logits_BV``, what the runner returned last for its present rows.

    ``histories``: all tokens of each row so far, for the repetition penalty. The last token of each row is chosen but
    not fed to the runner. Where several rows end at different times, the runner keeps the rows that ended last.
    ``constraint``: of a single row, which tokens may come next.

    Raises:
        GenerationError: while it is iterated over, where the runner was used for something else meanwhile, in this
            thread or another.
    """
    samplers = [
        Sampler(config, runner.vocab_size, history, row, constraint)
        for row, history in enumerate(histories, start=first_row)
    ]
    return _steps(runner, logits_BV, samplers, config, first_row, _Turn(runner))


class _Turn:
    """The state that a generation relies on: as it was left by its last call."""

    def __init__(self, runner: Runner):
        self._guard = guard_of(runner)
        self._uses = self._guard.uses
        self._steps = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """No other thread uses the runner in the ``with`` block, and none did since the last one."""
        with self._guard.lock:
            if self._guard.uses != self._uses:
                raise GenerationError(
                    f"the runner was used for something else after {self._steps} steps of this generation; read one to "
                    "its end before the next, or give each thread a runner of its own"
                )
            yield
            self._steps += self._guard.uses != self._uses
            self._uses = self._guard.uses


def _steps(
    runner: Runner,
    logits_BV: np.ndarray,
    samplers: Sequence[Sampler],
    config: GenerationConfig,
    first_row: int,
    turn: _Turn,
) -> Iterator[TokenEvent]:
    active = list(range(len(samplers)))
    for step in range(1, config.max_new_tokens + 1):
        with turn.held():
            lengths = runner.lengths
        tokens = [samplers[row].choose(logits) for row, logits in zip(active, logits_BV, strict=True)]
        reasons = [
            finish_reason_of(token, step, int(held), runner.context_length, config)
            for token, held in zip(tokens, lengths, strict=True)
        ]
        for row, token, reason, logits in zip(active, tokens, reasons, logits_BV, strict=True):
            yield TokenEvent(row=first_row + row, token=token, finish_reason=reason, logits=logits)
        going_on = [i for i, reason in enumerate(reasons) if reason is None]
        if not going_on:
            return
        with turn.held():
            if len(going_on) < len(active):
                runner.reorder(going_on)
                active = [active[i] for i in going_on]
            logits_BV = runner.decode([tokens[i] for i in going_on])


def finish_reason_of(
    token: int, step: int, held: int, context_length: int, config: GenerationConfig
) -> FinishReason | None:
    """Whether ``token``, a row's ``step``-th, is its last one; the row holds ``held`` tokens, this one left out."""
    if token in config.stop_tokens:
        return "stop"
    if step == config.max_new_tokens:
        return "length"
    return "context" if held == context_length else None


def _start(
    runner: Runner,
    rows: Sequence[np.ndarray],
    first_row: int,
    config: GenerationConfig,
    chunk_size: int | None,
) -> Iterator[TokenEvent]:
    token_rows = [row.tolist() for row in rows]
    with guard_of(runner).lock:
        runner.reset(len(rows))
        logits_BV = runner.prefill(token_rows, chunk_size=chunk_size)
        return continue_from(runner, logits_BV, token_rows, config, first_row=first_row)


def _run_groups(
    runner: Runner,
    rows: Sequence[np.ndarray],
    size: int,
    config: GenerationConfig,
    chunk_size: int | None,
    first: Iterator[TokenEvent],
) -> Iterator[TokenEvent]:
    yield from first
    for start in range(size, len(rows), size):
        yield from _start(runner, rows[start : start + size], start, config, chunk_size)


def _check_prompts(runner: Runner, prompts: TokenRows, config: GenerationConfig) -> list[np.ndarray]:
    rows = check_rows(prompts, None, runner.vocab_size)
    if not rows:
        raise GenerationError("no prompt to continue; pass at least one list of token ids")
    check_fits(np.zeros(len(rows), dtype=np.int64), [len(row) for row in rows], runner.context_length)
    for token in config.stop_token_ids:
        if token >= runner.vocab_size:
            raise GenerationError(
                f"stop token {shown(token)} is not in the vocabulary of {runner.vocab_size}; remove it"
            )
    return rows
