"""A sweep's report as one HTML page: of each checkpoint KL against bytes with the frontier, and the table, which says
what went wrong.

In: a ``SweepReport``. Out: HTML, by ``templates/sweep.html``: no script, no link to anything outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lfm2_export.quality.plot import Point, scatter
from lfm2_export.resources import human_bytes
from lfm2_export.sweep.report import Outcome, SweepReport, row_of
from lfm2_export.templating import Table, fill_in, write_page


def write(report: SweepReport, path: str | Path) -> None:
    """Writes the page; raises as ``write_page``."""
    write_page(render(report), path)


def render(report: SweepReport) -> str:
    """The whole page."""
    return fill_in(
        "sweep.html",
        {
            "title": f"Sweep of {Path(report.plan).name}",
            "summary": report.summary(),
            "text": report.text,
            "output": report.output,
            "checkpoints": [_part(report, name, outcomes) for name, outcomes in report.by_checkpoint().items()],
            "notes": [(one.cell.name, note) for one in report.outcomes for note in one.notes],
            "versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        },
    )


def _part(report: SweepReport, checkpoint: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    best = set(report.frontier(checkpoint))
    points = [
        Point(
            name=one.cell.name.removeprefix(f"{checkpoint}-"),
            x=one.nbytes,
            kl=one.kl,
            title=f"{one.cell.name}: KL {one.kl:.2e}, {human_bytes(one.nbytes)}",
            is_best=one.cell.name in best,
        )
        for one in outcomes
        if one.kl is not None
    ]
    perplexities = [one.figures.reference_perplexity for one in outcomes if one.figures is not None]
    return {
        "name": checkpoint,
        "perplexity": next((f"{value:.3f}" for value in perplexities if value is not None), None),
        "frontier": scatter(points, across="bytes of the program's files", least=1000, label=human_bytes)
        if points
        else None,
        "cells": Table.of(report.COLUMNS, [row_of(one, one.cell.name in best) for one in outcomes]),
    }
