"""What parity measured, and whether it is good enough: figures, controls, and the hops that they belong to.

In: numbers and tolerances. Out: verdicts, JSON and rows of a table. A figure that is not a number never passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_ABS = "max abs logit error"
KL = "KL divergence"
GREEDY = "equal tokens"
TOP1 = "top-1 agreement"
PERPLEXITY = "perplexity"
# Of an encoder's vectors.
VECTOR_ERROR = "max abs error"
COSINE, COSINE_DISTANCE = "cosine", "1 - cosine"
WEIGHT_ERROR = "relative error"
# The figure of a graph whose kernels do not round activations.
FULL_PRECISION = "kernels at full precision"

# Up to this size of logits a tolerance is absolute; beyond it grows with them, as float32's own spacing does.
LARGEST_LOGIT = 32.0

OK, SHORT, NONE = "ok", "FELL SHORT", ""

Row = tuple[str, str, str, str]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number. ``name`` says what was compared; without a ``tolerance`` the number is only reported."""

    name: str
    measure: str
    value: float
    tolerance: float | None = None
    at_least: bool = False

    @property
    def passed(self) -> bool:
        if self.tolerance is None:
            return True
        return self.value >= self.tolerance if self.at_least else self.value <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "measure": self.measure,
            "value": finite(self.value),
            "tolerance": self.tolerance,
            "passed": self.passed,
        }

    def row(self) -> Row:
        sign = "≥" if self.at_least else "≤"
        tolerance = "" if self.tolerance is None else f"{sign} {shown(self.measure, self.tolerance)}"
        verdict = NONE if self.tolerance is None else OK if self.passed else SHORT
        return f"{self.name}: {self.measure}", shown(self.measure, self.value), tolerance, verdict


@dataclass(frozen=True, kw_only=True)
class Control:
    """The same comparison with one weight of the eager model changed on purpose: it has to exceed the tolerance.

    ``change`` says which weight and by how much; smaller changes that were tried before went unnoticed.
    """

    change: str
    measure: str
    value: float
    tolerance: float

    @property
    def noticed(self) -> bool:
        return not self.value <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        return {
            "change": self.change,
            "measure": self.measure,
            "value": finite(self.value),
            "tolerance": self.tolerance,
            "noticed": self.noticed,
        }

    def row(self) -> Row:
        verdict = OK if self.noticed else SHORT
        limit = f"> {shown(self.measure, self.tolerance)}"
        return f"control, {self.change}: {self.measure}", shown(self.measure, self.value), limit, verdict


@dataclass(frozen=True, kw_only=True)
class Hop:
    """One comparison of two models. ``summary`` holds the figures by which others know it; ``notes`` what to know."""

    name: str
    title: str
    figures: tuple[Figure, ...]
    controls: tuple[Control, ...]
    summary: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    # Mean KL by position in a window of text, for the page.
    curve: tuple[float, ...] = field(default=(), repr=False)

    @property
    def passed(self) -> bool:
        """Whether every figure is within its tolerance and the comparison is proven able to fail."""
        noticed = bool(self.controls) and all(control.noticed for control in self.controls)
        return noticed and all(figure.passed for figure in self.figures)

    def failures(self) -> Iterator[str]:
        """One line for each thing that fell short."""
        for figure in self.figures:
            if not figure.passed:
                name, value, tolerance, _ = figure.row()
                yield f"{self.name}: {name} is {value}, tolerance {tolerance}"
        for control in self.controls:
            if not control.noticed:
                yield f"{self.name}: the control went unnoticed ({control.change}), so the comparison proves nothing"

    def to_json(self) -> dict[str, Any]:
        return {
            **finite(dict(self.summary)),
            "passed": self.passed,
            "figures": [figure.to_json() for figure in self.figures],
            "controls": [control.to_json() for control in self.controls],
            "notes": list(self.notes),
        }

    def rows(self, *, details: bool = False) -> list[Row]:
        """Lines of a table; without ``details``, figures that passed one tolerance share a line with the worst."""
        figures = self.figures if details else _grouped(self.figures)
        return [figure.row() for figure in figures] + [control.row() for control in self.controls]


def _grouped(figures: tuple[Figure, ...]) -> list[Figure]:
    groups: dict[object, list[Figure]] = {}
    for figure in figures:
        alone = figure.name if figure.tolerance is None or figure.at_least or not figure.passed else None
        groups.setdefault((alone, figure.measure, figure.tolerance), []).append(figure)
    return [_worst(group) for group in groups.values()]


def _worst(group: list[Figure]) -> Figure:
    worst = max(group, key=lambda figure: figure.value)
    return Figure(
        name=", ".join(figure.name for figure in group),
        measure=worst.measure,
        value=worst.value,
        tolerance=worst.tolerance,
        at_least=worst.at_least,
    )


def scaled(tolerance: float, largest_logit: float) -> float:
    """``tolerance``, which is meant for logits up to LARGEST_LOGIT, for logits of another size."""
    return tolerance * max(1.0, largest_logit / LARGEST_LOGIT)


def shown(measure: str, value: float) -> str:
    """A number as a person reads it."""
    if not math.isfinite(value):
        return "not finite"
    if measure == TOP1:
        return f"{value:.2%}"
    if measure == GREEDY:
        return f"{value:.0f}"
    if measure == PERPLEXITY:
        return f"{value:.3f}"
    if measure == COSINE:
        return f"{value:.6f}"
    return f"{value:.1e}" if value else "0"


def finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
