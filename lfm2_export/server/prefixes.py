"""States of prompts that were seen, so that a conversation's next turn prefills only what is new.

In: tokens and a runner's snapshot after them. Out: the snapshot of the longest beginning of other tokens. Bounded in
bytes; what was not used for the longest time goes first. A conv state cannot be rewound, so a snapshot serves what
begins with all of its tokens, and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lfm2_export.backends.base import Snapshot
from lfm2_export.cache import CacheSpec

_TOKEN = np.dtype(np.int32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """``logits`` float32 [1, V] after the last token, where they are known."""

    length: int
    snapshot: Snapshot
    logits: np.ndarray | None

    @property
    def nbytes(self) -> int:
        logits = 0 if self.logits is None else self.logits.nbytes
        return self.snapshot.nbytes + logits + self.length * _TOKEN.itemsize


class PrefixCache:
    """Of one program. ``limit``: bytes that all snapshots may have together; 0 keeps none. For one thread, but that
    ``nbytes`` and ``len`` may be read from any."""

    def __init__(self, limit: int):
        self._limit = limit
        self._prefixes: OrderedDict[bytes, Prefix] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._prefixes)

    def takes(self, nbytes: int) -> bool:
        """Whether a snapshot of that size can be kept at all."""
        return nbytes <= self._limit

    def longest(self, tokens: Sequence[int]) -> Prefix | None:
        """The one that saves most of a prefill of ``tokens``, after which logits have to be known."""
        wanted, best = _key(tokens), None
        for key, prefix in self._prefixes.items():
            serves = wanted.startswith(key) and (len(key) < len(wanted) or prefix.logits is not None)
            if serves and (best is None or len(key) > len(best)):
                best = key
        if best is None:
            return None
        self._prefixes.move_to_end(best)
        return self._prefixes[best]

    def shared(self, tokens: Sequence[int]) -> int:
        """How many tokens at the beginning some prefix has in common with ``tokens``: a system prompt, most often."""
        wanted = np.asarray(tokens, dtype=_TOKEN)
        return max((_common(wanted, np.frombuffer(key, dtype=_TOKEN)) for key in self._prefixes), default=0)

    def put(self, tokens: Sequence[int], snapshot: Snapshot, logits: np.ndarray | None = None) -> None:
        """Keeps a snapshot after ``tokens``; others go where there is no room for it."""
        prefix = Prefix(length=len(tokens), snapshot=snapshot, logits=logits)
        if not self.takes(prefix.nbytes):
            return
        key = _key(tokens)
        self._drop(key)
        while self.nbytes + prefix.nbytes > self._limit:
            self._drop(next(iter(self._prefixes)))
        self._prefixes[key] = prefix
        self.nbytes += prefix.nbytes

    def keep(
        self, tokens: Sequence[int], spec: CacheSpec, copy: Callable[[], Snapshot], logits: np.ndarray | None = None
    ) -> Snapshot | None:
        """``put`` of what ``copy`` returns, which is not called where a state after ``tokens`` is too large by itself;
        None then."""
        if not self.takes(max(1, spec.state_bytes(len(tokens)))):
            return None
        snapshot = copy()
        self.put(tokens, snapshot, logits)
        return snapshot

    def _drop(self, key: bytes) -> None:
        if (prefix := self._prefixes.pop(key, None)) is not None:
            self.nbytes -= prefix.nbytes


def _key(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, dtype=_TOKEN).tobytes()


def _common(one: np.ndarray, other: np.ndarray) -> int:
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
