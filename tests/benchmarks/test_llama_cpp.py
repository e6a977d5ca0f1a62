"""Reading llama-bench's output, unpacking untrusted archives, and refusals in one line; nothing is built here."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks import llama_cpp, toolchain
from benchmarks.processes import BenchmarkError, Watched
from benchmarks.toolchain import Compiler, compiler_name

GCC = """g++ (Debian 12.2.0-14+deb12u1) 12.2.0
Copyright (C) 2022 Free Software Foundation, Inc.
"""
PROGRESS = (
    (0.25, "llama-bench: benchmark 1/2: starting"),
    (1.75, "llama-bench: benchmark 1/2: warmup prompt run"),
    (2.0, "llama-bench: benchmark 1/2: prompt run 1/1"),
    (3.0, "llama-bench: benchmark 2/2: starting"),
)
TESTS = [
    {"n_prompt": 512, "n_gen": 0, "avg_ts": 440.5, "build_commit": "0c1e570"},
    {"n_prompt": 0, "n_gen": 128, "avg_ts": 80.25, "build_commit": "0c1e570"},
]


def watched(tests: object = TESTS, progress: tuple[tuple[float, str], ...] = PROGRESS) -> Watched:
    return Watched(stdout=json.dumps(tests), stderr=progress, peak_bytes=123)


def test_parse_takes_rates_load_time_memory_and_commit() -> None:
    run = llama_cpp.parse(watched())
    assert (run.prefill_tps, run.decode_tps, run.load_s) == (440.5, 80.25, 1.5)
    assert (run.resident_bytes, run.version) == (123, "0c1e570")


@pytest.mark.parametrize("tests", [[], {}, TESTS[:1], [{"n_prompt": 512}], 5])
def test_parse_refuses_other_json(tests: object) -> None:
    with pytest.raises(BenchmarkError, match=r"output is not as expected .*; use llama-cpp-python 0\."):
        llama_cpp.parse(watched(tests))


def test_parse_refuses_output_without_progress() -> None:
    with pytest.raises(BenchmarkError, match="StopIteration"):
        llama_cpp.parse(watched(progress=()))


def archive(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"ok"))
    return path


def test_unpack_finds_the_sources(tmp_path: Path) -> None:
    packed = archive(tmp_path / "a.tar.gz", "llama_cpp_python-1/vendor/llama.cpp/CMakeLists.txt")
    assert llama_cpp.unpack(packed, tmp_path / "out") == tmp_path / "out/llama_cpp_python-1/vendor/llama.cpp"


@pytest.mark.parametrize("name", ["../outside.txt", "a/../../outside.txt"])
def test_unpack_refuses_names_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(BenchmarkError, match=r"a\.tar\.gz cannot be unpacked: .*outside"):
        llama_cpp.unpack(archive(tmp_path / "a.tar.gz", name), tmp_path / "out")
    assert not (tmp_path / "outside.txt").exists()


def test_unpack_refuses_links_that_leave_the_folder(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(BenchmarkError, match="cannot be unpacked"):
        llama_cpp.unpack(tmp_path / "a.tar", tmp_path / "out")


def test_unpack_refuses_a_damaged_archive_and_one_without_llama_cpp(tmp_path: Path) -> None:
    packed = archive(tmp_path / "a.tar.gz", "llama_cpp_python-1/README.md")
    with pytest.raises(BenchmarkError, match=r"holds no vendor/llama\.cpp"):
        llama_cpp.unpack(packed, tmp_path / "one")
    packed.write_bytes(packed.read_bytes()[:20])
    with pytest.raises(BenchmarkError, match="delete it and try again"):
        llama_cpp.unpack(packed, tmp_path / "two")


def test_compiler_names_and_the_flags_that_old_gcc_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler_name(GCC, "g++") == "gcc 12.2.0"
    assert compiler_name("Debian clang version 19.1.7 (3)\nTarget: x86_64\n", "clang++") == "clang 19.1.7"
    assert compiler_name("g++ (Ubuntu 13.3.0-6) 13.3.0\nFree Software Foundation", "g++") == "gcc 13.3.0"
    for machine, name, count in (
        ("x86_64", "gcc 12.2.0", 3),
        ("x86_64", "gcc 13.3.0", 0),
        ("aarch64", "gcc 12.2.0", 0),
    ):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert len(Compiler(c="cc", cxx="c++", name=name).flags) == count
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert Compiler(c="cc", cxx="c++", name="clang 11.0").flags == ()


def test_no_compiler_and_no_cmake_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(BenchmarkError, match=r"no C\+\+ compiler .* install g\+\+ or clang"):
        toolchain.find_compiler()
    with pytest.raises(BenchmarkError, match=r"cmake was not found.*pip install cmake"):
        toolchain.find_cmake()


def test_an_index_that_does_not_answer_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "empty").as_uri())
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(BenchmarkError, match="downloading llama-cpp-python failed: ERROR: No matching") as caught:
        llama_cpp.download(tmp_path / "to", "0.3.36")
    assert "\n" not in str(caught.value)


def test_a_cached_build_is_taken_without_cmake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(llama_cpp, "find_cmake", lambda: pytest.fail("nothing is to be built"))
    compiler = Compiler(c="cc", cxx="c++", name="gcc 14.1.0")
    folder = llama_cpp._cached(compiler, "0.1")
    folder.mkdir(parents=True)
    (folder / "llama-bench").write_text("")
    assert llama_cpp.get_llama_bench(compiler, "0.1").path == folder / "llama-bench"
    other = Compiler(c="cc", cxx="c++", name="gcc 14.2.0")
    assert llama_cpp._cached(other, "0.1") != folder != llama_cpp._cached(compiler, "0.2")


def test_a_failed_build_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(llama_cpp, "find_cmake", lambda: sys.executable)

    def sources(folder: Path, version: str) -> Path:
        folder.mkdir()
        return archive(folder / "a.tar.gz", "llama_cpp_python-1/vendor/llama.cpp/CMakeLists.txt")

    monkeypatch.setattr(llama_cpp, "download", sources)
    with pytest.raises(BenchmarkError, match=r"configuring llama\.cpp failed: "):
        llama_cpp.get_llama_bench(Compiler(c="cc", cxx="c++", name="gcc 14.1.0"), "0.1")
    assert list((tmp_path / "lfm2-export/llama.cpp").iterdir()) == []


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_the_tools_are_given_the_files_and_the_matrix(tmp_path: Path) -> None:
    program(tmp_path, "llama-quantize", f'echo "$@" > {tmp_path}/asked')
    program(tmp_path, "llama-imatrix", f'echo "$@" > {tmp_path}/asked; touch {tmp_path}/matrix')
    tools = llama_cpp.LlamaTools(folder=tmp_path)
    source, target, text = tmp_path / "source.gguf", tmp_path / "target.gguf", tmp_path / "text"
    matrix = tools.importance(source, tmp_path / "matrix", text, chunks=40)
    expected = f"-m {source} -f {text} -o {matrix} -c 512 --chunks 40 -t 1"
    assert (tmp_path / "asked").read_text().strip() == expected
    assert tools.quantize(source, target, "Q4_K_M", matrix) == target
    assert (tmp_path / "asked").read_text().strip() == f"--imatrix {matrix} {source} {target} Q4_K_M 1"
    tools.quantize(source, target, "Q4_0")
    assert (tmp_path / "asked").read_text().strip() == f"{source} {target} Q4_0 1"


def test_tools_that_fail_or_write_nothing_are_named(tmp_path: Path) -> None:
    program(tmp_path, "llama-quantize", "echo 'error: no such type'; exit 1")
    program(tmp_path, "llama-imatrix", "true")
    tools = llama_cpp.LlamaTools(folder=tmp_path)
    with pytest.raises(BenchmarkError, match=r"quantizing a\.gguf to X failed: error: no such type"):
        tools.quantize(Path("a.gguf"), Path("b.gguf"), "X")
    with pytest.raises(BenchmarkError, match=r"llama-imatrix wrote nothing for a\.gguf"):
        tools.importance(Path("a.gguf"), tmp_path / "none", Path("text"), chunks=1)
