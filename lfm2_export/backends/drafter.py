"""What a backend offers to run a drafter: the DraftRunner protocol.

In: the target's residual streams, as it processes tokens, and its newest token. Out: what may follow. No backend is
imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class ProposedBlock:
    """``tokens`` int64 [T], in order; ``confidence`` float32 [T] from 0 to 1, ones where the drafter says nothing."""

    tokens: np.ndarray
    confidence: np.ndarray


@runtime_checkable
class DraftRunner(Protocol):
    """Runs one exported drafter and keeps a cache of the positions that it was told of. Not safe for use by two threads
    at once."""

    @property
    def target(self) -> str:
        """Whose drafter it is (``CheckpointRecord.digest``)."""

    @property
    def target_name(self) -> str:
        """The same for people."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Of the target: those behind which it wants the residual stream."""

    @property
    def width(self) -> int:
        """Of all these streams side by side."""

    @property
    def block_size(self) -> int:
        """Proposals of a pass."""

    @property
    def held(self) -> int:
        """Positions in the cache."""

    def cut(self, count: int) -> None:
        """Keeps the first ``count`` positions."""

    def propose(self, streams: np.ndarray, anchor: int) -> ProposedBlock:
        """Appends the positions of ``streams``, float32 [C, width], C at least 1, and proposes what follows ``anchor``,
        the token behind them.

        Raises:
            RunnerError: the runtime fails; the cache is then as it was.
            ResourceError: the memory is too small.
        """
