"""What a relative error of one size does in each class of matrix, over its block's share of the stream (``shares``):
the KL divergence that it causes.

Fitted by the functions of ``benchmarks/sensitivity.py`` to tiny-moe, tiny-dense, tiny-lfm3 and a fourth model (240
steps of ``python -m benchmarks.another_checkpoint dense``); only ratios mean something. Fitted to three of the four,
the estimate ranks the units of the fourth (in this order) with a Spearman correlation to the measured KL of 0.87, 0.85,
0.73 and 0.86 without data, and is off by factors of 2.0, 2.2, 2.7 and 2.4 (root mean square of the logarithm) where
sensitivities differ by 100 and more; with statistics of 0.95, 0.97, 0.91 and 0.96, off by 2.1, 1.4, 2.3 and 1.7.
Measuring with ``refit`` what ``gptq`` will cost has 0.95, 0.96, 0.96 and 0.92.

"head" is one that is a copy of the token table, which a .pte has: its KL alone over that of all layers together, in
8da4w's own format, on tiny-moe and tiny-dense (6.9 and 6.0 without data; with statistics on tiny-dense).
"""

from __future__ import annotations

from collections.abc import Mapping

PRIOR: dict[str, float] = {
    "attention gate_proj": 0.118,
    "attention out_proj": 0.329,
    "attention qkv": 0.302,
    "convolutions in_proj": 5.78,
    "convolutions out_proj": 4.15,
    "dense MLPs w1 w3": 0.478,
    "dense MLPs w2": 1.12,
    "embedding": 16.4,
    "experts matrices": 0.404,
    "head": 6.4,
}

# The same with statistics: relative errors of outputs after ``gptq``, and shares as they were measured.
INFORMED_PRIOR: dict[str, float] = {
    "attention gate_proj": 0.144,
    "attention out_proj": 1.91,
    "attention qkv": 0.371,
    "convolutions in_proj": 3.67,
    "convolutions out_proj": 1.03,
    "dense MLPs w1 w3": 0.443,
    "dense MLPs w2": 1.41,
    "embedding": 3.26,
    "experts matrices": 1.27,
    "head": 12.5,
}

# Matrices that are stored alike (``units``) are measured together; LFM3 has another name for one.
_TOGETHER = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv"),
    **dict.fromkeys(("w1", "w3"), "w1 w3"),
    **dict.fromkeys(("gate_up", "down"), "matrices"),
    "o_proj": "out_proj",
}


def class_of(part: str, matrix: str | None) -> str:
    """What matrices are alike."""
    return f"{part} {_TOGETHER.get(matrix, matrix)}" if matrix else part


def weight_of(prior: Mapping[str, float], part: str, matrix: str | None) -> float:
    """Of one that no model had which was measured: as the middle of those that are known."""
    return prior.get(class_of(part, matrix), 1.0)
