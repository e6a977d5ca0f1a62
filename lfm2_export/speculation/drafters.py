"""What proposes tokens: the protocol. One file for each kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Draft:
    """``tokens``: what may come next, in order. ``kind``: how they came about; acceptance is counted for each kind
    apart, and how many are worth verifying depends on it."""

    tokens: tuple[int, ...] = ()
    kind: str = ""


class Drafter(Protocol):
    """Proposes what may follow a text. What it proposes changes how long decoding takes, never its result."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def costs(self) -> bool:
        """Whether proposing takes time that counts: only as many tokens are asked for as are worth it then."""

    @property
    def at_once(self) -> bool:
        """Whether the time for proposing does not depend on how many are asked for."""

    def propose(self, history: Sequence[int], most: int) -> Draft:
        """At most ``most`` tokens that may follow ``history``, which is the whole text so far. Mostly it is what it was
        at the last call, and some more."""


@runtime_checkable
class ReadsStreams(Protocol):
    """A Drafter that reads what its target computes: the residual streams behind some layers."""

    @property
    def layers(self) -> tuple[int, ...]: ...

    @property
    def width(self) -> int:
        """Of these streams side by side."""

    def hear(self, before: int, streams: np.ndarray) -> None:
        """The target has appended tokens, whose streams are float32 [T, width], behind ``before`` others. Whatever it
        was told of positions from ``before`` on is void."""

    def forget(self) -> None:
        """What it was told is of another text: the target's state was replaced."""
