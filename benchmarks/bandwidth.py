"""How fast this machine reads memory with N threads: what decoding is compared with.

In: a number of threads. Out: GB/s (10^9 bytes). A small C program (``bandwidth.c``) adds up a buffer of 1 GiB several
times; the best pass counts, because whatever disturbs a pass only slows it down.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.processes import BenchmarkError, watch
from benchmarks.toolchain import Compiler

SOURCE = Path(__file__).with_name("bandwidth.c")
BUFFER_BYTES = 1 << 30  # far beyond any cache
PASSES = 10


def build(folder: Path, compiler: Compiler) -> Path:
    """Compiles the program into ``folder``.

    Raises:
        BenchmarkError: the compiler fails.
    """
    program = folder / "bandwidth"
    command = [compiler.c, "-O3", "-march=native", "-pthread", str(SOURCE), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[0]
        raise BenchmarkError(f"{SOURCE.name}: {compiler.c} cannot compile it: {said}")
    return program


def read_gb_per_s(program: Path, threads: int, *, launcher: Sequence[str] = ()) -> float:
    """The best pass of one run."""
    command = [str(program), str(threads), str(BUFFER_BYTES), str(PASSES)]
    return max(map(float, watch(command, purpose="measuring the read bandwidth", launcher=launcher).stdout.split()))
