"""A prompt on its way into a runner, part by part, the shortest way.

In: a runner, prompts that were seen, a prompt. Out: logits after it and the state, between whose parts others may be
served. States on the way are kept for later prompts: after the prompt, and where it parts from another one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lfm2_export.backends.base import Runner, Snapshot
from lfm2_export.server.prefixes import PrefixCache

# Tokens that two prompts must share before a state between them is worth its memory.
_WORTH_KEEPING = 64


class Prefill:
    """Puts the runner to the longest beginning of ``prompt`` that is known.

    ``cached``: tokens that are not computed; ``logits`` float32 [1, V], once ``is_done``.
    """

    def __init__(self, runner: Runner, prefixes: PrefixCache, prompt: Sequence[int]):
        self._runner, self._prefixes, self._prompt = runner, prefixes, list(prompt)
        self.logits = np.empty(0, dtype=np.float32)
        self._snapshot: Snapshot | None = None
        self.cached = self._at = self._start()
        fork = prefixes.shared(self._prompt)
        self._fork = fork if self.cached + _WORTH_KEEPING <= fork < len(self._prompt) else 0

    def _start(self) -> int:
        start = self._prefixes.longest(self._prompt)
        if start is None:
            self._runner.reset()
            return 0
        self._runner.restore(start.snapshot)
        if start.length == len(self._prompt):
            assert start.logits is not None
            self.logits, self._snapshot = start.logits, start.snapshot
        return start.length

    @property
    def is_done(self) -> bool:
        return self._at == len(self._prompt)

    def advance(self, most: int) -> None:
        """Appends up to ``most`` tokens; whatever it raises, the runner is left as it was."""
        border = self._fork if self._at < self._fork else len(self._prompt)
        end = min(self._at + most, border)
        self.logits = self._runner.prefill([self._prompt[self._at : end]])
        self._at = end
        if self.is_done:
            self._snapshot = self._keep(self.logits)
        elif end == self._fork:
            self._keep(None)

    def _keep(self, logits: np.ndarray | None) -> Snapshot | None:
        runner = self._runner
        return self._prefixes.keep(self._prompt[: self._at], runner.cache, runner.snapshot, logits)

    def state(self) -> Snapshot:
        """A copy of the runner's state after the prompt, made once; the one that is kept, where one is."""
        if self._snapshot is None:
            self._snapshot = self._runner.snapshot()
        return self._snapshot
