"""A DSpark drafter: proposes a block in one pass, from what its target computed of the text.

It hears the target's residual streams pass by pass. They wait here until it proposes, and go through the drafter in the
same pass as the block, so that its weights are read once; only a prompt's do so at once. Where the target goes back,
the drafter's cache is cut; where the target's state is replaced, it starts anew from the next token on, with less text
to look back on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lfm2_export.backends.drafter import DraftRunner
from lfm2_export.speculation.drafters import Draft

# Positions that wait for the next proposal at most; what brings more is a prompt, which has time.
_MOST_WAITING = 96


class StreamDrafter:
    """A Drafter on a DraftRunner, which belongs to it.

    ``least``: the block is cut where a proposal is less likely to be right than this, by the drafter's own confidence.
    A row of a pass costs a twentieth of a step or more, so that a less likely one does not pay.
    """

    costs = True
    at_once = True
    least = 0.1

    def __init__(self, runner: DraftRunner, name: str = "drafter"):
        self.name = name
        self._runner = runner
        self._first = 0  # position in the text of the first in the drafter's cache
        self._waiting: list[np.ndarray] = []
        self.forget()

    @property
    def layers(self) -> tuple[int, ...]:
        return self._runner.layers

    @property
    def width(self) -> int:
        return self._runner.width

    def forget(self) -> None:
        self._runner.cut(0)
        self._waiting, self._first = [], 0

    def hear(self, before: int, streams: np.ndarray) -> None:
        if not self._cut(before):
            self.forget()
            self._first = before
        self._waiting.append(streams)
        if sum(map(len, self._waiting)) > _MOST_WAITING:
            waiting = np.concatenate(self._waiting)
            self._runner.propose(waiting[:-1], anchor=0)
            self._waiting = [waiting[-1:]]

    def propose(self, history: Sequence[int], most: int) -> Draft:
        if most < 1 or not self._cut(len(history) - 1) or not self._waiting:
            return Draft()
        block = self._runner.propose(np.concatenate(self._waiting), int(history[-1]))
        self._waiting = []
        doubtful = np.flatnonzero(block.confidence < self.least)
        count = min(most, len(block.tokens), int(doubtful[0]) if len(doubtful) else most)
        return Draft(tokens=tuple(block.tokens[:count].tolist()), kind=self.name)

    def _cut(self, end: int) -> bool:
        """Keeps what it knows of the text before ``end``; False where that does not reach ``end``."""
        held = self._runner.held
        if not self._first <= end <= self._first + held + sum(map(len, self._waiting)):
            return False
        room = end - self._first - held
        self._runner.cut(end - self._first)
        waiting = np.concatenate([np.empty((0, self.width), np.float32), *self._waiting])[: max(0, room)]
        self._waiting = [waiting] if len(waiting) else []
        return True
