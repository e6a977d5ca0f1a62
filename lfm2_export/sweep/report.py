"""What became of a plan's cells: figures, gates, failures, and which cells are worth their bytes.

In: cells, and the records of their jobs. Out: ``SweepReport``, plain numbers with a JSON form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lfm2_export import __version__, notebook, paths
from lfm2_export.packages import recorded_versions
from lfm2_export.resources import human_bytes
from lfm2_export.sweep.cells import Cell
from lfm2_export.sweep.jobs import Job
from lfm2_export.sweep.plan import Plan
from lfm2_export.sweep.records import Figures

OK, FELL_SHORT, FAILED, SKIPPED, MISSING = "ok", "FELL SHORT", "failed", "skipped", "missing"
_COLUMNS = ("cell", "", "KL", "same top token", "perplexity", "size", "bits", "frontier", "")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One cell's. ``verdict``: OK, FELL_SHORT of a gate, FAILED, SKIPPED by the plan, or MISSING, as after a Ctrl-C.
    ``reasons``: of a verdict that is not OK. ``nbytes``: of its program's files. ``figures``: None where there are none
    (not made, an encoder, ``quality: false``)."""

    cell: Cell
    verdict: str
    reasons: tuple[str, ...] = ()
    nbytes: int = 0
    figures: Figures | None = None
    seconds: float = 0.0
    attempts: int = 0
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, cell: Cell, job: Job | None) -> Outcome:
        """By the records as they are now."""
        if job is None:
            return cls(cell=cell, verdict=SKIPPED, reasons=(cell.skipped,))
        exported, quality = job.exported(), job.quality() if job.measured else None
        if exported is None:
            return cls(cell=cell, verdict=MISSING, reasons=("the sweep was ended before",))
        done = [one for one in (exported, quality) if one is not None]
        known: dict[str, Any] = {
            "nbytes": exported.nbytes,
            "seconds": sum(one.seconds for one in done),
            "attempts": max(one.attempt for one in done),
            "notes": exported.notes,
        }
        if errors := [one.error for one in done if one.error is not None]:
            return cls(cell=cell, verdict=FAILED, reasons=tuple(errors), **known)
        if job.measured and quality is None:
            return cls(cell=cell, verdict=MISSING, reasons=("not measured yet: the sweep was ended before",), **known)
        figures = None if quality is None else quality.figures
        short = tuple(_fallen_short(cell, exported.nbytes, figures))
        return cls(cell=cell, verdict=FELL_SHORT if short else OK, reasons=short, figures=figures, **known)

    @property
    def kl(self) -> float | None:
        return None if self.figures is None else self.figures.kl

    def to_json(self) -> dict[str, Any]:
        cell = self.cell
        return {
            "cell": cell.name,
            "checkpoint": cell.checkpoint.name,
            "backend": cell.backend,
            "scheme": cell.scheme,
            "variant": cell.variant,
            "settings": dict(cell.settings),
            "gates": {name: value for name, value in vars(cell.gates).items() if value is not None},
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "artifact": str(cell.folder) if self.nbytes else None,
            "bytes": self.nbytes or None,
            "quality": None if self.figures is None else asdict(self.figures),
            "seconds": round(self.seconds, 1),
            "attempts": self.attempts,
            "notes": list(self.notes),
        }


