"""One answer on a runner: the shortest prefill, then text as it is certain.

In: a prompt's tokens, settings, stop strings. Out: pieces of text, then how it ended. Whoever iterates may stop at any
token. States on the way are kept for later prompts: after the prompt, after the answer, and where the prompt parts from
another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lfm2_export.backends.base import Runner
from lfm2_export.backends.runner_base import DEFAULT_CHUNK_SIZE
from lfm2_export.constraints import Constraint
from lfm2_export.generation import continue_from
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.logprobs import Choice, choice_of
from lfm2_export.replies import StopStrings
from lfm2_export.server.prefixes import PrefixCache
from lfm2_export.text import StreamDecoder, Tokenizer

# Tokens that two prompts must share before a state between them is worth its memory.
_WORTH_KEEPING = 64


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be generated. ``top_logprobs``: None, or how many beside the chosen token's.
    ``constraint``: a fresh one, or None."""

    prompt: Sequence[int]
    config: GenerationConfig
    stops: tuple[str, ...] = ()
    top_logprobs: int | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one step brought: some text, often none, and the chosen token's logprobs where they were asked for. At the
    end what was held back comes without a step: ``tokens`` is 0."""

    text: str
    tokens: int = 1
    logprobs: tuple[Choice, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Done:
    """How it ended, and what it took."""

    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


def answer(runner: Runner, tokenizer: Tokenizer, prefixes: PrefixCache, asked: Asked) -> Iterator[Piece | Done | None]:
    """Pieces, then Done; None after each part of a prefill, a place to stop as well."""
    prefill = _Prefill(runner, prefixes, asked.prompt)
    for _ in prefill.steps():
        yield None
    count, reason = 0, "length"
    decoder = StreamDecoder(tokenizer, stop_tokens=asked.config.stop_tokens)
    stops, reply = StopStrings(asked.stops), list[int]()
    for event in continue_from(runner, prefill.logits, [asked.prompt], asked.config, constraint=asked.constraint):
        count += 1
        reply.append(event.token)
        logprobs = _logprobs(event.token, event.logits, asked, tokenizer)
        yield Piece(text=stops.push(decoder.push(event.token)), logprobs=logprobs)
        if event.finish_reason == "stop" or stops.found is not None:
            reason = "stop"
            break
    _keep(runner, prefixes, [*asked.prompt, *reply[:-1]])
    if rest := stops.push(decoder.finish()) + stops.finish():
        yield Piece(text=rest, tokens=0)
    yield Done(
        finish_reason="stop" if reason == "stop" or stops.found is not None else "length",
        prompt_tokens=len(asked.prompt),
        cached_tokens=prefill.cached,
        completion_tokens=count,
    )


def _logprobs(token: int, logits: np.ndarray | None, asked: Asked, tokenizer: Tokenizer) -> tuple[Choice, ...]:
    if asked.top_logprobs is None or logits is None or token in asked.config.stop_tokens:
        return ()
    return (choice_of(token, logits, asked.top_logprobs, tokenizer),)


class _Prefill:
    """Brings a runner to the end of a prompt. ``cached``: tokens that were not computed; ``logits`` float32 [1, V]."""

    def __init__(self, runner: Runner, prefixes: PrefixCache, prompt: Sequence[int]):
        self._runner, self._prefixes, self._prompt = runner, prefixes, list(prompt)
        self.cached = 0
        self.logits = np.empty(0, dtype=np.float32)

    def steps(self) -> Iterator[None]:
        """One after each part of the work."""
        start = self._prefixes.longest(self._prompt)
        if start is None:
            self._runner.reset()
        else:
            self._runner.restore(start.snapshot)
            self.cached = start.length
            if start.logits is not None and start.length == len(self._prompt):
                self.logits = start.logits
                return
        fork = self._prefixes.shared(self._prompt)
        if self.cached + _WORTH_KEEPING <= fork < len(self._prompt):
            yield from self._append(self.cached, fork)
            _keep(self._runner, self._prefixes, self._prompt[:fork])
            yield from self._append(fork, len(self._prompt))
        else:
            yield from self._append(self.cached, len(self._prompt))
        _keep(self._runner, self._prefixes, self._prompt, self.logits)

    def _append(self, start: int, end: int) -> Iterator[None]:
        for at in range(start, end, DEFAULT_CHUNK_SIZE):
            self.logits = self._runner.prefill([self._prompt[at : min(at + DEFAULT_CHUNK_SIZE, end)]])
            yield None


def _keep(runner: Runner, prefixes: PrefixCache, tokens: Sequence[int], logits: np.ndarray | None = None) -> None:
    """A copy of the state, unless it alone is more than there is room for."""
    if prefixes.takes(runner.cache.state_bytes(len(tokens))) and prefixes.takes(1):
        prefixes.put(tokens, runner.snapshot(), logits)
