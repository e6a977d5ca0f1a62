"""What is kept of what was typed, and for whom."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from lfm2_export.terminal.history import TypedHistory, default_path


def test_lines_come_back_oldest_first_and_are_their_owners(tmp_path: Path) -> None:
    path = tmp_path / "state" / "chat_history"
    for text in ("one", "two\nlines", "größer\udcff"):
        TypedHistory(path).add(text)
    assert TypedHistory(path).read() == ["one", "two\nlines", "größer\udcff"]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(path.parent).st_mode) == 0o700
    os.chmod(path, 0o644)
    TypedHistory(path).add("four")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_long_history_loses_its_oldest_lines(tmp_path: Path) -> None:
    path = tmp_path / "chat_history"
    path.write_text("".join(f'"{number:09}"\n' for number in range(100_000)), encoding="utf-8")
    lines = TypedHistory(path).read()
    assert lines[-1] == "000099999"
    assert 40_000 < len(lines) < 50_000
    assert path.stat().st_size <= 1 << 19


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "chat_history"
    path.write_bytes(b'"one"\n{"a": 1}\n\xff\xfe\n"unfinished\n[[[[\n"two"\n')
    assert TypedHistory(path).read() == ["one", "two"]


def test_without_a_place_nothing_is_kept_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = TypedHistory(None)
    nothing.add("a")
    assert nothing.read() == []
    (tmp_path / "file").write_bytes(b"")
    history = TypedHistory(tmp_path / "file" / "chat_history")
    history.add("a")
    history.add("b")
    assert capsys.readouterr().err.count("what is typed is not kept") == 1
    (tmp_path / "link").symlink_to(tmp_path / "file")
    TypedHistory(tmp_path / "link").add("a")
    assert (tmp_path / "file").read_bytes() == b""


def test_the_place_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "lfm2-export" / "chat_history"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".local" / "state" / "lfm2-export" / "chat_history"
