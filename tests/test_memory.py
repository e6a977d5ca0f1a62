"""Too little memory is said as such: exit code 3 and a line, whoever notices it."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lfm2_export import cli, memory
from lfm2_export.memory import address_space_left, ran_out
from tests.artifacts import write_artifact

CLI = (sys.executable, "-m", "lfm2_export.cli")


def _caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


SHORT: list[Exception] = [
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError(
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 9"
    ),
    RuntimeError("bad allocation"),
    RuntimeError("Failed to load method forward, error: 0x21:MemoryAllocationFailed"),
    RuntimeError("Failed to load method forward, error: 0x:21"),
    RuntimeError("can't start new thread"),
    ImportError("lib.so: failed to map segment from shared object"),
    ImportError("lib.so: failed to map segment from shared object: Cannot allocate memory"),
    _caused(ValueError("cannot be loaded"), MemoryError()),
]
NOT_SHORT: list[Exception] = [
    ValueError("std::bad_alloc is what this text speaks of"),
    OSError(errno.ENOSPC, "No space left on device"),
    ImportError("lib.so: cannot allocate memory in static TLS block"),
    ImportError("lib.so: failed to map segment from shared object: Operation not permitted"),
    RuntimeError("Protobuf parsing failed"),
    RuntimeError("Failed to load program, error: 0x:22"),
]


@pytest.mark.parametrize("error", SHORT, ids=str)
def test_shortness_of_memory_is_known_by_what_libraries_say(error: Exception) -> None:
    assert ran_out(error)


@pytest.mark.parametrize("error", NOT_SHORT, ids=str)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not ran_out(error)


def test_numpys_own_error_counts() -> None:
    with pytest.raises(MemoryError) as caught:
        np.empty(1 << 60, np.int8)
    assert ran_out(caught.value)


@pytest.mark.parametrize("error", SHORT, ids=str)
def test_a_command_that_runs_out_of_memory_has_code_3(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("lfm2_export.inspection.inspect", fail)
    assert cli.main(["inspect", "anything"]) == 3
    assert capsys.readouterr().err == (
        "lfm2-export: inspect: the machine ran out of memory; close other programs or use a larger one\n"
    )


def test_a_bug_is_no_traceback_and_no_other_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("[/x]\x1b" * 200)

    monkeypatch.setattr("lfm2_export.inspection.inspect", fail)
    assert cli.main(["inspect", "anything"]) == 70
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lfm2-export: inspect: internal error (KeyError: ")
    assert line.endswith("; this is a bug: report it with what --verbose prints")
    assert len(line) < 400
    assert cli.main(["inspect", "anything", "--verbose"]) == 70
    first, *trace = capsys.readouterr().err.splitlines()
    assert first == line
    assert trace[0] == "Traceback (most recent call last):"
    assert all(text.isprintable() for text in trace)


def test_the_address_space_is_counted_where_it_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert address_space_left() is None
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1 << 50, 1 << 50))
    left = address_space_left()
    assert left is not None
    assert (1 << 50) - (1 << 45) < left < 1 << 50
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1, 1))
    assert address_space_left() == 0
    monkeypatch.setattr(memory, "_STATM", "/no/such/file")
    assert address_space_left() == 1


def limited(megabytes: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))

    return subprocess.run([*CLI, *arguments], capture_output=True, text=True, preexec_fn=limit, timeout=60)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="asks /proc what is mapped")
@pytest.mark.parametrize("megabytes", [80, 120, 160, 200, 300, 400])
def test_a_process_with_little_memory_says_so(tmp_path: Path, megabytes: int) -> None:
    """Whatever does not fit: numpy's threads, onnxruntime's library, a program that is no program."""
    folder = write_artifact(tmp_path / "artifact").path
    for name, content in (("tokenizer.json", "{}"),):
        (folder / name).write_text(content)
    done = limited(megabytes, "bench", folder, "--prompt-tokens", "4")
    lines = done.stderr.splitlines()
    print(megabytes, done.returncode, lines)
    assert len(lines) == 1
    if done.returncode == 2:  # all that was needed fitted, and the test's program is none
        assert "cannot load it" in lines[0]
    else:
        assert done.returncode == 3
        assert "memory" in lines[0]
