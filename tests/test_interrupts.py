"""A signal ends the work once, whatever catches it on the way, and leaves an exit code and a line."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lfm2_export import interrupts
from lfm2_export.artifact_writer import ArtifactWriter
from lfm2_export.manifest import CheckpointRecord
from tests.checkpoints import tiny_config, write_random_checkpoint

CLI = (sys.executable, "-m", "lfm2_export.cli")


@pytest.fixture(autouse=True)
def _signals_as_they_were() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before
    interrupts.forget()


def press(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


class _InADestructor:
    def __del__(self) -> None:
        press()


def _in_a_destructor() -> None:
    _InADestructor()


def _in_a_callback() -> None:
    class Thing:
        pass

    thing = Thing()
    kept = weakref.ref(thing, lambda _: press())
    del thing
    gc.collect()
    assert kept() is None


def _below_a_bare_except() -> None:
    with contextlib.suppress(BaseException):
        press()


SWALLOWERS = (_in_a_destructor, _in_a_callback, _below_a_bare_except)


@pytest.mark.parametrize("swallow", SWALLOWERS)
def test_what_was_swallowed_is_raised_at_the_next_step(
    swallow: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupts.lasting():  # noqa: PT012
        swallow()
        reached.append("the step's end")
        interrupts.check()
        reached.append("the next step")
    assert reached == ["the step's end"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("swallow", SWALLOWERS)
def test_what_was_swallowed_is_raised_at_the_end_at_the_latest(swallow: Callable[[], None]) -> None:
    with pytest.raises(KeyboardInterrupt), interrupts.lasting():
        swallow()
    interrupts.check()


def test_an_error_that_came_of_it_does_not_hide_it() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, interrupts.lasting():  # noqa: PT012
        _below_a_bare_except()
        raise NameError("name 'List' is not defined")
    assert isinstance(caught.value.__cause__, NameError)


def test_without_a_signal_nothing_is_changed() -> None:
    with pytest.raises(ValueError, match="as it is"), interrupts.lasting():
        raise ValueError("as it is")
    with interrupts.lasting(), interrupts.lasting():
        interrupts.check()


def test_who_catches_it_on_purpose_goes_on() -> None:
    with interrupts.lasting():
        with pytest.raises(KeyboardInterrupt):
            press()
        interrupts.forget()
        interrupts.check()


def test_handlers_of_others_are_asked_and_given_back() -> None:
    class Mine(Exception):
        pass

    def handler(number: int, frame: object) -> None:
        raise Mine

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(Mine), interrupts.lasting():  # noqa: PT012
            with contextlib.suppress(BaseException):
                press(signal.SIGTERM)
            interrupts.check()
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_signals_have_the_code_that_shells_give_them(number: int, code: int) -> None:
    with pytest.raises((KeyboardInterrupt, interrupts.Terminated)) as caught, interrupts.raising():
        press(number)
    assert interrupts.exit_code(caught.value) == code
    assert interrupts.cause(caught.value) == signal.Signals(number).name


def test_a_press_that_arrives_twice_counts_once() -> None:
    """As where a wrapper passes on what the terminal has sent to both."""
    cleaned = []
    with pytest.raises(KeyboardInterrupt), interrupts.raising():  # noqa: PT012
        try:
            press()
        finally:
            press()
            cleaned.append(True)
    assert cleaned == [True]


def test_a_signal_waits_for_steps_that_belong_together() -> None:
    done = []
    with pytest.raises(interrupts.Terminated), interrupts.raising():  # noqa: PT012
        with interrupts.held_back(), interrupts.held_back():
            press(signal.SIGTERM)
            done.append("together")
        done.append("later")
    assert done == ["together"]
    with pytest.raises(interrupts.Terminated), interrupts.raising():  # noqa: PT012
        interrupts.forget()
        press(signal.SIGTERM)
        done.append("without")
    assert done == ["together"]


def test_what_is_ignored_stays_ignored() -> None:
    """nohup, and what a shell runs in the background."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts.raising():
            press(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def _handled(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM, which Python alone has not."""
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def started(*arguments: str | Path) -> subprocess.Popen[str]:
    """A command that has come as far as its handlers."""
    process = subprocess.Popen(
        [*CLI, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    while process.poll() is None and not _handled(process.pid):
        time.sleep(0.001)
    return process


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="asks /proc when the handlers are there")
@pytest.mark.parametrize("after", [0.0, 0.1, 0.3])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["INT", "TERM", "HUP"]
)
def test_a_signal_while_python_imports_is_a_line_and_a_code(number: int, code: int, after: float) -> None:
    process = started("chat", "tiny-dense")  # no artifact: where it comes too late the command has failed by itself
    time.sleep(after)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    expected = (f"lfm2-export: stopped by {signal.Signals(number).name}\n", code)
    assert (err, process.returncode) == expected or (process.returncode == 2 and "not an artifact" in err)
    assert out == ""
    if after == 0:
        assert process.returncode == code


IN_AN_EXEC = """
import os, signal, sys
from lfm2_export import interrupts
try:
    with interrupts.raising():
        exec("os.kill(os.getpid(), signal.SIGINT)")
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_an_interrupt_in_the_middle_of_an_exec_is_a_code_too(tmp_path: Path) -> None:
    """And no death by the signal, which is what Python makes of a plain KeyboardInterrupt there."""
    (tmp_path / "work.py").write_text(IN_AN_EXEC)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    assert subprocess.run([sys.executable, "-m", "work"], env=environment).returncode == 130


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = tiny_config("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"])
    return write_random_checkpoint(tmp_path_factory.mktemp("interrupts") / "checkpoint", raw, seed=1, dtype="F32")


# Runs the command with a signal that arrives in the callback of a weak reference, as torch has them by thousands, while
# it lowers the model; what lowering makes is nothing here.
_SWALLOWED = """
import os, signal, sys, weakref
from lfm2_export import cli
from lfm2_export.backends.executorch import trace

sent = []
def press(_):
    sent.append(True)
    os.kill(os.getpid(), signal.SIGINT)
def lower(*arguments):
    thing = type("Thing", (), {})()
    kept = weakref.ref(thing, press)
    del thing
trace.make_pte = lower
code = cli.main()
print("sent", len(sent))
sys.exit(code)
"""


def test_an_interrupt_that_is_lost_in_torch_ends_a_pte_export(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    output = tmp_path / "output"
    command = ["export", checkpoint, "--backend", "executorch", "--scheme", "fp32", "-o", output]
    done = subprocess.run([sys.executable, "-c", _SWALLOWED, *command], capture_output=True, text=True)
    assert done.stdout == "sent 1\n"
    # What took seconds until then has said how far it was.
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, "lfm2-export: stopped by SIGINT")
    assert list(tmp_path.iterdir()) == []


def test_an_export_whose_terminal_is_closed_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    number = signal.SIGHUP
    process = started("export", checkpoint, "--scheme", "fp32,q8,q4", "-o", tmp_path / "output")
    while process.poll() is None and not list(tmp_path.iterdir()):
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, f"lfm2-export: stopped by {signal.Signals(number).name}\n")
    assert list(tmp_path.iterdir()) == []


_WHERE = (str(Path(interrupts.__file__).parent), contextlib.__file__)


def _entered(folder: Path, at: int) -> bool:
    """Whether a writer that SIGTERM meets at its ``at``-th line was still entering."""
    lines = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(_WHERE):
            return None
        if event != "return":  # behind a function's last line Python looks for no signal
            lines += 1
            if lines > at:
                sys.settrace(None)
                press(signal.SIGTERM)
        return trace

    before = sys.gettrace()
    try:
        with interrupts.raising():
            sys.settrace(trace)
            with ArtifactWriter(folder, _no_record):
                sys.settrace(before)
                interrupts.check()
                return False
    except interrupts.Terminated:
        return True
    finally:
        sys.settrace(before)
        interrupts.forget()


def _no_record() -> CheckpointRecord:
    raise AssertionError("asked for by an artifact that is there")


def test_a_signal_at_any_line_of_entering_a_writer_leaves_nothing(tmp_path: Path) -> None:
    lines = 0
    while _entered(tmp_path / "new" / "output", lines):
        assert list(tmp_path.iterdir()) == [], f"line {lines}"
        lines += 1
    assert lines > 100
