"""Watching a process: its lines with times, its memory, and what it says when it fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import bandwidth
from benchmarks.processes import BenchmarkError, watch
from benchmarks.toolchain import find_compiler

HOLDS_200_MB = """
import sys, time
held = bytearray(200_000_000)
print("ready", file=sys.stderr, flush=True)
time.sleep(0.3)
print("done", file=sys.stderr, flush=True)
print("figures")
"""


def test_watch_returns_output_times_and_peak_memory() -> None:
    found = watch([sys.executable, "-c", HOLDS_200_MB], purpose="a test")
    assert found.stdout == "figures\n"
    (ready, first), (done, last) = found.stderr
    assert (first, last) == ("ready", "done")
    assert done - ready > 0.25
    if sys.platform == "linux":
        assert 200e6 < found.peak_bytes < 300e6
    print(f"peak {found.peak_bytes / 1e6:.0f} MB")


def test_watch_takes_a_launcher() -> None:
    found = watch([sys.executable, "-c", "import os; print(os.environ['X'])"], purpose="x", launcher=["env", "X=on"])
    assert found.stdout == "on\n"


def test_watch_quotes_a_failure_in_one_line() -> None:
    code = "import sys; print('first', file=sys.stderr); sys.exit('out of luck')"
    with pytest.raises(BenchmarkError, match=r"^timing it failed with status 1: out of luck$"):
        watch([sys.executable, "-c", code], purpose="timing it")


def test_watch_names_a_program_that_is_not_there() -> None:
    with pytest.raises(BenchmarkError, match="timing it: no-such-program cannot be started"):
        watch(["no-such-program"], purpose="timing it")


def test_bandwidth_program_compiles_and_prints_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 1 << 24)
    monkeypatch.setattr(bandwidth, "PASSES", 3)
    program = bandwidth.build(tmp_path, find_compiler())
    found = bandwidth.read_gb_per_s(program, 1)
    assert 0.1 < found < 10_000
    print(f"{found:.1f} GB/s of 16 MB, which may be a cache's")
