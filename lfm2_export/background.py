"""Work in threads: a computation whose result is not needed yet, and many alike side by side."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
Item = TypeVar("Item")


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


def map_in_threads(work: Callable[[Item], T], items: Iterable[Item], *, threads: int) -> Iterator[tuple[Item, T]]:
    """Every item with its result, in the items' order; as many at a time as there are ``threads``, and no item is
    taken long before its turn.

    Where one fails its exception is raised in its turn, once those already begun are done; nothing more is begun.
    """
    if threads == 1:
        yield from ((item, work(item)) for item in items)
        return
    with ThreadPoolExecutor(threads) as pool:
        begun: deque[tuple[Item, Future[T]]] = deque()
        try:
            for item in items:
                begun.append((item, pool.submit(work, item)))
                if len(begun) > threads:
                    yield _finished(begun)
            while begun:
                yield _finished(begun)
        finally:
            for _, future in begun:
                future.cancel()


def _finished(begun: deque[tuple[Item, Future[T]]]) -> tuple[Item, T]:
    item, future = begun.popleft()
    return item, future.result()
