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
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

from rich import box
from rich.cells import cell_len
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
_FIRST_LINE_AFTER = _LINES_APART = 5.0  # seconds


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
    """Columns whose cells are all numbers stand to the right. Where no terminal reads it: a line for the title, one
    for the columns, one for each row, two spaces or more between cells, nothing else."""
    cells = [[_cell(cell) for cell in row] for row in rows]
    if not streams.is_terminal():
        _deliver("".join(f"{line}\n" for line in _plain_lines(title, columns, cells)))
        return
    table = Table(title=_plain(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if _is_numeric(cells, index) else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for row in cells:
        table.add_row(*row)
    _deliver(_rendered(sys.stdout, table))


def _is_numeric(cells: Sequence[Sequence[Text]], column: int) -> bool:
    return bool(cells) and all(row[column].plain[:1].isdigit() for row in cells)


def _plain_lines(title: str, columns: Sequence[str], cells: Sequence[Sequence[Text]]) -> Iterator[str]:
    yield one_line(title)
    lines = [list(columns), *([cell.plain for cell in row] for row in cells)]
    widths = [max(cell_len(line[index]) for line in lines) for index in range(len(columns))]
    numeric = [_is_numeric(cells, index) for index in range(len(columns))]
    for line in lines:
        padded = [
            f"{' ' * (width - cell_len(text))}{text}" if right else f"{text}{' ' * (width - cell_len(text))}"
            for text, width, right in zip(line, widths, numeric, strict=True)
        ]
        yield "  ".join(padded).rstrip()


def print_line(text: str) -> None:
    """A result that is a sentence."""
    _deliver(f"{text}\n")


def _cell(cell: object) -> Text:
    styles = {"ok": "green", "FELL SHORT": "bold red", "failed": "bold red"}
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
    """On a terminal a bar on stderr with what is being done, how much of it is done and the time left; elsewhere a line
    for each phase and each tenth of it that takes a while."""
    with _drawn() if sys.stderr.isatty() else _Lines() as shown:
        yield ExportProgress(
            phase=lambda label: shown.begin(label, None, _no_amount),
            start=lambda label, total: shown.begin(label, total, human_bytes),
            start_steps=lambda label, total: shown.begin(label, total, str),
            advance=shown.advance,
            continued=_note_continued,
            told=note,
        )


def _no_amount(amount: int) -> str:
    return ""


class _Lines:
    """Progress for a log: what begins, and how far long work is. What begins first is told when it takes a while: most
    that cannot be done is refused in it, and a refusal is one line."""

    def __init__(self) -> None:
        self._label, self._total = "", 0
        self._amount: Callable[[int], str] = _no_amount
        self._done, self._told, self._when = 0, 0, 0.0
        self._first: threading.Timer | None = None

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None:
        if self._first is not None:
            self._first.cancel()

    def begin(self, label: str, total: int | None, amount: Callable[[int], str]) -> None:
        self._label, self._total, self._amount = label, total or 0, amount
        self._done, self._told, self._when = 0, 0, time.monotonic()
        line = f"{label} ({amount(total)})" if total else label
        if self._first is None:
            self._first = threading.Timer(_FIRST_LINE_AFTER, note, (line,))
            self._first.daemon = True
            self._first.start()
        else:
            self._first.cancel()
            note(line)

    def advance(self, amount: int) -> None:
        self._done += amount
        tenth = 10 * self._done // max(1, self._total)
        if tenth > self._told and time.monotonic() - self._when >= _LINES_APART:
            self._told, self._when = tenth, time.monotonic()
            share = 100 * self._done // self._total
            note(f"{self._label}: {share} %, {self._amount(self._done)} of {self._amount(self._total)}")


class _Bar:
    """The one visible task of rich's progress."""

    def __init__(self, bar: Any):
        self._bar, self._task = bar, None

    def begin(self, label: str, total: int | None, amount: Callable[[int], str]) -> None:
        if self._task is not None:
            self._bar.update(self._task, visible=False)
        self._task = self._bar.add_task(one_line(label), total=total, amount=amount)

    def advance(self, amount: int) -> None:
        self._bar.advance(self._task, amount)


@contextmanager
def _drawn() -> Iterator[_Bar]:
    # A twentieth of what `lfm2-export --help` takes.
    from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn

    class Amount(ProgressColumn):
        def render(self, task: Task) -> Text:
            if task.total is None:
                return Text()
            amount = task.fields["amount"]
            return Text(f"{amount(int(task.completed))} of {amount(int(task.total))}")

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), Amount())
    with Progress(*columns, TimeRemainingColumn(), console=stderr(), transient=True) as bar:
        yield _Bar(bar)


def _note_continued(done: int, total: int) -> None:
    note(f"continuing an export that was interrupted: {human_bytes(done)} of {human_bytes(total)} are done")


@contextmanager
def busy(label: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr for work whose length is not known; call what it gives with what is being done now. Where
    stderr is no terminal, a line for each such call."""
    console = stderr()
    status = console.status(_plain(label)) if console.is_terminal else None

    def doing(step: str) -> None:
        interrupts.check()
        logger.info("%s: %s", label, step)
        if status is not None:
            status.update(_plain(f"{label}: {step}"))
        elif not logger.isEnabledFor(logging.INFO):  # else the log has just said it
            note(f"{label}: {step}")

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
    """Within it the package's warnings are printed, and that it compiles, which takes long; with ``verbose`` all that
    it does."""
    logger, handler = logging.getLogger("lfm2_export"), _ToStderr()
    told = logger if verbose else logging.getLogger("lfm2_export.kernels.compiling")
    before = told.level
    logger.addHandler(handler)
    told.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        told.setLevel(before)
