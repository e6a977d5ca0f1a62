"""The queue of one program, and the thread that works it off.

In: jobs, from any thread. Out: what they bring, by a callback of each. Jobs begin in the order in which they came, as
many at a time as are decoded together (``rows``). A job that was cancelled stops at its next token, or is never begun:
it leaves the queue with the next job that comes and before the next step, and takes no memory while a row is awaited.

Memory: beside the weights, the state of as many requests as run, each as long as the longest of them, rounded up
(at most twice its tokens, and no more than the context); that of one prompt; and what ``prefixes`` may keep.
"""

from __future__ import annotations

import threading
from collections import deque

from lfm2_export.backends.base import Runner
from lfm2_export.server.batching import Batch
from lfm2_export.server.errors import ApiError, about_to_end
from lfm2_export.server.job import Job
from lfm2_export.server.metrics import Metrics
from lfm2_export.server.prefixes import PrefixCache
from lfm2_export.server.rows import rows_of
from lfm2_export.text import Tokenizer


class Engine:
    """Args:
    name: the model's, in metrics.
    runner: belongs to the engine's thread from here on.
    parallel: jobs that may run at once, where the runner's rows can be joined.
    queue_limit: jobs that may wait beside those that run.
    cache_bytes: what snapshots of prompts may take.
    """

    def __init__(
        self,
        name: str,
        runner: Runner,
        tokenizer: Tokenizer,
        metrics: Metrics,
        *,
        parallel: int,
        queue_limit: int,
        cache_bytes: int,
    ):
        self._name, self._queue_limit, self._metrics = name, queue_limit, metrics
        self._prefixes = PrefixCache(cache_bytes)
        rows = rows_of(runner, parallel)
        self.parallel = rows.limit
        self._batch = Batch(name, rows, tokenizer, self._prefixes, metrics)
        self._jobs: deque[Job] = deque()
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=f"lfm2-export serve {name}", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Raises: ApiError 429 where the queue is full, 503 where the server is about to end."""
        with self._changed:
            if self._closing:
                raise about_to_end()
            self._take_out_cancelled()
            ahead = len(self._jobs) + len(self._batch.jobs)
            if ahead >= self._queue_limit + self.parallel:
                raise ApiError(429, f"{ahead} requests for {self._name} come first; try again later", code="queue_full")
            self._jobs.append(job)
            self._changed.notify()

    def stop(self) -> None:
        """Takes no more, and cancels what runs and what waits."""
        with self._changed:
            self._closing = True
            for job in (*self._jobs, *self._batch.jobs):
                job.cancel()
            self._changed.notify()

    def close(self) -> None:
        """``stop``, and waits for the thread, which is at most one step of the program away from its end."""
        self.stop()
        self._thread.join()

    def gauges(self) -> dict[str, float]:
        """What is so now, for the metrics."""
        with self._changed:
            waiting, running = len(self._jobs), len(self._batch.jobs)
        return {
            "lfm2_requests_waiting": waiting,
            "lfm2_requests_running": running,
            "lfm2_requests_parallel_limit": self.parallel,
            "lfm2_running_state_bytes": self._batch.state_bytes,
            "lfm2_prefix_cache_bytes": self._prefixes.nbytes,
            "lfm2_prefix_cache_entries": len(self._prefixes),
        }

    def _work(self) -> None:
        while self._begin():
            self._batch.work()

    def _begin(self) -> bool:
        """The oldest job may begin, if there is room for it; waits while there is nothing to do. False at the end."""
        with self._changed:
            while not (self._drop_cancelled() or self._batch.jobs):
                if self._closing:
                    return False
                self._changed.wait()
            if self._jobs and self._batch.takes:
                self._batch.begin(self._jobs.popleft())
            return True

    def _drop_cancelled(self) -> bool:
        """Ends the jobs that were cancelled before they began; whether others wait."""
        for job in self._take_out_cancelled():
            job.deliver(about_to_end())
        return bool(self._jobs)

    def _take_out_cancelled(self) -> list[Job]:
        """Those of the queue; they are counted. Nobody waits for them, unless it was ``stop`` that cancelled them."""
        waiting, cancelled = deque[Job](), list[Job]()
        for job in self._jobs:
            (cancelled if job.cancelled.is_set() else waiting).append(job)
        self._jobs = waiting
        if cancelled:
            self._metrics.add("lfm2_abandoned_requests_total", self._name, len(cancelled))
        return cancelled
