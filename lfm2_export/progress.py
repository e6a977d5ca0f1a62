"""How long work tells its caller what it is doing; the CLI draws bars from it, a library caller may ignore it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _ignore_start(label: str, total: int) -> None:
    pass


def _ignore_advance(amount: int) -> None:
    pass


def _ignore_continued(done: int, total: int) -> None:
    pass


def _ignore_told(text: str) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """``start(label, total)`` begins a step of so many bytes, ``advance(amount)`` says how many more are done.

    ``continued(done, total)`` is called once, before the work, where an export that was interrupted goes on: bytes of
    the checkpoint (counted once a scheme) that are done, and those in all. ``told(text)``: what long work will take.
    """

    continued: Callable[[int, int], None] = _ignore_continued
    start: Callable[[str, int], None] = _ignore_start
    advance: Callable[[int], None] = _ignore_advance
    told: Callable[[str], None] = _ignore_told
