"""``lfm2-export sweep``: many exports by one plan, measured and held against gates."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lfm2_export import console
from lfm2_export.commands.base import add_json, given
from lfm2_export.commands.check import check_writable

if TYPE_CHECKING:
    from lfm2_export.sweep import Sweep, SweepReport

_PLAN = """a YAML file: output, checkpoints, and if wanted backends, schemes, variants, gates, ... (docs/sweep.md)"""


class SweepCommand:
    name = "sweep"
    help = "checkpoints x schemes x backends by a plan, in parallel and resumable; exit code 1 where one falls short"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("plan", metavar="PLAN.yaml", type=given, help=_PLAN)
        parser.add_argument(
            "--address",
            metavar="ADDRESS",
            type=given,
            help="of a Ray cluster whose machines see the same folders, or auto (default: this machine alone)",
        )
        parser.add_argument(
            "--workers", type=int, metavar="N", help="cells at a time on this machine (default: by its cores)"
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="check the plan and list what would be done; start and write nothing"
        )
        parser.add_argument("--report", metavar="FILE.html", type=given, help="also write the page here")
        add_json(parser)

    def run(self, options: argparse.Namespace) -> int:
        from lfm2_export.sweep import Sweep, page

        if options.report:
            check_writable(options.report)
        with console.export_progress() as progress:
            opened = Sweep.open(options.plan, address=options.address, workers=options.workers, progress=progress)
            if not options.dry_run:
                report = opened.run(address=options.address, progress=progress)
        if options.dry_run:
            _print_pending(opened, as_json=options.json)
            return 0
        try:
            _print(report, as_json=options.json)
        finally:
            if options.report:
                page.write(report, options.report)
        return 0 if report.passed else 1


def _print(report: SweepReport, *, as_json: bool) -> None:
    if as_json:
        console.print_json(report.to_json())
        return
    console.print_table(f"{report.plan}: {report.summary()}", report.COLUMNS, report.rows())


def _print_pending(opened: Sweep, *, as_json: bool) -> None:
    steps = {task.job.cell.name: str(task.step) for task in opened.pending()}
    rows = [(cell.name, cell.skipped or steps.get(cell.name, "done")) for cell in opened.cells]
    if as_json:
        console.print_json(
            {
                "workers": opened.workers,
                "threads": opened.threads,
                "cells": [
                    {"cell": cell.name, "to_do": steps.get(cell.name), "skipped": cell.skipped or None}
                    for cell in opened.cells
                ],
            }
        )
        return
    console.print_table(f"{opened.plan.path}: {len(steps)} of {len(rows)} cells to do", ("cell", "to do"), rows)
