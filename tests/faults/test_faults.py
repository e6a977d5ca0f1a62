"""Faults of disk, memory, rights and clock at a few places each; ``make faults`` tries every place."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from tests.artifacts import snapshot
from tests.faults.everything import READERS
from tests.faults.forks import Forks
from tests.faults.inject import Fault
from tests.faults.scenarios import EXPORTS, FULL, KILLED, ONNX, PTE, UNREADABLE, Bench, differences, wrong_end

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks /proc what a descriptor is of")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"), forks)


@pytest.fixture(autouse=True)
def _executorch(request: pytest.FixtureRequest) -> None:
    if "executorch" in request.node.name:
        pytest.importorskip("executorch")


def places(chances: int, turn: int) -> list[int]:
    """One in the first two thirds or in the last, where a commit is; another at each turn."""
    return [chances * (5 * (turn % 3) + turn % 5) // 15]


@pytest.mark.parametrize("kind", [FULL, UNREADABLE, KILLED])
@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_that_fails_anywhere_loses_nothing_and_goes_on(bench: Bench, name: str, kind: str) -> None:
    chances = bench.chances(name, kind)
    assert chances > 40
    turn = list(EXPORTS).index(name) + 2 * [FULL, UNREADABLE, KILLED].index(kind)
    found = [one for at in places(chances, turn) for one in bench.disturbed(name, Fault(kind=kind, at=at))]
    assert found == []


@pytest.mark.parametrize("megabytes", [1, 16])
def test_an_export_with_too_little_memory_loses_nothing(bench: Bench, megabytes: int) -> None:
    assert bench.disturbed("onnx, added", Fault(kind="memory", at=megabytes)) == []


def test_a_clock_that_jumps_changes_nothing(bench: Bench) -> None:
    assert bench.disturbed("onnx, added", Fault(kind="clock")) == []


def test_a_killed_export_goes_on_under_another_clock(bench: Bench) -> None:
    chances = bench.chances("onnx", KILLED)
    with bench.place() as place:
        assert bench.export(place, ONNX, Fault(kind=KILLED, at=chances // 2)).code == -9
        done = bench.export(place, ONNX, Fault(kind="clock"))
        assert (done.code, wrong_end(done, Fault(kind="clock"))) == (0, [])
        assert differences(snapshot(place.out), bench.left_by(ONNX)) == []


@pytest.mark.parametrize("where", ["read-only", "a file", "no home"])
@pytest.mark.parametrize("command", [ONNX, PTE], ids=["onnx", "executorch"])
def test_a_cache_that_cannot_be_written_is_done_without(bench: Bench, command: tuple[str, ...], where: str) -> None:
    expected = bench.left_by(command)
    with bench.place() as place:
        cache = place.root / "cache"
        if where == "a file":
            cache.write_text("")
        if where == "no home":
            # What the system's own list says is then the home: nothing is to be written there by a test.
            place.environment |= {"HOME": None, "XDG_CACHE_HOME": None}
            cache = Path(pwd.getpwuid(place.root.stat().st_uid).pw_dir)
        done = bench.export(place, command, Fault(kind="read-only", place=str(cache)))
        assert wrong_end(done, Fault(kind="read-only")) == []
        assert differences(snapshot(place.out), expected) == []
        print(where, done.count, "changes refused")


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader[0])
def test_a_reader_that_cannot_read_says_what(bench: Bench, reader: tuple[str, ...]) -> None:
    undisturbed, found = bench.unreadable(reader, None)
    assert undisturbed.code == 0
    for at in places(undisturbed.count, 1):
        found += bench.unreadable(reader, at)[1]
    assert found == []


def test_faults_strike_where_they_should_and_are_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: an export that says another code than it should, and one that leaves other bytes."""
    fault = Fault(kind=FULL, at=bench.chances("onnx", FULL) // 2)
    monkeypatch.setitem(bench._known, (ONNX,), {**bench.left_by(ONNX), "README.md": b"another"})
    (finding,) = bench.disturbed("onnx", fault)
    assert "the same command again left ['README.md']" in finding
    monkeypatch.undo()
    with bench.place() as place:
        assert "exit code 3" in wrong_end(bench.export(place, ONNX, fault), Fault(kind="clock"))[0]
