"""What a relative error of one size does in each class of matrix: the KL divergence that it causes.

Written by ``python -m benchmarks.sensitivity ...``.
"""

from __future__ import annotations

PRIOR: dict[str, float] = {}


def weight_of(part: str, matrix: str | None) -> float:
    return PRIOR.get(f"{part} {matrix}" if matrix else str(part), 1.0)
