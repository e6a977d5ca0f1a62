"""How many instructions our operators take on a phone's processor, counted under qemu where no phone is at hand.

    python -m benchmarks.neon_instructions [--only product] [--kernels scalar neondot neoni8mm] [--json]

Builds ``benchmarks/neon`` for aarch64 and runs it with qemu's log of executed blocks. One call of an operator more is
counted, with nothing of what surrounds it, so a figure is exact and the same on every machine; it says how long a
processor takes only as far as its instructions take alike, and nothing of memory. ``scalar`` is the plain C++, which
the compiler may vectorize; its products take one token after the other, so they are counted with one alone.

Needs what tests/kernels/test_aarch64.py needs: Debian's g++-aarch64-linux-gnu, qemu-user-static and cmake.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from lfm2_export.hashing import cache_folder

SOURCES = Path(__file__).parent / "neon"
PLAIN = "scalar"
SYSROOT = "/usr/aarch64-linux-gnu"
KERNELS = (PLAIN, "neondot", "neoni8mm")
TOOLS = ("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64-static")
CROSS = {
    "CMAKE_SYSTEM_NAME": "Linux",
    "CMAKE_SYSTEM_PROCESSOR": "aarch64",
    "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++",
}
UNITS = {
    "product": "weight and token",
    "attention": "query head, position and feature",
    "conv": "output",
    "router": "weight and token",
    "quantize": "value",
    "swiglu": "value",
    "norm": "value",
}
CASES = (
    *(f"product {bits} {group} {tokens}" for bits in (4, 8) for group in (32, 128) for tokens in (1, 4, 8, 9, 64)),
    *(f"attention {int8} {tokens}" for int8 in (0, 1) for tokens in (1, 16)),
    *(f"conv {tokens}" for tokens in (1, 64)),
    *(f"router {tokens}" for tokens in (1, 64)),
    *(f"{name} {bits}" for name in ("quantize", "swiglu") for bits in (4, 8)),
    "norm",
)
_BLOCK = re.compile(r"Trace \d+: \S+ \[[0-9a-f]+/([0-9a-f]+)/")


def build() -> Path:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise SystemExit(
            f"{', '.join(missing)} not found: apt-get install g++-aarch64-linux-gnu qemu-user-static cmake"
        )
    work = cache_folder() / "benchmarks" / "neon"
    definitions = [f"-D{name}={value}" for name, value in CROSS.items()]
    for command in (
        ["cmake", "-S", SOURCES, "-B", work, *definitions],
        ["cmake", "--build", work, "--target", "neon_instructions", "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
    return work / "neon_instructions"


def executed(log: IO[str]) -> int:
    """Instructions in a log of qemu's: each translated block's are listed before it is run."""
    sizes: dict[int, int] = {}
    start, total = None, 0
    for line in log:
        if line.startswith("Trace"):
            if found := _BLOCK.match(line):
                total += sizes[int(found[1], 16)]
        elif line.startswith("IN:"):
            start = None
        elif line.startswith("0x"):
            address = int(line[: line.index(":")], 16)
            if start is None:
                start = address
                sizes[start] = 0
            sizes[start] += 1
    return total


def run(program: Path, kernels: str, times: int, case: str) -> tuple[int, int]:
    """Instructions of the whole run, and the units of one time."""
    command = [
        *("qemu-aarch64-static", "-L", SYSROOT, "-cpu", "max", "-d", "in_asm,exec,nochain", "-D", "/dev/stderr"),
        *(str(program), kernels, str(times), *case.split()),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        count = executed(process.stderr)
        units = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return count, int(units)


def instructions(program: Path, kernels: str, case: str) -> float:
    """Of one unit of the case."""
    (once, units), (twice, _) = (run(program, kernels, times, case) for times in (1, 2))
    return (twice - once) / units


def is_counted(kernels: str, case: str) -> bool:
    """Whether the case tells something of these kernels that another one does not."""
    return kernels != PLAIN or not case.startswith("product") or case.endswith(" 1")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="cases that begin so")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    program = build()
    cases = [case for case in CASES if not options.only or case.startswith(tuple(options.only))]
    found: dict[str, dict[str, float]] = {}
    for case in cases:
        found[case] = {
            kernels: instructions(program, kernels, case) for kernels in options.kernels if is_counted(kernels, case)
        }
        if not options.json:
            figures = "  ".join(f"{kernels} {value:7.3f}" for kernels, value in found[case].items())
            print(f"{case:20} {figures}  per {UNITS[case.split()[0]]}", flush=True)
    if options.json:
        json.dump(found, sys.stdout, indent=1)
        print()


if __name__ == "__main__":
    main()
