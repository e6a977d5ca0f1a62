"""What a person sees: tables and streamed text on stdout, progress and errors on stderr.

In: results of the library, and names that strangers gave. Out: rich tables where stdout is a terminal, plain lines
elsewhere. Nothing that is printed here is read as markup, and no name can steer a terminal. No logic lives here.
"""

from __future__ import annotations

import io
import json
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from lfm2_export import interrupts, streams
from lfm2_export.messages import one_line, printable
from lfm2_export.progress import Progress as ExportProgress
from lfm2_export.resources import human_bytes

logger = logging.getLogger(__name__)

_WIDE = 160  # of a pipe, where rich would otherwise fold tables at 80 columns
_CELL_LIMIT = 400
_ALLOWED_CONTROLS = "\n\t"


class _Paper(io.StringIO):
    """Takes what rich would print to a stream, in the characters that the stream has. rich itself ends the process
    where nobody reads its output, and leaves other errors to whoever flushes next."""

    def __init__(self, stream: Any):
        super().__init__()
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self.is_terminal = stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding


def _rendered(stream: Any, what: RenderableType, **options: Any) -> str:
    paper = _Paper(stream)
    width = None if paper.is_terminal else _WIDE
    Console(file=paper, force_terminal=paper.is_terminal, width=width, highlight=False).print(what, **options)
    return paper.getvalue()


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One JSON object on one line, in escapes where the stream cannot spell it or a terminal would act on it; null for
    numbers that are none, which JSON cannot say."""
    value = _finite(value)
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not text.isprintable() or not _can_spell(text):
        text = json.dumps(value, allow_nan=False)
    _deliver(f"{text}\n")


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
    return value


def _can_spell(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns whose cells are all numbers stand to the right."""
    cells = [[_cell(cell) for cell in row] for row in rows]
    table = Table(title=_plain(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(row[index].plain[:1].isdigit() for row in cells)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    _deliver(_rendered(sys.stdout, table))


def _cell(cell: object) -> Text:
    styles = {"ok": "green", "FELL SHORT": "bold red"}
    text = str(cell)
    return Text(printable(text, _CELL_LIMIT), style=styles.get(text, ""))


def _plain(text: str, style: str = "") -> Text:
    """Text that rich takes as it is: in a bare ``str`` it would look for markup and emoji."""
    return Text(one_line(text), style=style)


def _deliver(text: str) -> None:
    """A result; where nobody reads it the command still does the rest of its work."""
    try:
        streams.deliver(text)
    except streams.ReaderGone:
        logger.info("nobody reads standard output")


def stream(text: str) -> None:
    """A piece of text that a model writes, exactly; on a terminal what would steer it is shown as an escape.

    Raises:
        ReaderGone: nobody reads it, so that no more of it need be computed.
        OutputError: it cannot be written.
    """
    streams.deliver(harmless(text) if streams.is_terminal() else text)


def harmless(text: str) -> str:
    """A text that no terminal acts on."""
    return "".join(map(_harmless, text))


def _harmless(character: str) -> str:
    """Control characters (C0, delete, C1) as escapes; all that is writing stays, whatever its direction."""
    is_control = character < " " or "\x7f" <= character <= "\x9f"
    return ascii(character)[1:-1] if is_control and character not in _ALLOWED_CONTROLS else character


def note(text: str) -> None:
    """A line about what is going on."""
    streams.tell(_rendered(sys.stderr, _plain(text), style="dim", soft_wrap=True))


def error(text: str) -> None:
    """The one line that a failed command leaves."""
    streams.error_line(text)


@contextmanager
def export_progress() -> Iterator[ExportProgress]:
    """A bar on stderr with the bytes of checkpoint read and the time left; nothing where stderr is no terminal."""
    # A twentieth of what `lfm2-export --help` takes.
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    console = stderr()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: list[Any] = []

        def start(label: str, total: int) -> None:
            for task in tasks:
                bar.update(task, visible=False)
            tasks.append(bar.add_task(one_line(label), total=total))

        yield ExportProgress(
            start=start,
            advance=lambda nbytes: bar.advance(tasks[-1], nbytes),
            continued=_note_continued,
            told=note,
        )


def _note_continued(done: int, total: int) -> None:
    note(f"continuing an export that was interrupted: {human_bytes(done)} of {human_bytes(total)} are done")


@contextmanager
def busy(label: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr for work whose length is not known, nothing where stderr is no terminal; call what it gives
    with what is being done now."""
    console = stderr()
    status = console.status(_plain(label)) if console.is_terminal else None

    def doing(step: str) -> None:
        interrupts.check()
        logger.info("%s: %s", label, step)
        if status is not None:
            status.update(_plain(f"{label}: {step}"))

    with status or nullcontext():
        yield doing


class _ToStderr(logging.Handler):
    """Log records as lines that a person can read."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            streams.tell(f"{one_line(record.getMessage())}\n")
        except Exception:  # a bad record must not end the work that it tells of
            self.handleError(record)


@contextmanager
def logging_to_stderr(*, verbose: bool) -> Iterator[None]:
    """Within it the package's warnings are printed, and with ``verbose`` what it does."""
    logger, handler = logging.getLogger("lfm2_export"), _ToStderr()
    before = logger.level
    logger.addHandler(handler)
    if verbose:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
