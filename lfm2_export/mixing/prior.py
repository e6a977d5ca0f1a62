"""What a relative error of one size does in each class of matrix: the KL divergence that it causes; for parts of a
feed-forward, that over the feed-forward's share of the stream (``shares``).

Measured by ``python -m benchmarks.sensitivity tiny-moe tiny-dense build/checkpoints/dense`` (the third: 240 steps of
``python -m benchmarks.another_checkpoint dense``); only ratios mean something. Fitted to two of the three, it is off by
factors of 1.8, 2.1 and 3.1 (root mean square of the logarithm) on the third, where sensitivities differ by 100 and
more; without the shares by 2.5, 3.0 and 4.4. A relative error of outputs, which needs data, is no better: by 1.9, 2.2
and 3.6.
"""

from __future__ import annotations

PRIOR: dict[str, float] = {
    "attention k_proj": 0.193,
    "attention out_proj": 0.174,
    "attention q_proj": 0.114,
    "attention v_proj": 0.225,
    "convolutions in_proj": 3.01,
    "convolutions out_proj": 2.04,
    "dense MLPs w1": 3.02,
    "dense MLPs w2": 5.38,
    "dense MLPs w3": 2.1,
    "experts down": 2.37,
    "experts gate_up": 2.35,
}


def class_of(part: str, matrix: str | None) -> str:
    """What matrices are alike."""
    return f"{part} {matrix}" if matrix else part


def weight_of(part: str, matrix: str | None) -> float:
    """Of the token table and the head, which stay at 8 bits, only the group size hangs on it."""
    return PRIOR.get(class_of(part, matrix), 1.0)
