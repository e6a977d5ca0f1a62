"""Ledgers: a line is there only for bytes that are on the disk, and nothing that is damaged is believed."""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lfm2_export import ledger
from lfm2_export.ledger import Figures, Ledger, discard_unlisted

SIZES = {"a/data": 1000, "a/data_1": 10}
STEPS: list[Figures] = [{"x": 0.1, "y": 1 / 3}, {"x": math.inf, "y": 5e-324}, {"x": 1e300, "y": -0.0}]


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "SYNC_SECONDS", 0.01)


def open_ledger(folder: Path, key: str = "key", sizes: dict[str, int] = SIZES) -> Ledger:
    (folder / "files" / "a").mkdir(parents=True, exist_ok=True)
    return Ledger(folder / "made.ledger", root=folder / "files", sizes=sizes, key=key)


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)


def fill(folder: Path, count: int = len(STEPS)) -> None:
    """So many more steps, all of them in the ledger."""
    with open_ledger(folder) as opened:
        (folder / "files" / "a" / "data").write_bytes(b"x" * 1000)
        for figures in STEPS[:count]:
            opened.add(figures)
        expected = len(opened.done) + count
        wait_for(lambda: len(open_ledger(folder).done) == expected)


def test_the_files_are_made_at_their_size_and_figures_come_back_bit_by_bit(tmp_path: Path) -> None:
    assert open_ledger(tmp_path).done == ()
    assert list((tmp_path / "files" / "a").iterdir()) == [], "reading changes nothing"
    fill(tmp_path, 2)
    fill(tmp_path, 1)
    assert (tmp_path / "files/a/data_1").read_bytes() == bytes(10)
    done = open_ledger(tmp_path).done
    assert [repr(figures) for figures in done] == [repr(figures) for figures in (*STEPS[:2], STEPS[0])]
    with open_ledger(tmp_path):
        assert (tmp_path / "files/a/data").read_bytes() == b"x" * 1000, "what is done stays"


def test_the_last_lines_need_no_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "SYNC_SECONDS", 1000)
    with open_ledger(tmp_path) as opened:
        opened.add(STEPS[0])
    wait_for(lambda: len(open_ledger(tmp_path).done) == 1)


def test_a_line_follows_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = [], ledger._sync

    def sync(file: int) -> None:
        if added:
            seen.append(len(open_ledger(tmp_path).done))
        real(file)

    added = False
    monkeypatch.setattr(ledger, "_sync", sync)
    with open_ledger(tmp_path) as opened:
        added = True
        opened.add(STEPS[0])
        wait_for(lambda: len(seen) == 3)
    assert seen == [0, 0, 1], "both data files, then the line, then the ledger itself"


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda data: data[:-1], 2),  # a line without its end
        (lambda data: data[:-20], 2),
        (lambda data: data + b'{"x": 0.', 3),
        (lambda data: data + bytes(100), 3),  # what a power cut may leave of an append
        (lambda data: data + bytes(100) + b"\n" + data.splitlines(keepends=True)[-1], 3),
        (lambda data: data.replace(b"Infinity", b"In\x00\x00nity"), 1),
        (lambda data: data.replace(b'{"x": Infinity', b'3\n{"x": Infinity'), 1),
        (lambda data: data[:30], 0),
        (lambda data: b"", 0),
        (lambda data: b"\n" + data, 0),
        (lambda data: data.replace(b"1000", b"1001"), 0),
    ],
)
def test_nothing_after_damage_is_believed(tmp_path: Path, damage: Callable[[bytes], bytes], left: int) -> None:
    fill(tmp_path)
    path = tmp_path / "made.ledger"
    path.write_bytes(damage(path.read_bytes()))
    assert open_ledger(tmp_path).done == tuple(STEPS[:left])
    fill(tmp_path, 1)
    assert open_ledger(tmp_path).done == (*STEPS[:left], STEPS[0]), "further lines are whole"


def test_another_key_or_file_starts_anew(tmp_path: Path) -> None:
    fill(tmp_path)
    assert open_ledger(tmp_path, key="other").done == ()
    assert open_ledger(tmp_path, sizes={**SIZES, "a/data": 999}).done == ()
    (tmp_path / "files/a/data_1").write_bytes(b"")
    assert open_ledger(tmp_path).done == ()
    with open_ledger(tmp_path, key="other", sizes={"a/data": 5}):
        assert (tmp_path / "files/a/data").read_bytes() == bytes(5)
        assert not (tmp_path / "files/a/data_1").exists(), "nobody asks for it any more"


def test_a_disk_that_fails_later_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with open_ledger(tmp_path) as opened:
        monkeypatch.setattr(ledger, "_sync", fail)
        opened.add(STEPS[0])
        wait_for(lambda: opened._error is not None)
        with pytest.raises(OSError, match=r"Input/output error: .*made\.ledger"):
            opened.add(STEPS[1])
    assert open_ledger(tmp_path).done == ()


def test_the_thread_of_an_abandoned_ledger_cannot_write_into_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, stuck, waiting = ledger._sync, [True], []

    def slow(file: int) -> None:
        waiting.append(file)
        wait_for(lambda: not stuck[0])
        real(file)

    opened = open_ledger(tmp_path)
    opened.__enter__()
    monkeypatch.setattr(ledger, "_sync", slow)
    opened.add(STEPS[2])
    wait_for(lambda: bool(waiting))
    opened.__exit__(OSError, OSError(), None)
    monkeypatch.setattr(ledger, "_sync", real)
    fill(tmp_path, 2)
    stuck[0] = False
    time.sleep(0.1)
    assert open_ledger(tmp_path).done == tuple(STEPS[:2])


def test_without_a_place_there_is_no_ledger(tmp_path: Path) -> None:
    with Ledger(None, root=tmp_path, sizes={"data": 7}, key="") as opened:
        opened.add(STEPS[0])
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert (tmp_path / "data").read_bytes() == bytes(7)
    assert opened.done == ()


def test_files_that_no_ledger_speaks_of_are_removed(tmp_path: Path) -> None:
    fill(tmp_path)
    ledgers = tmp_path / "ledgers"
    ledgers.mkdir()
    (tmp_path / "made.ledger").rename(ledgers / "made.ledger")
    (ledgers / "damaged.ledger").write_bytes(b'{"files": 3}\n')
    (ledgers / "note.json").write_text('["x"]')
    for name in ("config.json", "a/model.onnx", "b/c"):
        (tmp_path / "files" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_text("stale")
    discard_unlisted(tmp_path / "files", ledgers)
    assert sorted(path.name for path in (tmp_path / "files").rglob("*") if path.is_file()) == ["data", "data_1"]


def test_a_ledger_names_no_file_outside(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    open_ledger(tmp_path)
    (tmp_path / "made.ledger").write_text('{"key": "old", "files": {"../victim": 4, "/etc/passwd": 1}}\n')
    with open_ledger(tmp_path):
        assert (tmp_path / "victim").read_text() == "mine"
