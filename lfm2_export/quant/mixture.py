"""Which tensors get more bits: the best that a budget of bytes buys.

In: units (tensors that are stored alike), each with a few formats, their bytes and the damage that each does. Out: one
format for each unit, so that the bytes stay inside the budget. Damage is anything that adds up over units.

Greedy on damage per byte over the lower convex hull of each unit's formats, which is the optimum but for the last
step; what is left of the budget then goes to the largest gains that still fit. Only whole numbers of bytes, rounded
damages and names decide, so that every machine chooses alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lfm2_export.quant.formats import IntFormat

# Damages are compared with so many digits: sums of floats differ in their last ones between machines.
_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class Option:
    """One format of a unit: bytes as the budget counts them, and damage."""

    format: IntFormat
    nbytes: int
    damage: float


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Tensors (by published name) that are stored alike, and the formats that they may have."""

    name: str
    tensors: tuple[str, ...]
    options: tuple[Option, ...]

    def cheapest(self) -> Option:
        return self.hull()[0]

    def hull(self) -> list[Option]:
        """The options from which a budget chooses, by bytes: damage falls, and ever more slowly."""
        hull: list[Option] = []
        for option in sorted(self.options, key=lambda one: (one.nbytes, _rounded(one.damage))):
            if hull and _rounded(option.damage) >= _rounded(hull[-1].damage):
                continue
            while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], option):
                hull.pop()
            hull.append(option)
        return hull


def choose(units: Sequence[Unit], budget: int) -> dict[str, Option]:
    """The option of each unit by its name; together at most ``budget`` bytes, which must not be below the floor."""
    chosen = {unit.name: unit.cheapest() for unit in units}
    left = budget - sum(option.nbytes for option in chosen.values())
    assert left >= 0
    for before, after, name in sorted(_steps(units), key=lambda step: (-_gain(step[0], step[1]), step[2])):
        if chosen[name] is before and (cost := after.nbytes - before.nbytes) <= left:
            chosen[name] = after
            left -= cost
    while better := _best_fit(units, chosen, left):
        name, option = better
        left -= option.nbytes - chosen[name].nbytes
        chosen[name] = option
    return chosen


def _steps(units: Iterable[Unit]) -> Iterator[tuple[Option, Option, str]]:
    for unit in units:
        hull = unit.hull()
        for before, after in pairwise(hull):
            yield before, after, unit.name


def _best_fit(units: Iterable[Unit], chosen: Mapping[str, Option], left: int) -> tuple[str, Option] | None:
    """The largest gain that ``left`` bytes still buy, of any option."""
    found: list[tuple[float, str, Option]] = []
    for unit in units:
        now = chosen[unit.name]
        for option in unit.options:
            gain = _rounded(now.damage) - _rounded(option.damage)
            if gain > 0 and option.nbytes - now.nbytes <= left:
                found.append((-gain, unit.name, option))
    if not found:
        return None
    _, name, option = min(found, key=lambda one: one[:2])
    return name, option


def _gain(before: Option, after: Option) -> float:
    """Damage that a byte takes away."""
    return (_rounded(before.damage) - _rounded(after.damage)) / max(1, after.nbytes - before.nbytes)


def _rounded(damage: float) -> float:
    return float(f"{damage:.{_DIGITS - 1}e}")
