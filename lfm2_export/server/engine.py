"""The queue of one program, and the thread that works it off.

In: jobs, from any thread. Out: what they bring, in the order in which they came, by a callback of each. One job runs
at a time, since a runner has one state. A job that was cancelled stops at its next token, or is never begun.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from lfm2_export.backends.base import Runner
from lfm2_export.server.errors import ApiError
from lfm2_export.server.generating import Asked, Done, Piece, answer
from lfm2_export.server.metrics import Metrics
from lfm2_export.server.prefixes import PrefixCache
from lfm2_export.text import Tokenizer

logger = logging.getLogger(__name__)

Output = Piece | Done | Exception
_END = object()


@dataclass(eq=False, kw_only=True)
class Job:
    """``deliver`` is called in the engine's thread with pieces, and at the end with Done or what went wrong."""

    asked: Asked
    deliver: Callable[[Output], None]
    submitted: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()


class Engine:
    """Args:
    name: the model's, in metrics.
    runner: belongs to the engine's thread from here on.
    queue_limit: jobs that may wait beside the one that runs.
    cache_bytes: what snapshots of prompts may take.
    """

    def __init__(
        self,
        name: str,
        runner: Runner,
        tokenizer: Tokenizer,
        metrics: Metrics,
        *,
        queue_limit: int,
        cache_bytes: int,
    ):
        self._name, self._runner, self._tokenizer, self._metrics = name, runner, tokenizer, metrics
        self._queue_limit = queue_limit
        self._prefixes = PrefixCache(cache_bytes)
        self._jobs: deque[Job] = deque()
        self._running: Job | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=f"lfm2-export serve {name}", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Raises: ApiError 429 where the queue is full, 503 where the server is about to end."""
        with self._changed:
            ahead = sum(not waiting.cancelled.is_set() for waiting in self._jobs) + (self._running is not None)
            if self._closing:
                raise ApiError(503, "the server is about to end; ask another one")
            if ahead > self._queue_limit:
                raise ApiError(429, f"{ahead} requests for {self._name} come first; try again later", code="queue_full")
            self._jobs.append(job)
            self._changed.notify()

    def stop(self) -> None:
        """Takes no more, and cancels what runs and what waits."""
        with self._changed:
            self._closing = True
            for job in (*self._jobs, *([self._running] if self._running else [])):
                job.cancel()
            self._changed.notify()

    def close(self) -> None:
        """``stop``, and waits for the thread, which is at most one step of the program away from its end."""
        self.stop()
        self._thread.join()

    def gauges(self) -> dict[str, float]:
        """What is so now, for the metrics."""
        with self._changed:
            waiting, running = len(self._jobs), self._running is not None
        return {
            "lfm2_requests_waiting": waiting,
            "lfm2_requests_running": int(running),
            "lfm2_prefix_cache_bytes": self._prefixes.nbytes,
            "lfm2_prefix_cache_entries": len(self._prefixes),
        }

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._run(job)
            except Exception as error:
                logger.error("%s: a request failed (%s: %s)", self._name, type(error).__name__, error, exc_info=True)
                job.deliver(error)

    def _next(self) -> Job | None:
        """The oldest job; None at the end."""
        with self._changed:
            self._running = None
            while True:
                if self._jobs:
                    self._running = self._jobs.popleft()
                    return self._running
                if self._closing:
                    return None
                self._changed.wait()

    def _run(self, job: Job) -> None:
        outputs = answer(self._runner, self._tokenizer, self._prefixes, job.asked)
        is_first = True
        while not self._gone(job) and (output := next(outputs, _END)) is not _END:
            if isinstance(output, Piece) and is_first:
                self._metrics.observe(self._name, time.monotonic() - job.submitted)
                is_first = False
            self._count(output)
            if isinstance(output, Piece | Done):
                job.deliver(output)
            if isinstance(output, Done):  # whoever has all of it goes, too
                return

    def _count(self, output: object) -> None:
        if isinstance(output, Piece):
            self._metrics.add("lfm2_generated_tokens_total", self._name, output.tokens)
        if isinstance(output, Done):
            self._metrics.add("lfm2_prompt_tokens_total", self._name, output.prompt_tokens)
            self._metrics.add("lfm2_cached_tokens_total", self._name, output.cached_tokens)

    def _gone(self, job: Job) -> bool:
        """Whether nobody waits for it any more; counted once, where its work ends."""
        if not job.cancelled.is_set():
            return False
        self._metrics.add("lfm2_abandoned_requests_total", self._name)
        job.deliver(ApiError(503, "the server is about to end; ask another one"))
        return True
