"""A smaller model of the same vocabulary as a drafter: the 350M for the 1.2B.

It keeps its own state, which follows the text: what it proposed and nobody chose is taken back before it goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lfm2_export.backends.base import Mark, Runner
from lfm2_export.sampling import softmax
from lfm2_export.speculation.drafters import Draft


class ModelDrafter:
    """A Drafter on a runner, which belongs to it: always its likeliest token, and none that it finds less likely than
    ``least``."""

    costs = True
    at_once = False
    least = 0.4

    def __init__(self, runner: Runner, name: str = "model"):
        self.name = name
        self._runner = runner
        runner.reset()
        self._held: list[int] = []
        # Places within the last proposal to come back to, by the number of tokens before them.
        self._places: list[tuple[int, Mark]] = []

    def propose(self, history: Sequence[int], most: int) -> Draft:
        most = min(most, self._runner.context_length - len(history))
        if most < 1:
            return Draft()
        logits_V = self._follow(list(history))
        tokens: list[int] = []
        while True:
            token = int(np.argmax(logits_V))
            if softmax(logits_V)[token] < self.least:
                break
            tokens.append(token)
            if len(tokens) == most:
                break
            self._places.append((len(self._held), self._runner.mark()))
            logits_V = self._runner.decode([token])[0]
            self._held.append(token)
        return Draft(tokens=tuple(tokens), kind=self.name)

    def _follow(self, history: list[int]) -> np.ndarray:
        """Makes the state that of ``history``; returns the logits behind it, float32 [V]."""
        self._go_back(history)
        self._places = [(len(self._held), self._runner.mark())]
        new = history[len(self._held) :]
        logits_V = self._runner.prefill([new])[0]
        self._held = history
        return logits_V

    def _go_back(self, history: list[int]) -> None:
        """To the furthest place that ``history`` has behind it, and at least one token before its end."""
        if len(self._held) < len(history) and self._is_held(history, len(self._held)):
            return
        for length, mark in reversed(self._places):
            if length < len(history) and self._is_held(history, length) and self._runner.is_valid(mark):
                self._runner.rewind(mark)
                self._held = self._held[:length]
                return
        self._runner.reset()
        self._held = []

    def _is_held(self, history: list[int], length: int) -> bool:
        return self._held[:length] == history[:length]
