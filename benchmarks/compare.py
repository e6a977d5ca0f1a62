"""Times llama.cpp, our ONNX program and our .pte of one shape side by side.

    python -m benchmarks.compare 1.2b 8b-a1b [--threads 2] [--rounds 3] [--keep FOLDER] [--output benchmarks/results]

Random weights at a published model's shape: speed and memory are real, quality is not measured here. llama.cpp is
built here, from the sources that llama-cpp-python ships on the package index. Every timed run is a process of its own;
systems take turns (A B C A B C ...), so that whatever else the machine does falls on all of them; figures are medians.
Files are read once before each run: loads are from the page cache.

A quiet machine: close what you can, keep the lid on background builds and tests, plug a laptop in, fix the clock
(cpupower frequency-set -g performance), and use as many threads as there are real cores. A run during which others used
more than 0.15 cores is repeated, whatever its figures, and after four attempts the least disturbed counts. Runs that
still lie far apart, or a bandwidth that differs between rounds, say that the machine was not quiet or not all yours:
repeat the whole then. --launcher "taskset -c 0,1" or "numactl --membind 0 --cpunodebind 0" keeps every timed run where
you want it.

"stock kernels" are onnxruntime's own; otherwise ONNX programs run on ours, on the same files.

What is measured: load, until the program can compute; resident, the most memory that the process held, interpreter and
mapped files included; prefill of 512 tokens and 128 decode steps from an empty context, each after a warm-up; the read
bandwidth, by a small C program in the same rounds (best pass of each round, then the median). "bits a weight" are those
that a decode step reads; "of bandwidth" is what decoding reads a second, of what the machine can read.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import bandwidth, llama_cpp
from benchmarks.figures import LLAMA_CPP, SYSTEMS, Comparison, Row, Run, spread, table
from benchmarks.processes import BenchmarkError, read_once, watch
from benchmarks.synthetic import REAL_SHAPES
from benchmarks.toolchain import Compiler, find_compiler
from lfm2_export.errors import Lfm2ExportError
from lfm2_export.resources import processor_name

if TYPE_CHECKING:
    from benchmarks.programs import Program

PROMPT, NEW = 512, 128
GROUPS = (32, 64, 128)
MIN_ROUNDS = 3
QUIET_CORES, ATTEMPTS = 0.15, 4


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        compiler = find_compiler()
        rival = llama_cpp.get_llama_bench(compiler) if LLAMA_CPP in options.systems else None
        if rival is not None:
            flags = " ".join(rival.flags) or "no flags of our own"
            say(f"{rival.package}: llama-bench built by {rival.compiler} with -march=native, {flags}")
        for shape in options.shapes:
            compare_one(shape, options, compiler, rival)
    except Lfm2ExportError as error:
        print(f"compare: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        print(f"compare: {error.name} is not installed; pip install 'lfm2-export[bench]'", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shapes", nargs="+", choices=sorted(REAL_SHAPES), metavar="SHAPE", help=", ".join(REAL_SHAPES))
    parser.add_argument("--threads", type=_positive, default=2, metavar="N")
    parser.add_argument(
        "--rounds", type=_rounds, default=MIN_ROUNDS, metavar="N", help=f"at least {MIN_ROUNDS} (default)"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where files are looked for, and left")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="where JSON and PNG go")
    parser.add_argument("--onnx-groups", type=_groups, default=GROUPS, metavar="N,N", help="default: 32,64,128")
    parser.add_argument("--systems", type=_systems, default=SYSTEMS, metavar="A,B", help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--launcher", type=shlex.split, default=[], help="command that starts every timed run")
    return parser


def compare_one(
    shape: str, options: argparse.Namespace, compiler: Compiler, rival: llama_cpp.LlamaBench | None
) -> Comparison:
    """Makes the files, times them, prints the table, writes <shape>.json and <shape>.png.

    Raises:
        Lfm2ExportError: the disk is short, or something failed.
    """
    from benchmarks import plot, programs

    with tempfile.TemporaryDirectory(prefix="lfm2-export-") as scratch:
        folder = (options.keep or Path(scratch)) / shape
        contenders = programs.prepare(folder, REAL_SHAPES[shape], options.systems, options.onnx_groups)
        meter = bandwidth.build(Path(scratch), compiler)
        runs: dict[str, list[Run]] = {program.label: [] for program in contenders}
        reads = []
        for turn in range(options.rounds):
            reads.append(bandwidth.read_gb_per_s(meter, options.threads, launcher=options.launcher))
            say(f"{shape}, round {turn + 1}: read {reads[-1]:.1f} GB/s, load average {os.getloadavg()[0]:.1f}")
            for program in contenders:
                runs[program.label].append(run_undisturbed(program, rival, options))
        rows = [Row.of(p.system, p.name, p.bits_per_weight, p.artifact_bytes, runs[p.label]) for p in contenders]
    found = Comparison(
        shape=shape,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        cpu=processor_name(),
        threads=options.threads,
        versions=versions(compiler, rival, [run for one in runs.values() for run in one]),
        read_gb_per_s=round(statistics.median(reads), 2),
        rows=tuple(rows),
    )
    active = programs.active_weights(REAL_SHAPES[shape])
    found.write(options.output / f"{shape}.json")
    plot.draw(found, active, options.output / f"{shape}.png")
    print(f"\n{shape} on {found.cpu}, {found.threads} threads, read bandwidth {found.read_gb_per_s} GB/s\n")
    print(table(found, active), "\n", *(f"\nruns of {line}" for line in spread(runs)), sep="")
    return found


def run_undisturbed(program: Program, rival: llama_cpp.LlamaBench | None, options: argparse.Namespace) -> Run:
    """The first run during which others used next to nothing of the machine; of some attempts, the least disturbed."""
    attempts = []
    for _ in range(ATTEMPTS):
        read_once(program.files)
        attempts.append(run_once(program, rival, options))
        others = attempts[-1].foreign_cores
        is_quiet = others <= QUIET_CORES
        say(f"  {program.label}: {_shown(attempts[-1])}" + ("" if is_quiet else f" (others used {others:.1f} cores)"))
        if is_quiet:
            break
    return min(attempts, key=lambda run: run.foreign_cores)


def run_once(program: Program, rival: llama_cpp.LlamaBench | None, options: argparse.Namespace) -> Run:
    if program.system == LLAMA_CPP:
        assert rival is not None
        return rival.run(program.path, prompt=PROMPT, new=NEW, threads=options.threads, launcher=options.launcher)
    command = [sys.executable, "-m", "benchmarks.one_run", str(program.path), "--backend", program.system]
    command += ["--threads", str(options.threads), "--prompt", str(PROMPT), "--new", str(NEW)]
    command += ["--kernels", program.kernels]
    watched = watch(command, purpose=program.label, launcher=options.launcher)
    try:
        figures = json.loads(watched.stdout.splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise BenchmarkError(f"{program.label}: printed no figures ({watched.stdout[-200:]!r})") from error
    return Run(**figures, resident_bytes=watched.peak_bytes, foreign_cores=watched.foreign_cores)


def versions(compiler: Compiler, rival: llama_cpp.LlamaBench | None, runs: Sequence[Run]) -> dict[str, str]:
    """Of everything that took part; llama.cpp's commit as it prints it."""
    from lfm2_export.packages import recorded_versions as ours

    found = {"compiler": compiler.name}
    if rival is not None:
        commit = next((run.version for run in runs if run.version), "unknown")
        found[LLAMA_CPP] = f"{commit} ({rival.package}; {' '.join(['-march=native', *rival.flags])})"
    return found | ours()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _shown(run: Run) -> str:
    return (
        f"load {run.load_s:.2f} s, resident {run.resident_bytes / 1e9:.2f} GB, prefill {run.prefill_tps:.1f}, "
        f"decode {run.decode_tps:.1f} tok/s"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return value


def _rounds(text: str) -> int:
    value = int(text)
    if value < MIN_ROUNDS:
        raise argparse.ArgumentTypeError(f"{text}: medians want at least {MIN_ROUNDS} rounds")
    return value


def _groups(text: str) -> tuple[int, ...]:
    return _chosen(text, {str(group): group for group in GROUPS})


def _systems(text: str) -> tuple[str, ...]:
    return _chosen(text, {system: system for system in SYSTEMS})


def _chosen(text: str, known: dict[str, Any]) -> tuple[Any, ...]:
    names = list(dict.fromkeys(name for name in text.split(",") if name))
    if not names or set(names) - set(known):
        raise argparse.ArgumentTypeError(f"{text}: give some of {','.join(known)}")
    return tuple(known[name] for name in known if name in names)


if __name__ == "__main__":
    sys.exit(main())
