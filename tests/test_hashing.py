"""Hashing, and when a remembered digest may stand for a file."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from lfm2_export import hashing
from lfm2_export.errors import ResourceError
from lfm2_export.hashing import sha256_files


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were really read, in order; the cache folder is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seen: list[Path] = []
    real = hashing.sha256_file

    def spy(path: Path) -> str:
        seen.append(path)
        return real(path)

    monkeypatch.setattr(hashing, "sha256_file", spy)
    return seen


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files written just now count as written long ago."""
    now = time.time_ns
    monkeypatch.setattr(hashing.time, "time_ns", lambda: now() + 3_000_000_000)


def test_a_settled_file_is_read_once(tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
    first = sha256_files(paths, remembered=True)
    assert first == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert sha256_files(paths, remembered=True) == first
    assert sorted(reads) == paths


def test_a_file_that_was_just_written_is_read_again(tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "fresh"
    path.write_bytes(b"1")
    sha256_files([path], remembered=True)
    sha256_files([path], remembered=True)
    assert reads == [path, path]


def test_a_change_is_seen_even_with_the_old_time_and_size(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    path = tmp_path / "file"
    path.write_bytes(b"before")
    status = path.stat()
    before = sha256_files([path], remembered=True)
    time.sleep(0.02)
    path.write_bytes(b"behind")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert sha256_files([path], remembered=True) != before


def test_damaged_memory_or_none_costs_time_only(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    path = tmp_path / "file"
    path.write_bytes(b"1")
    expected = sha256_files([path], remembered=True)
    for record in (tmp_path / "cache" / "lfm2-export" / "sha256").iterdir():
        record.write_text("[")
    assert sha256_files([path], remembered=True) == expected
    (tmp_path / "file-as-cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file-as-cache"))
    assert sha256_files([path], remembered=True) == expected
    assert len(reads) == 3


def test_a_user_without_a_home_costs_time_only(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(hashing.Path, "home", no_home)
    (tmp_path / "file").write_bytes(b"1")
    expected = {tmp_path / "file": hashlib.sha256(b"1").hexdigest()}
    assert sha256_files([tmp_path / "file"], remembered=True) == expected
    assert sha256_files([tmp_path / "file"], remembered=True) == expected
    assert len(reads) == 2
    with pytest.raises(ResourceError, match=r"Could not determine home directory\.; set XDG_CACHE_HOME to a folder"):
        hashing.cache_folder()


def test_without_memory_nothing_is_written(tmp_path: Path, reads: list[Path]) -> None:
    (tmp_path / "file").write_bytes(b"1")
    sha256_files([tmp_path / "file"])
    assert not (tmp_path / "cache").exists()
