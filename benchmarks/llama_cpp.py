"""llama.cpp as a rival: builds its ``llama-bench``, its server and the tools that quantize, and runs them.

In: a version of llama-cpp-python, whose source distribution on the package index contains llama.cpp. Out: a
``LlamaBench``, a ``LlamaServer`` or ``LlamaTools``, kept in the user's cache folder by version, compiler and flags, so
that each is built once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import Run
from benchmarks.processes import BenchmarkError, Watched, watch
from benchmarks.toolchain import Compiler, find_cmake
from lfm2_export.hashing import cache_folder

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
_BINARY, _RECORD = "llama-bench", "build.json"
_TOOLS = ("llama-quantize", "llama-imatrix")
_SERVER = "llama-server"
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)
# Behind the others, of which it replaces one; a page that it would fetch has no part in a measurement.
_SERVER_OPTIONS = ("-DLLAMA_BUILD_SERVER=ON", "-DLLAMA_USE_PREBUILT_UI=OFF")


@dataclass(frozen=True, kw_only=True)
class LlamaBench:
    """A built ``llama-bench`` and what it was built with."""

    path: Path
    package: str
    compiler: str
    flags: tuple[str, ...]

    def run(self, model: Path, *, prompt: int, new: int, threads: int, launcher: Sequence[str] = ()) -> Run:
        """One process: load, a warm-up of each test, one timed prefill, one timed decode from an empty context.

        Raises:
            BenchmarkError: it failed, or its output is not what this file knows.
        """
        command = [str(self.path), "-m", str(model), "-p", str(prompt), "-n", str(new), "-t", str(threads)]
        command += ["-r", "1", "-o", "json", "--progress"]
        return parse(watch(command, purpose=_BINARY, launcher=launcher))


def parse(watched: Watched) -> Run:
    """llama-bench's JSON and progress lines as a ``Run``.

    ``load_s``: from the line before it loads to the line after which it computes; it does not time this itself.

    Raises:
        BenchmarkError: the output has other fields or lines.
    """
    try:
        tests = json.loads(watched.stdout)
        prefill = next(test for test in tests if test["n_prompt"] and not test["n_gen"])
        decode = next(test for test in tests if test["n_gen"] and not test["n_prompt"])
        begin = next(seconds for seconds, line in watched.stderr if line.endswith(": starting"))
        ready = next(seconds for seconds, line in watched.stderr if line.endswith("warmup prompt run"))
        prefill_tps, decode_tps, commit = prefill["avg_ts"], decode["avg_ts"], prefill["build_commit"]
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise BenchmarkError(
            f"{_BINARY}: its output is not as expected ({type(error).__name__}: {error}); use {PACKAGE} {VERSION}"
        ) from error
    return Run(
        load_s=ready - begin,
        resident_bytes=watched.peak_bytes,
        prefill_tps=float(prefill_tps),
        decode_tps=float(decode_tps),
        foreign_cores=watched.foreign_cores,
        version=str(commit),
    )


def get_llama_bench(compiler: Compiler, version: str = VERSION) -> LlamaBench:
    """The cached program, or a new one: some minutes on two cores.

    Raises:
        BenchmarkError: the index, cmake or the compiler is missing or fails.
    """
    built = LlamaBench(
        path=_cached(compiler, version) / _BINARY,
        package=f"{PACKAGE} {version}",
        compiler=compiler.name,
        flags=compiler.flags,
    )
    if not built.path.is_file():
        _build(built.path.parent, [_BINARY], find_cmake(), compiler, version)
    return built


@dataclass(frozen=True, kw_only=True)
class LlamaTools:
    """``llama-quantize`` and ``llama-imatrix`` in one folder."""

    folder: Path

    def quantize(self, source: Path, target: Path, type: str, importance: Path | None = None) -> Path:
        """Writes ``target``: ``source`` as ``llama-quantize`` stores it under a type such as Q4_K_M, with an importance
        matrix where one is given.

        Raises:
            BenchmarkError: it fails; the message is its last line about an error.
        """
        weighted = [] if importance is None else ["--imatrix", str(importance)]
        command = [str(self.folder / _TOOLS[0]), *weighted, str(source), str(target), type, "1"]
        _run(command, f"quantizing {source.name} to {type}")
        return target

    def importance(self, source: Path, target: Path, text: Path, *, chunks: int) -> Path:
        """Writes ``target``: what ``llama-imatrix`` measures of ``source`` on the first chunks, of 512 tokens, of a
        text.

        Raises:
            BenchmarkError: as ``quantize``.
        """
        command = [str(self.folder / _TOOLS[1]), "-m", str(source), "-f", str(text), "-o", str(target)]
        _run([*command, "-c", "512", "--chunks", str(chunks), "-t", "1"], f"measuring {source.name} on {text.name}")
        if not target.is_file():
            raise BenchmarkError(f"{_TOOLS[1]} wrote nothing for {source.name}; {PACKAGE} {VERSION} is known to")
        return target


def get_llama_tools(compiler: Compiler, version: str = VERSION) -> LlamaTools:
    """The cached programs, or new ones, as ``get_llama_bench``.

    Raises:
        BenchmarkError: the index, cmake or the compiler is missing or fails.
    """
    folder = _cached(compiler, version, *_TOOLS)
    if not all((folder / program).is_file() for program in _TOOLS):
        _build(folder, _TOOLS, find_cmake(), compiler, version)
    return LlamaTools(folder=folder)


@dataclass(frozen=True, kw_only=True)
class LlamaServer:
    """A built ``llama-server``."""

    path: Path
    package: str

    def command(self, model: Path, *, port: int, threads: int, parallel: int, context: int) -> list[str]:
        """What starts it: ``parallel`` requests at once, each of ``context`` tokens."""
        command = [str(self.path), "-m", str(model), "--host", "127.0.0.1", "--port", str(port)]
        command += ["-t", str(threads), "-tb", str(threads), "-np", str(parallel), "-c", str(parallel * context)]
        return [*command, "--offline", "--no-ui"]


def get_llama_server(compiler: Compiler, version: str = VERSION) -> LlamaServer:
    """The cached program, or a new one, as ``get_llama_bench``: a quarter of an hour on two cores.

    Raises:
        BenchmarkError: the index, cmake or the compiler is missing or fails.
    """
    built = LlamaServer(path=_cached(compiler, version, _SERVER) / _SERVER, package=f"{PACKAGE} {version}")
    if not built.path.is_file():
        _build(built.path.parent, [_SERVER], find_cmake(), compiler, version, _SERVER_OPTIONS)
    return built


def _cached(compiler: Compiler, version: str, *programs: str) -> Path:
    key = json.dumps([version, compiler.name, compiler.cxx, compiler.flags, _OPTIONS, *programs])
    return cache_folder() / "llama.cpp" / f"{version}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _build(
    target: Path,
    programs: Sequence[str],
    cmake: str,
    compiler: Compiler,
    version: str,
    options: Sequence[str] = (),
) -> None:
    package = f"{PACKAGE} {version}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="building-") as name:
        scratch = Path(name)
        source = unpack(download(scratch / "download", version), scratch / "source")
        flags = " ".join(compiler.flags)
        languages = {"C": compiler.c, "CXX": compiler.cxx}
        chosen = [f"-DCMAKE_{language}_COMPILER={one}" for language, one in languages.items()]
        chosen += [f"-DCMAKE_{language}_FLAGS={flags}" for language in languages]
        _run(
            [cmake, "-S", str(source), "-B", str(scratch / "build"), *_OPTIONS, *options, *chosen],
            "configuring llama.cpp",
        )
        jobs = str(os.cpu_count() or 1)
        _run(
            [cmake, "--build", str(scratch / "build"), "--target", *programs, "--config", "Release", "-j", jobs],
            "building llama.cpp",
        )
        ready = scratch / "ready"
        ready.mkdir()
        for program in programs:
            made = next((p for p in (scratch / "build").rglob(program) if p.is_file()), None)
            if made is None:
                raise BenchmarkError(f"building llama.cpp left no {program}; {PACKAGE} {VERSION} is known to")
            shutil.copy(made, ready / program)
        record: dict[str, Any] = {"package": package, "compiler": compiler.name, "flags": compiler.flags}
        (ready / _RECORD).write_text(json.dumps(record, indent=1) + "\n")
        with contextlib.suppress(OSError):  # another process was faster
            ready.rename(target)


def download(folder: Path, version: str) -> Path:
    """The source distribution, by pip, from whatever index pip is set up for.

    Raises:
        BenchmarkError: no index, or no such version on it.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run([*command, "--no-binary", PACKAGE, "--dest", str(folder), f"{PACKAGE}=={version}"], f"downloading {PACKAGE}")
    archives = list(folder.glob("*.tar.gz"))
    if len(archives) != 1:
        raise BenchmarkError(f"pip left {len(archives)} source distributions of {PACKAGE} {version}, 1 was expected")
    return archives[0]


def unpack(archive: Path, folder: Path) -> Path:
    """Extracts llama.cpp's sources; returns their folder.

    Raises:
        BenchmarkError: the archive is damaged, would write outside ``folder``, or holds no llama.cpp.
    """
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise BenchmarkError(f"{archive.name} cannot be unpacked: {error}; delete it and try again") from error
    found = next(folder.glob("*/vendor/llama.cpp/CMakeLists.txt"), None)
    if found is None:
        raise BenchmarkError(f"{archive.name} holds no vendor/llama.cpp; use {PACKAGE} {VERSION}")
    return found.parent


def _run(command: Sequence[str], purpose: str) -> None:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise BenchmarkError(f"{purpose}: {command[0]} cannot be started: {error}") from error
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        raise BenchmarkError(f"{purpose} failed: {(errors or lines or ['it said nothing'])[-1][:300]}")
