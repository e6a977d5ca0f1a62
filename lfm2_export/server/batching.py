"""The requests that are under way on one program: one whose prompt is prefilled, and those that are decoded together.

In: jobs, in the order in which they may begin. Out: what they bring, by a callback of each. ``work`` computes one part
of a prompt and one step of all rows; in between, rows join and leave.

A prompt is cut while others are decoded: each of their tokens then waits for ``_PART`` tokens of it and no more,
whatever its length. Every step serves every row, so that nobody waits for the end of another's answer.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import numpy as np

from lfm2_export.backends.runner_base import DEFAULT_CHUNK_SIZE
from lfm2_export.errors import ResourceError
from lfm2_export.server.errors import about_to_end
from lfm2_export.server.generating import Done, Generation, Piece
from lfm2_export.server.job import Job
from lfm2_export.server.metrics import Metrics
from lfm2_export.server.prefilling import Prefill
from lfm2_export.server.prefixes import PrefixCache
from lfm2_export.server.rows import Rows
from lfm2_export.text import Tokenizer

logger = logging.getLogger(__name__)

# Tokens of a prompt between two steps of those that are decoded. 512 of the 350M's shape took 3.32, 2.89, 2.82 and 2.70
# s of one AVX2 thread in parts of 32, 64, 128 and 256, and a step of 16 rows 0.14 s.
_PART = 64


@dataclass(eq=False, kw_only=True)
class _Entering:
    """The prompt that is prefilled; then its answer, whose first token needs no row."""

    job: Job
    prefill: Prefill | None = None
    generation: Generation | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class _Row:
    job: Job
    generation: Generation


class Batch:
    """For the engine's thread, but that ``jobs`` and ``state_bytes`` may be read from any.

    Args:
        name: the model's, in metrics.
        rows: where they are computed.
    """

    def __init__(self, name: str, rows: Rows, tokenizer: Tokenizer, prefixes: PrefixCache, metrics: Metrics):
        self._name, self._rows, self._tokenizer, self._prefixes, self._metrics = (
            name,
            rows,
            tokenizer,
            prefixes,
            metrics,
        )
        self._entering: _Entering | None = None
        self._members: list[_Row] = []
        self.jobs: list[Job] = []
        self.state_bytes = 0

    @property
    def takes(self) -> bool:
        """Whether another job may begin: one prompt at a time, and no more jobs than there are rows for."""
        return self._entering is None and len(self.jobs) < self._rows.limit

    def begin(self, job: Job) -> None:
        """Takes one more, of which nothing is computed yet."""
        self._entering = _Entering(job=job)
        self.jobs.append(job)

    def work(self) -> None:
        """One part of a prompt, one step of all rows. What goes wrong ends the jobs that it concerns."""
        if self._entering is not None and self._is_through(self._entering):
            self._entering = None
        self._step()
        spec = self._rows.desk.cache
        self.state_bytes = sum(spec.state_bytes(row.generation.length) for row in self._members)

    # The prompt that is next

    def _is_through(self, entering: _Entering) -> bool:
        """Whether it is a row now, or has ended."""
        try:
            if self._gone(entering.job) or self._enters(entering):
                return True
        except Exception as error:
            self._fail(entering.job, error)
            return True
        return False

    def _enters(self, entering: _Entering) -> bool:
        job, runner = entering.job, self._rows.desk
        if entering.prefill is None:
            entering.prefill = Prefill(runner, self._prefixes, job.asked.prompt)
        if not entering.prefill.is_done:
            entering.prefill.advance(_PART if self._members else DEFAULT_CHUNK_SIZE)
            if not entering.prefill.is_done:
                return False
        if entering.generation is None:
            entering.generation = self._generation(job, entering.prefill)
            self._metrics.observe(self._name, time.monotonic() - job.submitted)
            if entering.generation.has_ended:
                self._finish(job, entering.generation)
                return True
        return self._joins(job, entering.prefill, entering.generation)

    def _generation(self, job: Job, prefill: Prefill) -> Generation:
        """With its first token."""
        runner = self._rows.desk
        generation = Generation(
            job.asked,
            self._tokenizer,
            vocab_size=runner.vocab_size,
            context_length=runner.context_length,
            cached=prefill.cached,
        )
        self._deliver(job, generation.choose(prefill.logits[0]))
        return generation

    def _joins(self, job: Job, prefill: Prefill, generation: Generation) -> bool:
        """Where the memory is too small for one more row, it waits until another one leaves."""
        try:
            self._rows.join(prefill)
        except ResourceError:
            if not self._members:
                raise
            return False
        self._members.append(_Row(job=job, generation=generation))
        return True

    # The rows; from the last to the first, since the last one takes the place of one that leaves

    def _step(self) -> None:
        for index in reversed(range(len(self._members))):
            if self._gone(self._members[index].job):
                self._leave(index)
        if not self._members:
            return
        try:
            logits_BV = self._rows.decode([row.generation.token for row in self._members])
        except Exception as error:
            self._step_failed(error)
            return
        self._metrics.add("lfm2_decode_steps_total", self._name)
        for index in reversed(range(len(self._members))):
            if self._has_ended(index, logits_BV[index]):
                self._leave(index)

    def _has_ended(self, index: int, logits_V: np.ndarray) -> bool:
        job, generation = self._members[index].job, self._members[index].generation
        try:
            self._deliver(job, generation.choose(logits_V))
            if generation.has_ended:
                self._keep(index)
                self._finish(job, generation)
        except Exception as error:
            self._fail(job, error)
            return True
        return generation.has_ended

    def _keep(self, index: int) -> None:
        """The state after an answer, for the conversation's next turn."""
        try:
            spec, held = self._rows.desk.cache, self._members[index].generation.held
            self._prefixes.keep(held, spec, lambda: self._rows.copy(index))
        except ResourceError as error:
            logger.warning("%s: the state after an answer is not kept (%s)", self._name, error)

    def _step_failed(self, error: Exception) -> None:
        """It concerns all of them; but where memory is short, that is the longest one's need of more room."""
        short = isinstance(error, ResourceError) and len(self._members) > 1
        longest = max(range(len(self._members)), key=lambda index: self._members[index].generation.length)
        for index in [longest] if short else reversed(range(len(self._members))):
            self._fail(self._members[index].job, error)
            self._leave(index)

    def _leave(self, index: int) -> None:
        self._rows.leave(index)
        self._members[index] = self._members[-1]
        self._members.pop()

    # What a client is told

    def _deliver(self, job: Job, piece: Piece) -> None:
        self._metrics.add("lfm2_generated_tokens_total", self._name, piece.tokens)
        job.deliver(piece)

    def _finish(self, job: Job, generation: Generation) -> None:
        for output in generation.rest():
            if isinstance(output, Done):
                self._metrics.add("lfm2_prompt_tokens_total", self._name, output.prompt_tokens)
                self._metrics.add("lfm2_cached_tokens_total", self._name, output.cached_tokens)
                self.jobs.remove(job)  # whoever has all of it goes, too
            job.deliver(output)

    def _fail(self, job: Job, error: Exception) -> None:
        logger.error("%s: a request failed (%s: %s)", self._name, type(error).__name__, error, exc_info=error)
        if job in self.jobs:
            self.jobs.remove(job)
        job.deliver(error)

    def _gone(self, job: Job) -> bool:
        """Whether nobody waits for it any more; it ends here, and is counted."""
        if not job.cancelled.is_set():
            return False
        self._metrics.add("lfm2_abandoned_requests_total", self._name)
        self.jobs.remove(job)
        job.deliver(about_to_end())
        return True
