"""How long work tells its caller what it is doing; the CLI draws bars from it, a library caller may ignore it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _ignore_start(label: str, total: int) -> None:
    pass


def _ignore_phase(label: str) -> None:
    pass


def _ignore_advance(amount: int) -> None:
    pass


def _ignore_continued(done: int, total: int) -> None:
    pass


def _ignore_told(text: str) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """``phase(label)`` begins work whose length is not known (tracing), ``start(label, total)`` work of so many bytes,
    ``start_steps(label, total)`` work of so many steps; ``advance(amount)`` says how much more of the last two is done,
    which never comes to more than the total.

    ``continued(done, total)`` is called once, before the work, where an export that was interrupted goes on: bytes of
    the checkpoint (counted once a scheme) that are done, and those in all. ``told(text)``: what long work will take.
    """

    continued: Callable[[int, int], None] = _ignore_continued
    phase: Callable[[str], None] = _ignore_phase
    start: Callable[[str, int], None] = _ignore_start
    start_steps: Callable[[str, int], None] = _ignore_start
    advance: Callable[[int], None] = _ignore_advance
    told: Callable[[str], None] = _ignore_told
