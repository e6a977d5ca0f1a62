"""What a person sees: tables and streamed text on stdout, progress and errors on stderr.

In: results of the library. Out: rich tables where stdout is a terminal, plain lines elsewhere. No logic lives here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lfm2_export.progress import Progress as ExportProgress
from lfm2_export.resources import human_bytes

_WIDE = 160  # of a pipe, where rich would otherwise fold tables at 80 columns


def stdout() -> Console:
    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One JSON object on one line."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns whose cells are all numbers stand to the right."""
    cells = [[_text(cell) for cell in row] for row in rows]
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(row[index].plain[:1].isdigit() for row in cells)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    stdout().print(table)


def _text(cell: object) -> Text:
    styles = {"ok": "green", "FELL SHORT": "bold red"}
    text = str(cell)
    return Text(text, style=styles.get(text, ""))


def note(text: str) -> None:
    """A line about what is going on."""
    stderr().print(text, style="dim", soft_wrap=True)


def error(text: str) -> None:
    """The one line that a failed command leaves."""
    print(f"lfm2-export: {' '.join(text.split())}", file=sys.stderr, flush=True)


@contextmanager
def export_progress() -> Iterator[ExportProgress]:
    """A bar on stderr with the bytes of checkpoint read and the time left; nothing where stderr is no terminal."""
    console = stderr()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: list[Any] = []

        def start(label: str, total: int) -> None:
            for task in tasks:
                bar.update(task, visible=False)
            tasks.append(bar.add_task(label, total=total))

        yield ExportProgress(
            start=start, advance=lambda nbytes: bar.advance(tasks[-1], nbytes), continued=_note_continued
        )


def _note_continued(done: int, total: int) -> None:
    note(f"continuing an export that was interrupted: {human_bytes(done)} of {human_bytes(total)} are done")


@contextmanager
def busy(label: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr for work whose length is not known; call what it gives with what is being done now."""
    with stderr().status(label) as status:
        yield lambda step: status.update(f"{label}: {step}")
