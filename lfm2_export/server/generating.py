"""One answer while it is generated: its sampler, its text as far as it is certain, its end.

In: what is asked for, then logits, step by step. Out: pieces of text, then how it ended. Nothing here knows the runner,
or other answers: a step of several rows gives each its logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lfm2_export.constraints import Constraint
from lfm2_export.generation import finish_reason_of
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.logprobs import Choice, choice_of
from lfm2_export.replies import StopStrings
from lfm2_export.sampling import Sampler
from lfm2_export.text import StreamDecoder, Tokenizer


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


class Generation:
    """Args:
    vocab_size, context_length: the runner's.
    cached: tokens of the prompt that were not computed.
    """

    def __init__(self, asked: Asked, tokenizer: Tokenizer, *, vocab_size: int, context_length: int, cached: int):
        self._asked, self._tokenizer, self._context_length, self._cached = asked, tokenizer, context_length, cached
        self._sampler = Sampler(asked.config, vocab_size, asked.prompt, constraint=asked.constraint)
        self._decoder = StreamDecoder(tokenizer, stop_tokens=asked.config.stop_tokens)
        self._stops = StopStrings(asked.stops)
        self._reply: list[int] = []
        self._reason: str | None = None

    @property
    def token(self) -> int:
        """The one that was chosen last, which the row does not hold yet."""
        return self._reply[-1]

    @property
    def held(self) -> list[int]:
        """The tokens that the row holds: all but the last one."""
        return [*self._asked.prompt, *self._reply[:-1]]

    @property
    def length(self) -> int:
        """How many these are."""
        return len(self._asked.prompt) + len(self._reply) - 1

    @property
    def has_ended(self) -> bool:
        return self._reason is not None

    def choose(self, logits_V: np.ndarray) -> Piece:
        """The next token, from the logits after all that the row holds.

        Raises: GenerationError: nothing can be chosen.
        """
        token = self._sampler.choose(logits_V)
        held = len(self._asked.prompt) + len(self._reply)
        self._reply.append(token)
        logprobs = self._logprobs(token, logits_V)
        piece = Piece(text=self._stops.push(self._decoder.push(token)), logprobs=logprobs)
        self._reason = finish_reason_of(token, len(self._reply), held, self._context_length, self._asked.config)
        if self._stops.found is not None:
            self._reason = "stop"
        return piece

    def _logprobs(self, token: int, logits_V: np.ndarray) -> tuple[Choice, ...]:
        if self._asked.top_logprobs is None or token in self._asked.config.stop_tokens:
            return ()
        return (choice_of(token, logits_V, self._asked.top_logprobs, self._tokenizer),)

    def rest(self) -> Iterator[Piece | Done]:
        """What was held back, if anything, and how it ended."""
        if text := self._stops.push(self._decoder.finish()) + self._stops.finish():
            yield Piece(text=text, tokens=0)
        yield Done(
            finish_reason="stop" if self._reason == "stop" or self._stops.found is not None else "length",
            prompt_tokens=len(self._asked.prompt),
            cached_tokens=self._cached,
            completion_tokens=len(self._reply),
        )
