"""Work in threads: results in order, failures in their turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from lfm2_export.background import Background, map_in_threads


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_come_in_order(threads: int) -> None:
    first_may_end = threading.Event()

    def work(item: int) -> int:
        if item == 0 and threads > 1:
            assert first_may_end.wait(10)
        first_may_end.set()
        return item * item

    assert list(map_in_threads(work, range(20), threads=threads)) == [(item, item * item) for item in range(20)]


def test_items_are_taken_only_shortly_before_their_turn() -> None:
    """What lies between is memory: a piece of a tensor each."""
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    for done, _ in map_in_threads(lambda item: item, items(), threads=2):
        assert taken[-1] - done <= 2


@pytest.mark.parametrize("threads", [1, 2])
def test_a_failure_is_raised_in_its_turn_and_ends_the_work(threads: int) -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise OSError("the disk is full")
        return item

    found: list[int] = []
    with pytest.raises(OSError, match="the disk is full"):
        found.extend(item for item, _ in map_in_threads(work, range(1000), threads=threads))
    assert found == [0, 1, 2]
    assert max(begun) <= 3 + threads


def test_a_computation_in_the_background_runs_once() -> None:
    calls: list[int] = []
    background = Background(lambda: calls.append(1) or len(calls))
    background.start()
    background.start()
    assert (background.result(), background.result(), calls) == (1, 1, [1])
