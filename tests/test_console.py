"""Names that strangers gave are printed as they are: no markup, no emoji, nothing that steers a terminal."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest

from lfm2_export import cli, console, streams
from lfm2_export.errors import CheckpointError
from lfm2_export.streams import OutputError, ReaderGone

NAMES = ["[/x]", "[bold]b[/bold]", "[link=https://example.org]here[/link]", ":smile:", "[red", "\\[a]", "{task.total}"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


KINDS = pytest.mark.parametrize("kind", [io.StringIO, Terminal], ids=["pipe", "terminal"])


@contextmanager
def printing(kind: type[io.StringIO], terminal: str = "dumb") -> Iterator[io.StringIO]:
    """What goes to standard output and standard error."""
    stream = kind()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stream), redirect_stderr(stream):
        patch.setenv("TERM", terminal)
        patch.setenv("NO_COLOR", "1")
        patch.setenv("COLUMNS", "200")
        yield stream


@KINDS
@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_a_name_is_markup(kind: type[io.StringIO], name: str) -> None:
    with printing(kind, "xterm") as output:
        console.print_table(f"title {name}", ("column", "other"), [(f"cell {name}", 1)])
        console.note(f"note {name}")
        console.error(f"error {name}")
        with console.busy(f"label {name}") as doing:
            doing(f"step {name}")
        with console.export_progress() as progress:
            progress.start(f"export {name}", 100)
            progress.advance(50)
    printed = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())
    for what in ("title", "cell", "note", "error"):
        assert f"{what} {name}" in printed
    if kind is Terminal:
        assert f"export {name}" in printed


@KINDS
@pytest.mark.parametrize(
    "name", ["\x1b]0;owned\x07", "\x1b[2J", "\x9b2J", "a\rb", "a\nb", "\u202etxt", "a\x00b", "\x7f"]
)
def test_no_name_steers_a_terminal(kind: type[io.StringIO], name: str) -> None:
    with printing(kind) as output, console.logging_to_stderr(verbose=False):
        console.print_table(name, ("column",), [(name,)])
        console.note(name)
        console.error(name)
        console.print_json({name: [name]})
        logging.getLogger("lfm2_export.test").warning("logged %s", name)
    printed = output.getvalue()
    # What rich itself sends to a terminal that has no colours is line feeds.
    assert not [c for c in printed if not c.isprintable() and c != "\n"]
    assert name not in printed
    if not set("\r\n") & set(name):  # line breaks become spaces
        shown = ascii(name)[1:-1]
        assert printed.count(shown) >= 4
    line = next(line for line in printed.splitlines() if line.startswith("{"))
    assert json.loads(line) == {name: [name]}


@KINDS
def test_generated_text_is_exact_except_on_a_terminal(kind: type[io.StringIO]) -> None:
    text = "a\tb\nc\r\x1b[31mred\x1b[0m\x07\x08\x9b0m\x7f é 文 👩‍👩‍👧 \u200fע \u00a0."
    with printing(kind) as output:
        console.stream(text)
    if kind is Terminal:
        expected = "a\tb\nc\\r\\x1b[31mred\\x1b[0m\\x07\\x08\\x9b0m\\x7f é 文 👩‍👩‍👧 \u200fע \u00a0."
        assert output.getvalue() == expected
    else:
        assert output.getvalue() == text


def test_json_stays_json_where_numbers_are_none() -> None:
    with printing(io.StringIO) as output:
        console.print_json({"a": [float("nan"), (1.5, float("-inf"))], "b": {"c": 10**400, "d": None}})
    assert json.loads(output.getvalue()) == {"a": [None, [1.5, None]], "b": {"c": 10**400, "d": None}}


def test_results_that_nobody_reads_or_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.StringIO):
        def __init__(self, error: Exception):
            super().__init__()
            self.error = error

        def write(self, text: str) -> int:
            raise self.error

    with streams.prepared(own=False):
        monkeypatch.setattr("sys.stdout", Failing(BrokenPipeError()))
        with pytest.raises(ReaderGone):
            console.stream("text")
        console.stream("and more, which goes nowhere")
        monkeypatch.setattr("sys.stdout", Failing(BrokenPipeError()))
        console.print_json({"a": 1})
        for error in (OSError(28, "No space left on device"), OSError(5, "Input/output error"), ValueError("closed")):
            monkeypatch.setattr("sys.stdout", Failing(error))
            with pytest.raises(OutputError, match=r"^standard output: cannot be written \(\w"):
                console.print_json({"a": 1})
        monkeypatch.setattr("sys.stderr", Failing(OSError(28, "No space left on device")))
        console.error("lost")
        console.note("lost")


def test_verbose_prints_what_is_logged_and_only_then() -> None:
    logger = logging.getLogger("lfm2_export.somewhere")
    level = logging.getLogger("lfm2_export").level
    with printing(io.StringIO) as output:
        with console.logging_to_stderr(verbose=False):
            logger.info("quiet")
            logger.warning("loud\nline")
        with console.logging_to_stderr(verbose=True):
            logger.info("said %s", "too")
            logger.debug("still quiet")
        logger.info("quiet again")
    assert output.getvalue() == "loud line\nsaid too\n"
    assert logging.getLogger("lfm2_export").level == level


def test_that_something_compiles_is_said_without_verbose() -> None:
    from lfm2_export.kernels import compiling

    level = compiling.logger.level
    with printing(io.StringIO) as output:
        with console.logging_to_stderr(verbose=False):
            compiling.logger.info("compiling")
            compiling.logger.debug("with -O3")
        compiling.logger.info("quiet again")
    assert output.getvalue() == "compiling\n"
    assert compiling.logger.level == level


@pytest.mark.parametrize("arguments", [("--verbose", "inspect", "a"), ("inspect", "--verbose", "a"), ("inspect", "a")])
def test_what_a_message_has_no_room_for_is_told_to_who_asks(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise CheckpointError("a: lacks 3 tensors: x and 2 more; get them", details=["x", "y\x1b[2J", "[/z]\n" * 2000])

    monkeypatch.setattr("lfm2_export.inspection.inspect", fail)
    assert cli.main(arguments) == 2
    first, *details = capsys.readouterr().err.splitlines()
    assert first == "lfm2-export: a: lacks 3 tensors: x and 2 more; get them"
    if "--verbose" not in arguments:
        assert details == []
        return
    assert details[:2] == ["x", "y\\x1b[2J"]
    assert details[2].startswith("[/z]\\n[/z]\\n")
    assert len(details[2]) <= 2000


def test_the_help_tells_of_verbose_and_of_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--verbose also tell what is being done, and what an error's line has no room for" in text
    assert "exit codes: 0 done; 1 a check fell short; 2 the input or the request was wrong; 3 the machine" in text
    assert "70 a bug of this program; 128 and the number of the signal" in text
    assert cli.main(["run", "--help"]) == 0
    assert "--verbose" in capsys.readouterr().out


def test_progress_in_a_log_is_lines_that_never_say_more_than_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """What begins first is told only where it takes a while: a refusal is one line."""
    monkeypatch.setattr(console, "_LINES_APART", 0.0)
    with printing(io.StringIO) as output, console.export_progress() as progress:
        progress.phase("looking")
        progress.phase("onnx q4: tracing")
        progress.start("onnx q4: weights", 1000)
        for _ in range(100):
            progress.advance(10)
        progress.start_steps("calibrating", 4)
        progress.advance(4)
    first, begun, *shares, calibrating, all_steps = output.getvalue().splitlines()
    assert (first, begun) == ("onnx q4: tracing", "onnx q4: weights (1.0 kB)")
    assert shares == [f"onnx q4: weights: {n} %, {10 * n} bytes of 1.0 kB" for n in range(10, 100, 10)] + [
        "onnx q4: weights: 100 %, 1.0 kB of 1.0 kB"
    ]
    assert (calibrating, all_steps) == ("calibrating (4)", "calibrating: 100 %, 4 of 4")


def test_progress_on_a_terminal_names_steps_and_bytes_as_what_they_are() -> None:
    with printing(Terminal, "xterm") as output, console.export_progress() as progress:
        progress.start_steps("calibrating", 4)
        progress.advance(3)
        progress.start("weights", 2000)
        progress.advance(1000)
    printed = output.getvalue()
    assert "1.0 kB of 2.0 kB" in printed
    assert "bytes of 4" not in printed


def test_work_in_steps_is_lines_where_nobody_sees_a_spinner() -> None:
    with printing(io.StringIO) as output, console.busy("comparing") as doing:
        doing("model")
    assert output.getvalue() == "comparing: model\n"
