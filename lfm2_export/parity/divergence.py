"""How far two models' logits are apart: numbers only.

In: float32 logits [N, V] of the same N positions. Out: the largest absolute difference, the Kullback-Leibler
divergence in nats, agreement of the top token, and the cost of the true next token. Sums are float64, taken a few
rows at a time: at a vocabulary of 65536, a window of logits in float64 would be hundreds of megabytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

_VALUES_AT_ONCE = 1 << 21


@dataclass(frozen=True, kw_only=True, eq=False)
class Divergence:
    """``other`` against ``reference`` at each position; negative log likelihoods only where targets were given."""

    max_abs_error: float
    kl: np.ndarray
    same_top: np.ndarray
    reference_nll: np.ndarray
    nll: np.ndarray

    @property
    def count(self) -> int:
        return len(self.kl)

    @property
    def mean_kl(self) -> float:
        return float(self.kl.mean())

    @property
    def top1_agreement(self) -> float:
        return float(self.same_top.mean())

    @property
    def perplexity(self) -> float:
        return _perplexity(self.nll)

    @property
    def reference_perplexity(self) -> float:
        return _perplexity(self.reference_nll)

    @classmethod
    def joined(cls, parts: Iterable[Divergence]) -> Divergence:
        found = list(parts)
        return cls(
            max_abs_error=largest(part.max_abs_error for part in found),
            kl=np.concatenate([part.kl for part in found]),
            same_top=np.concatenate([part.same_top for part in found]),
            reference_nll=np.concatenate([part.reference_nll for part in found]),
            nll=np.concatenate([part.nll for part in found]),
        )


def compare(reference: np.ndarray, other: np.ndarray, targets: np.ndarray | None = None) -> Divergence:
    """The divergence of ``other`` from ``reference``; ``targets`` int64 [N] are the tokens that really come next."""
    assert reference.shape == other.shape
    parts = (
        _compare(reference[rows], other[rows], None if targets is None else targets[rows])
        for rows in _blocks(*reference.shape)
    )
    return Divergence.joined(parts)


def _compare(reference: np.ndarray, other: np.ndarray, targets: np.ndarray | None) -> Divergence:
    p, q = log_softmax(reference), log_softmax(other)
    none = np.empty(0)
    return Divergence(
        max_abs_error=max_abs_error(reference, other),
        kl=np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0),
        same_top=reference.argmax(axis=-1) == other.argmax(axis=-1),
        reference_nll=none if targets is None else -_pick(p, targets),
        nll=none if targets is None else -_pick(q, targets),
    )


def max_abs_error(reference: np.ndarray, other: np.ndarray) -> float:
    """The largest absolute difference; NaN where either holds one."""
    assert reference.shape == other.shape
    return float(np.abs(reference - other).max(initial=0.0))


def largest(values: Iterable[float]) -> float:
    """The largest value; NaN where one is NaN, so that it cannot hide."""
    return float(np.max([0.0, *values]))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 log probabilities over the last axis."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _pick(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return values[np.arange(len(columns)), columns]


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _VALUES_AT_ONCE // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def _perplexity(nll: np.ndarray) -> float:
    return math.exp(min(float(nll.mean()), 700.0)) if nll.size else math.nan
