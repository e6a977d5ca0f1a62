"""Building the operator library: what is remembered, and what happens where it cannot be built."""

from __future__ import annotations

import logging
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
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


# In place of CMake: configuring is quick; building takes until there is the file `go`, and leaves half an object first.
SLOW_CMAKE = """
for last; do :; done
[ "$1" = --build ] || exit 0
echo "begin $2" >> "$TALE"
echo half > "$2/half.o"
(
  until [ -e "$GO" ]; do sleep 0.05; done
  echo "lib$4" > "$2/lib$4.so"
  echo "end $2" >> "$TALE"
) &  # as CMake has compilers of its own
wait
"""
ASK = """
from lfm2_export import interrupts
from lfm2_export.kernels import build
with interrupts.raising():
    print(build.{}())
"""


class Builders:
    """Processes that ask for a library in a cache of their own, with a CMake that waits to be let go."""

    def __init__(self, folder: Path):
        cmake, compiler = script(folder / "bin" / "cmake", SLOW_CMAKE), script(folder / "bin" / "c++", "echo 1.0")
        self.cache, self.tale, self.go = folder / "cache", folder / "tale", folder / "go"
        self._environment = os.environ | {
            "PATH": f"{cmake.parent}:{os.environ['PATH']}",
            "CXX": str(compiler),
            "XDG_CACHE_HOME": str(self.cache),
            "TALE": str(self.tale),
            "GO": str(self.go),
        }

    def start(self, function: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", ASK.format(function)]
        return subprocess.Popen(command, env=self._environment, stdout=subprocess.PIPE, text=True)

    def wait_for_a_build(self) -> None:
        until(self.tale.exists)

    def told(self) -> list[list[str]]:
        return [line.split() for line in self.tale.read_text().splitlines()]


def until(true: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_of_two_processes_that_want_the_same_one_builds_and_the_other_waits(tmp_path: Path):
    builders = Builders(tmp_path)
    both = [builders.start("onnx_library_path") for _ in range(2)]
    builders.wait_for_a_build()
    time.sleep(0.5)  # for the second to come as far
    assert [one.poll() for one in both] == [None, None]
    builders.go.touch()
    first, second = (one.communicate(timeout=60)[0] for one in both)
    assert first == second
    assert Path(first.strip()).read_text() == "liblfm2_onnx\n"
    assert [line[0] for line in builders.told()] == ["begin", "end"]


def test_two_processes_that_want_different_ones_build_one_after_the_other_in_one_folder(tmp_path: Path):
    builders = Builders(tmp_path)
    both = [builders.start(function) for function in ("onnx_library_path", "library_path")]
    builders.wait_for_a_build()
    builders.go.touch()
    made = {Path(one.communicate(timeout=60)[0].strip()).name for one in both}
    assert made == {build.ONNX_LIBRARY, build.LIBRARY}
    assert [line[0] for line in builders.told()] == ["begin", "end", "begin", "end"]
    assert len({folder for _, folder in builders.told()}) == 1


def test_what_a_killed_build_left_is_not_used(tmp_path: Path):
    builders = Builders(tmp_path)
    killed = builders.start("onnx_library_path")
    builders.wait_for_a_build()
    killed.kill()
    killed.wait()
    assert len(list(builders.cache.rglob("half.o"))) == 1
    again = builders.start("onnx_library_path")
    until(lambda: len(builders.told()) == 2)
    builders.go.touch()
    assert Path(again.communicate(timeout=60)[0].strip()).read_text() == "liblfm2_onnx\n"
    folders = [Path(folder) for word, folder in builders.told() if word == "begin"]
    assert folders[0] != folders[1]
    assert [folder.exists() for folder in folders] == [False, True]
    assert [found.parent for found in builders.cache.rglob("half.o")] == [folders[1]]


def test_an_interruption_ends_the_compilers_and_leaves_no_objects(tmp_path: Path):
    builders = Builders(tmp_path)
    interrupted = builders.start("onnx_library_path")
    builders.wait_for_a_build()
    interrupted.terminate()
    assert interrupted.wait(timeout=60) == 128 + signal.SIGTERM
    builders.go.touch()  # a compiler that is still there would end by itself, and say so
    time.sleep(0.3)
    assert [line[0] for line in builders.told()] == ["begin"]
    assert [found.name for found in builders.cache.rglob("*") if found.is_file()] == ["liblfm2_onnx.so.log"]


# Before the compiler: notes each source of ours, and has it compile (next to) nothing in its place.
NOTING = """
for last; do :; done
case "$last" in
  */runner/main.cpp) stub=MAIN;;
  */kernels/src/*|*/kernels/runner/*) stub=NOTHING;;
  *) exec "$@";;
esac
echo "$*" >> NOTES
count=$#; at=0
for argument in "$@"; do
  at=$((at + 1)); [ $at = $count ] && argument=$stub
  set -- "$@" "$argument"
done
shift $count
exec "$@"
"""


def test_what_was_compiled_for_one_is_not_compiled_again_for_another(empty_cache: Path, tmp_path: Path, monkeypatch):
    notes, nothing, program = (tmp_path / name for name in ("notes", "nothing.cpp", "main.cpp"))
    nothing.write_text("")
    program.write_text("int main() {}")
    text = NOTING.replace("MAIN", str(program)).replace("NOTHING", str(nothing)).replace("NOTES", str(notes))
    monkeypatch.setenv("CMAKE_CXX_COMPILER_LAUNCHER", str(script(tmp_path / "noting", text)))

    def compiled(make: Callable[[], Path | None]) -> list[str]:
        notes.write_text("")
        assert make() is not None
        return sorted(Path(line.split()[-1]).name for line in notes.read_text().splitlines())

    first = compiled(build.onnx_library_path)
    print(f"{len(first)} for ONNX Runtime")
    assert len(first) > 20
    assert {"dispatch.cpp", "onnxruntime_ops.cpp"} <= set(first)
    assert compiled(build.library_path) == ["executorch_op.cpp"]
    assert compiled(build.runner_path) == ["llama_ops.cpp", "main.cpp"]
    monkeypatch.setattr(build.importlib.metadata, "version", lambda name: "9.9")  # another wheel: its headers differ
    assert compiled(build.library_path) == ["executorch_op.cpp"]


def test_compiling_says_so_with_the_time(tmp_path: Path, empty_cache: Path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", f"{script(tmp_path / 'bin' / 'cmake', SLOW_CMAKE).parent}:{os.environ['PATH']}")
    for name in ("TALE", "GO"):
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "GO").touch()
    with caplog.at_level(logging.INFO):
        assert build.onnx_library_path() == build.onnx_library_path()
    said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith("compiling liblfm2_onnx.so, once, for one to three minutes; or use ")
    assert len(said) == 2
    assert re.fullmatch(r"compiled liblfm2_onnx\.so in \d+ s", said[1])
