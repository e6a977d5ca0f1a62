"""Building the operator library: what is remembered, and what happens where it cannot be built."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest

from lfm2_export.kernels import build


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and tools looked for anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.tools.cache_clear()
    yield tmp_path / "cache"
    build.tools.cache_clear()


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_library_is_built_once():
    first = build.library_path()
    assert first is not None
    built = first.stat().st_mtime_ns
    assert build.library_path() == first
    assert first.stat().st_mtime_ns == built
    assert [found.name for found in first.parent.iterdir() if found.suffix == ".log"] == []


def test_a_compiler_that_fails_leaves_its_output_in_the_file_that_is_named(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    broken = script(tmp_path / "tools" / "broken-c++", 'echo "cannot execute cc1plus" >&2; exit 1')
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(build.KernelBuildError, match=r"failed with exit code .* its output is in (\S+);") as raised:
        build.library_path()
    named = Path(str(raised.value).split("its output is in ")[1].split(";")[0])
    assert named.is_relative_to(empty_cache)
    assert "cannot execute cc1plus" in named.read_text()
    assert raised.value.exit_code == 3
    assert [found for found in named.parent.iterdir() if found != named] == []


def test_without_a_compiler_there_is_no_library_and_it_is_said_once(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert build.library_path() is None
        assert build.library_path() is None
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "no-such-compiler" in said[0]
    assert "--moe-op stock" in said[0]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "cache").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(build.KernelBuildError, match=r"cache/lfm2-export/kernels/.* set XDG_CACHE_HOME"):
        build.library_path()


def test_another_compiler_or_wheel_is_another_library(tmp_path: Path):
    tools = build.tools()
    assert tools is not None
    package = build.executorch_folder()
    keys = {
        build._key(package, tools.compiler),
        build._key(tmp_path, tools.compiler),
        build._key(package, str(script(tmp_path / "c++", 'echo "other 1.0"'))),
    }
    assert len(keys) == 3


def test_cmake_is_found_beside_python_when_it_is_not_on_the_path(empty_cache: Path, tmp_path: Path, monkeypatch):
    cmake = script(tmp_path / "scripts" / "cmake", "exit 0")
    compiler = script(tmp_path / "bin" / "c++", "exit 0")
    monkeypatch.setenv("PATH", str(compiler.parent))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(cmake.parent))
    assert build.tools() == (str(cmake), str(compiler))


def test_without_executorch_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.KernelBuildError, match=r"pip install 'lfm2-export\[executorch\]'"):
        build.library_path()


def test_two_processes_may_build_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each builds in a folder of its own and moves the whole file into place."""
    made: list[list[str]] = []

    def pretend(log: Path, command: list[str], mode: str, *, remedy: str) -> None:
        made.append(command)
        if "--build" in command:
            Path(command[command.index("--build") + 1], "target").write_text(str(len(made)))

    monkeypatch.setattr(build, "_run", pretend)
    for _ in range(2):
        built = build.build("target", tmp_path / "into", options={}, package=build.executorch_folder())
    assert built.read_text() == "4"
    assert os.listdir(tmp_path / "into") == ["target"]