def _fallen_short(cell: Cell, nbytes: int, figures: Figures | None) -> Iterable[str]:
    """What a gate holds against it; a figure that is no number passes none."""
    gates = cell.gates
    kl, top1 = (None, None) if figures is None else (figures.kl, figures.top1_agreement)
    if gates.max_kl is not None and not (kl is not None and kl <= gates.max_kl):
        yield f"KL {_number(kl, '.2e')} is above {gates.max_kl:g}"
    if gates.min_top1 is not None and not (top1 is not None and top1 >= gates.min_top1):
        yield f"the same top token {_number(top1, '.2%')} is below {gates.min_top1:.2%}"
    if gates.max_bytes is not None and nbytes > gates.max_bytes:
        yield f"{nbytes:,} bytes are more than {gates.max_bytes:,}"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """A plan's outcomes, in its order."""

    plan: str
    output: str
    text: str | None
    outcomes: tuple[Outcome, ...]
    versions: Mapping[str, str]

    COLUMNS = _COLUMNS

    @classmethod
    def of(cls, plan: Plan, cells: Iterable[Cell], jobs: Iterable[Job]) -> SweepReport:
        """As the records are now."""
        by_name = {job.cell.name: job for job in jobs}
        outcomes = tuple(Outcome.of(cell, by_name.get(cell.name)) for cell in cells)
        texts = [one.figures.text for one in outcomes if one.figures is not None]
        return cls(
            plan=str(plan.path),
            output=str(plan.output),
            text=texts[0] if texts else None,
            outcomes=outcomes,
            versions=recorded_versions(),
        )

    @property
    def passed(self) -> bool:
        """Whether no cell failed or fell short of a gate, and all are there."""
        return all(one.verdict in (OK, SKIPPED) for one in self.outcomes)

    def count(self, verdict: str) -> int:
        return sum(one.verdict == verdict for one in self.outcomes)

    def summary(self) -> str:
        """How many cells there are of each verdict, in words."""
        found = {verdict: self.count(verdict) for verdict in (OK, FELL_SHORT, FAILED, MISSING, SKIPPED)}
        return ", ".join(f"{count} {verdict.lower()}" for verdict, count in found.items() if count)

    def by_checkpoint(self) -> dict[str, tuple[Outcome, ...]]:
        """A divergence says nothing beside that of another checkpoint."""
        names = dict.fromkeys(one.cell.checkpoint.name for one in self.outcomes)
        return {name: tuple(one for one in self.outcomes if one.cell.checkpoint.name == name) for name in names}

    def frontier(self, checkpoint: str) -> tuple[str, ...]:
        """The cells that no other one of the checkpoint beats in both KL and bytes, smallest first."""
        measured = [
            (one.nbytes, one.kl, one.cell.name) for one in self.by_checkpoint()[checkpoint] if one.kl is not None
        ]
        found: list[tuple[int, float, str]] = []
        for nbytes, kl, name in sorted((nbytes, kl, name) for nbytes, kl, name in measured if kl is not None):
            if not found or kl < found[-1][1]:
                found.append((nbytes, kl, name))
        return tuple(name for _, _, name in found)

    def rows(self) -> list[tuple[str, ...]]:
        """Every cell by ``COLUMNS``."""
        best = {name for checkpoint in self.by_checkpoint() for name in self.frontier(checkpoint)}
        return [row_of(one, one.cell.name in best) for one in self.outcomes]

    def __repr__(self) -> str:
        return f"SweepReport({paths.shown(self.plan)}: {self.summary()})"

    def _repr_html_(self) -> str:
        return notebook.table(f"{self.plan}: {self.summary()}", self.COLUMNS, self.rows())

    def to_json(self) -> dict[str, Any]:
        return {
            "plan": self.plan,
            "output": self.output,
            "passed": self.passed,
            "ok": self.count(OK),
            "fell_short": self.count(FELL_SHORT),
            "failed": self.count(FAILED),
            "missing": self.count(MISSING),
            "skipped": self.count(SKIPPED),
            "text": self.text,
            "cells": [one.to_json() for one in self.outcomes],
            "frontier": {name: list(self.frontier(name)) for name in self.by_checkpoint()},
            "versions": {"lfm2-export": __version__, **self.versions},
        }


def row_of(one: Outcome, is_best: bool) -> tuple[str, ...]:
    """A cell by ``COLUMNS``."""
    figures = one.figures
    numbers = (
        ("", "", "")
        if figures is None
        else (
            _number(figures.kl, ".2e"),
            _number(figures.top1_agreement, ".2%"),
            _number(figures.perplexity, ".3f"),
        )
    )
    return (
        one.cell.name,
        one.verdict,
        *numbers,
        human_bytes(one.nbytes) if one.nbytes else "",
        "" if figures is None else f"{figures.file_bits:.2f}",
        "yes" if is_best else "",
        "; ".join(one.reasons),
    )
