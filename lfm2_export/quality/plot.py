"""KL against what a model weighs, as a picture: where points, axes and the frontier lie.

In: ``Point``s. Out: what the macro ``scatter`` of ``templates/macros.html`` draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

LEFT = 64
_WIDTH, _HEIGHT, _RIGHT, _BOTTOM, _TOP = 720, 380, 150, 40, 12
_MOST_TICKS = 8
_LEAST_KL = 1e-12  # of a model that is the checkpoint itself


@dataclass(frozen=True, kw_only=True)
class Point:
    """A model: ``kl`` in nats, ``x`` what it weighs; ``title`` is what a reader is told who points at it; ``is_best``:
    on the frontier."""

    name: str
    x: float
    kl: float
    title: str
    is_best: bool


@dataclass(frozen=True, kw_only=True)
class _Axes:
    """From a weight and the decimal logarithm of a divergence to a place in the picture."""

    columns: tuple[float, float]
    rows: tuple[float, float]

    def x(self, weight: float) -> float:
        across = (weight - self.columns[0]) / (self.columns[1] - self.columns[0])
        return LEFT + across * (_WIDTH - LEFT - _RIGHT)

    def y(self, power: float) -> float:
        down = (self.rows[1] - power) / (self.rows[1] - self.rows[0])
        return _TOP + down * (_HEIGHT - _TOP - _BOTTOM)


def scatter(points: Sequence[Point], *, across: str, least: float, label: Callable[[int], str]) -> dict[str, Any]:
    """KL, on a logarithmic axis, against a weight. ``across``: the axis's name; ``least``: the least range of it that
    is shown; ``label``: a weight in words."""
    places = [(point.x, math.log10(max(point.kl, _LEAST_KL))) for point in points]
    axes = _Axes(
        columns=_range([x for x, _ in places], least=least), rows=_range([power for _, power in places], least=0.5)
    )
    drawn = [(axes.x(x), axes.y(power)) for x, power in places]
    frontier = sorted(place for point, place in zip(points, drawn, strict=True) if point.is_best)
    bottom = axes.y(axes.rows[0])
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": f"{axes.x(axes.columns[0]):.1f}",
        "label_left": f"{axes.x(axes.columns[0]) - 6:.1f}",
        "right": _WIDTH - _RIGHT,
        "top": _TOP,
        "bottom": f"{bottom:.1f}",
        "middle": (LEFT + _WIDTH - _RIGHT) / 2,
        "across": across,
        "columns": [
            {"x": f"{axes.x(x):.1f}", "y": f"{bottom + 16:.1f}", "label": label(x)} for x in _ticks(axes.columns)
        ],
        "rows": [
            {"y": f"{axes.y(power):.1f}", "label_y": f"{axes.y(power) + 4:.1f}", "label": f"1e{power}"}
            for power in _ticks(axes.rows)
        ],
        "frontier": " ".join(f"{x:.1f},{y:.1f}" for x, y in frontier),
        "points": [_drawn(point, *place) for point, place in zip(points, drawn, strict=True)],
    }


def _range(values: Sequence[float], *, least: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = max(least, high - low) * 0.1
    return low - room, high + room


def _ticks(ends: tuple[float, float]) -> range:
    """Multiples of the least of 1, 2, 5, 10, ... that leaves few enough."""
    step, least = 1, (ends[1] - ends[0]) / _MOST_TICKS
    while step < least:
        step = step * 2 if str(step)[0] != "2" else step * 5 // 2
    return range(math.ceil(ends[0] / step) * step, math.floor(ends[1]) + 1, step)


def _drawn(point: Point, x: float, y: float) -> dict[str, str]:
    return {
        "x": f"{x:.1f}",
        "y": f"{y:.1f}",
        "title": point.title,
        "label_x": f"{x + 8:.1f}",
        "label_y": f"{y + 4:.1f}",
        "label": point.name[:24],
    }
