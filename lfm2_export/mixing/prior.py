"""What a relative error of one size does in each class of matrix: the KL divergence that it causes.

Written by ``python -m benchmarks.sensitivity ...``.
"""

from __future__ import annotations

PRIOR: dict[str, float] = {}


def weight_of(part: str, matrix: str | None, layer: int | None) -> float:
    return PRIOR.get(class_of(part, matrix, layer), 1.0)


def class_of(part: str, matrix: str | None, layer: int | None) -> str:
    """What matrices are alike: part, name, and whether they are in the first layer."""
    return " ".join(filter(None, (part, matrix, "first" if layer == 0 else None)))
