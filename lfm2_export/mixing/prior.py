"""What a relative error of one size does in each class of matrix: the KL divergence that it causes; for parts of a
feed-forward, that over the feed-forward's share of the stream (``shares``).

Measured by ``python -m benchmarks.sensitivity tiny-moe tiny-dense``; only ratios mean something. Either of the two
alone gives the same to a factor of two (a dense model's convolutions), and experts what dense feed-forwards have.
"""

from __future__ import annotations

PRIOR: dict[str, float] = {
    "attention k_proj": 0.273,
    "attention out_proj": 0.209,
    "attention q_proj": 0.159,
    "attention v_proj": 0.326,
    "convolutions in_proj": 2.78,
    "convolutions out_proj": 1.82,
    "dense MLPs w1": 2.05,
    "dense MLPs w2": 3.79,
    "dense MLPs w3": 1.6,
    "experts down": 2.33,
    "experts gate_up": 2.31,
}

# The same for a relative error of a matrix's outputs.
OUTPUT_PRIOR: dict[str, float] = {
    "attention k_proj": 0.273,
    "attention out_proj": 0.209,
    "attention q_proj": 0.159,
    "attention v_proj": 0.326,
    "convolutions in_proj": 2.78,
    "convolutions out_proj": 1.82,
    "dense MLPs w1": 2.05,
    "dense MLPs w2": 3.79,
    "dense MLPs w3": 1.6,
    "experts down": 2.33,
    "experts gate_up": 2.31,
}


def class_of(part: str, matrix: str | None) -> str:
    """What matrices are alike."""
    return f"{part} {matrix}" if matrix else part


def weight_of(part: str, matrix: str | None, *, of_outputs: bool = False) -> float:
    """Of the token table and the head, which stay at 8 bits, only the group size hangs on it."""
    return (OUTPUT_PRIOR if of_outputs else PRIOR).get(class_of(part, matrix), 1.0)
