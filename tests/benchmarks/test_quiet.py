"""What others use of the machine is what is neither ours nor the timed program's."""

from __future__ import annotations

import os
import sys

import pytest

from benchmarks import compare, quiet
from benchmarks.figures import Run
from benchmarks.processes import watch
from benchmarks.quiet import Moment

BUSY = (
    "import sys, time\nprint('on', file=sys.stderr, flush=True)\nend = time.time() + 0.6\nwhile time.time() < end: pass"
)


def moment(clock: float, machine: float, own: float, child: float = 0.0) -> Moment:
    return Moment(clock=clock, machine=machine, own=own, child=child)


def test_foreign_cores_leave_out_what_is_ours() -> None:
    # In 10 s the machine worked 18 s: we 1 s, the child 15 s (20 s in all, 5 s before), others 2 s.
    assert moment(10.0, 118.0, 21.0).foreign_cores(moment(0.0, 100.0, 0.0, child=5.0)) == pytest.approx(0.2)


def test_foreign_cores_are_never_negative_and_zero_where_nothing_is_known() -> None:
    assert moment(10.0, 101.0, 5.0).foreign_cores(moment(0.0, 100.0, 0.0)) == 0.0
    assert moment(10.0, 0.0, 5.0).foreign_cores(moment(0.0, 0.0, 0.0)) == 0.0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how busy it is")
def test_a_busy_child_is_not_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = iter([100.0, 101.0])
    monkeypatch.setattr(quiet, "_machine_seconds", lambda: next(machine))
    found = watch([sys.executable, "-c", BUSY], purpose="a test")
    # One second of machine time, of which the child had most: what is left is below that.
    assert found.foreign_cores < 1.0
    assert quiet._seconds(os.getpid()) > 0
    print(f"others: {found.foreign_cores:.2f} cores")


def runs(monkeypatch: pytest.MonkeyPatch, *foreign: float) -> list[float]:
    """Runs with these disturbances, in turn; returns what was tried and, last, what was taken."""
    waiting = list(foreign)
    tried = []

    def once(*_: object) -> Run:
        tried.append(waiting.pop(0))
        return Run(load_s=1.0, resident_bytes=1, prefill_tps=1.0, decode_tps=1.0, foreign_cores=tried[-1])

    class Nothing:
        label, files = "a program", ()

    monkeypatch.setattr(compare, "run_once", once)
    taken = compare.run_undisturbed(Nothing(), None, compare.build_parser().parse_args(["350m"]))  # type: ignore[arg-type]
    return [*tried, taken.foreign_cores]


def test_a_quiet_run_counts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs(monkeypatch, 0.1, 0.0) == [0.1, 0.1]


def test_a_disturbed_run_is_repeated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs(monkeypatch, 0.9, 0.05) == [0.9, 0.05, 0.05]
    assert "(others used 0.9 cores)" in capsys.readouterr().err


def test_on_a_busy_machine_the_least_disturbed_run_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs(monkeypatch, 0.9, 0.5, 0.7, 0.6) == [0.9, 0.5, 0.7, 0.6, 0.5]
