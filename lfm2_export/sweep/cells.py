"""The cells of a plan: each checkpoint under each scheme on each backend, in each variant, with its exceptions.

In: a ``Plan``. Out: ``Cell``s, those that are left out with the reason. What cannot be made is refused here, before a
checkpoint is opened: a scheme that a backend lacks, a setting that no cell has a use for, a cell that is there twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from lfm2_export.backends import BACKENDS
from lfm2_export.errors import Lfm2ExportError
from lfm2_export.export_settings import ExportSettings
from lfm2_export.messages import named
from lfm2_export.quant.schemes import get_scheme
from lfm2_export.sweep.plan import Gates, Plan, PlannedCheckpoint, Rule, Setting, Variant

# Weeks of work even where each takes minutes.
MOST_CELLS = 500
FOLDER = "cells"
_MIXING = ("target_bits", "target_size", "budget", "measure")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One artifact of one program. ``settings`` are those of ``export`` that mean something for it; ``folder`` is where
    it will be; ``skipped``: why it is not made, empty where it is."""

    name: str
    checkpoint: PlannedCheckpoint
    backend: str
    scheme: str
    variant: str | None
    settings: Mapping[str, Any]
    gates: Gates
    folder: Path
    skipped: str = ""

    def export_settings(self) -> ExportSettings:
        """What ``export`` is asked for."""
        own = {name: self.settings.get(name) for name in BACKENDS[self.backend].OPTIONS}
        return ExportSettings(
            source=self.checkpoint.request,
            backend=self.backend,
            scheme=self.scheme,
            output=self.folder,
            group_size=self.settings.get("group_size"),
            exclude=self.settings.get("exclude", ()),
            algorithm=self.settings.get("algorithm"),
            calibrate=self.settings.get("calibrate"),
            statistics=self.settings.get("statistics"),
            target_bits=self.settings.get("target_bits"),
            target_size=self.settings.get("target_size"),
            budget=self.settings.get("budget"),
            measure=self.settings.get("measure"),
            requantize_table=self.settings.get("requantize_table", False),
            options=own,
        )


def make_cells(plan: Plan) -> tuple[Cell, ...]:
    """Every cell, in the plan's order.

    Raises:
        ConfigError: the plan asks for what cannot be made, for nothing, or for too much.
    """
    count = len(plan.checkpoints) * len(plan.backends) * len(plan.schemes or ("",)) * len(plan.variants)
    if count > MOST_CELLS:
        raise plan.error(f"the plan has {count} cells, more than {MOST_CELLS}; split it", line=1)
    used: set[tuple[str, int]] = set()
    cells = [
        _made(plan, checkpoint, backend, scheme, variant, used)
        for checkpoint, backend, variant in product(plan.checkpoints, plan.backends, plan.variants)
        for scheme in plan.schemes or (BACKENDS[backend].DEFAULT_SCHEME,)
    ]
    cells = _without_repeats(plan, cells)
    _check_used(plan, cells, used)
    if all(cell.skipped for cell in cells):
        raise plan.error(f"no cell is left: {cells[0].name}: {cells[0].skipped}", line=1)
    return tuple(cells)


def _made(
    plan: Plan,
    checkpoint: PlannedCheckpoint,
    backend: str,
    scheme: str,
    variant: Variant,
    used: set[tuple[str, int]],
) -> Cell:
    words = [checkpoint.name, backend, scheme, *([variant.name] if variant.name else [])]
    name = "-".join(words)
    where = {"checkpoint": checkpoint.name, "backend": backend, "scheme": scheme, "variant": variant.name}
    rules = [rule for rule in plan.rules if rule.where.items() <= where.items()]
    gates, settings, skipped = plan.gates, dict(variant.settings), ""
    for rule in rules:
        gates, settings = rule.gates.over(gates), {**settings, **rule.settings}
        skipped = f"the plan says so (line {rule.line})" if rule.skip else skipped
    there = BACKENDS[backend].SCHEMES
    if not skipped and scheme not in there:
        skipped = f"backend {backend} has no {scheme}, only: {', '.join(there)}"
        if not plan.skip_impossible:
            line = plan.lines.get("schemes", 1)
            raise plan.error(f"{name}: {skipped}; leave one out, or say `impossible: skip`", line=line)
    fitting = {key: one for key, one in settings.items() if _fits(key, backend, scheme)}
    cell = Cell(
        name=name,
        checkpoint=checkpoint,
        backend=backend,
        scheme=scheme,
        variant=variant.name,
        settings={key: one.value for key, one in sorted(fitting.items())},
        gates=gates,
        folder=plan.output / FOLDER / name,
        skipped=skipped,
    )
    if not skipped:
        said = [*variant.settings.items(), *(item for rule in rules for item in rule.settings.items())]
        used.update((key, one.line) for key, one in said if key in fitting)
        _check(plan, cell, fitting)
    return cell


def _fits(setting: str, backend: str, scheme: str) -> bool:
    """Whether a setting means something for a cell."""
    if any(setting in one.OPTIONS for one in BACKENDS.values()):
        return setting in BACKENDS[backend].OPTIONS
    found = get_scheme(scheme)
    return found.can_mix if setting in _MIXING else found.has_groups


def _check(plan: Plan, cell: Cell, settings: Mapping[str, Setting]) -> None:
    try:
        cell.export_settings().choices()
    except Lfm2ExportError as error:
        line = max((one.line for one in settings.values()), default=1)
        raise plan.error(f"{cell.name}: {error}", line=line) from error


def _without_repeats(plan: Plan, cells: list[Cell]) -> list[Cell]:
    """Cells that would come out as another one does are left out where the plan allows it."""
    names: set[str] = set()
    first: dict[str, Cell] = {}
    found = []
    for cell in cells:
        if cell.name.lower() in names:  # some file systems know no capitals
            raise plan.error(f"two cells are called {cell.name}; give checkpoint or variant another name", line=1)
        names.add(cell.name.lower())
        key = repr((cell.checkpoint.request, cell.backend, cell.scheme, cell.settings))
        if not cell.skipped and (other := first.setdefault(key, cell)) is not cell:
            same = f"is the same as {other.name}"
            if not plan.skip_impossible:
                line = plan.lines.get("variants", cell.checkpoint.line)
                raise plan.error(
                    f"{cell.name}: {same}: what differs means nothing for {cell.scheme}; leave one out (cells: skip), "
                    "or say `impossible: skip`",
                    line=line,
                )
            cell = replace(cell, skipped=same)
        found.append(cell)
    return found


def _check_used(plan: Plan, cells: list[Cell], used: set[tuple[str, int]]) -> None:
    """Refuses a setting or an exception that no cell has a use for."""
    for rule in plan.rules:
        if not any(rule.where.items() <= _where(cell).items() for cell in cells):
            raise plan.error(f"no cell of the plan has {_words(rule)}; correct it, or leave it out", line=rule.line)
    for name, one in _all_settings(plan):
        if (name, one.line) not in used:
            raise plan.error(
                f"{named(name)}: means nothing for any cell that it is said of; leave it out, or add a scheme or "
                "backend that has it",
                line=one.line,
            )


def _where(cell: Cell) -> dict[str, str | None]:
    return {
        "checkpoint": cell.checkpoint.name,
        "backend": cell.backend,
        "scheme": cell.scheme,
        "variant": cell.variant,
    }


def _words(rule: Rule) -> str:
    return ", ".join(f"{key} {value}" for key, value in rule.where.items())


def _all_settings(plan: Plan) -> Iterator[tuple[str, Setting]]:
    for settings in (*(one.settings for one in plan.variants), *(one.settings for one in plan.rules)):
        yield from settings.items()
