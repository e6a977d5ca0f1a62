"""Numbers that a graph would hold to hurt: borders, and what makes a product wrap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_GREATEST, _LEAST = (1 << 63) - 1, -(1 << 63)
_INTEGERS = (0, -1, 1, 2, 3, 7, 16, 31, 33, 48, 64, 100, 256, _GREATEST, _LEAST, (1 << 31) - 1, 1 << 31, 1 << 32)
_FLOATS = (0.0, -0.0, -1.0, 1e-38, 1e-45, 1e30, -3e38, 1e300, float("nan"), float("inf"), float("-inf"), 1e-5, 0.5)


def pick(rng: np.random.Generator, values: Sequence[T]) -> T:
    return values[int(rng.integers(len(values)))]


def wrapped(value: int) -> int:
    """As 64 bits hold it."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def odd_integer(rng: np.random.Generator, was: int) -> int:
    match int(rng.integers(7)):
        case 0:
            return pick(rng, _INTEGERS)
        case 1:
            return wrapped(was + (1 << int(rng.integers(28, 64))))
        case 2:
            return wrapped(was + (int(rng.integers(1, 1 << 30)) << int(rng.integers(0, 64))))
        case 3:
            return wrapped(was + int(rng.integers(-2, 3)))
        case 4:
            return wrapped(was * int(rng.integers(0, 4)))
        case 5:
            return was // 2
        case _:
            return wrapped(-was)


def odd_float(rng: np.random.Generator) -> float:
    return pick(rng, _FLOATS)
