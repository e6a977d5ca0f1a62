"""A computation that runs in a thread of its own while its result is not needed yet."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """``start`` it or not; ``result`` waits for it, or computes it there and then where it was never started.

    The thread is a daemon: a program that fails or is interrupted does not wait for it.
    """

    def __init__(self, compute: Callable[[], T]):
        self._compute = compute
        self._done: list[T] = []
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is None and not self._done:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def result(self) -> T:
        """What was computed; raises what computing it raised."""
        if self._thread is not None:
            self._thread.join()
        elif not self._done:
            self._run()
        if self._error is not None:
            raise self._error
        return self._done[0]

    def _run(self) -> None:
        try:
            self._done.append(self._compute())
        except BaseException as error:
            self._error = error
