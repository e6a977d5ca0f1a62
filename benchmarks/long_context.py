"""What a decode step costs at long contexts, beside what reading the keys and values alone takes.

    python -m benchmarks.long_context ARTIFACT [--contexts 512,8192,32768] [--threads 2] [--json]

A context is not computed but restored: random keys and values of that length, so that a step at 32,768 positions is
timed after seconds. Every kind of cache is a process of its own; figures are medians of some steps. "beyond a short
context" is what the context adds to a step of 64 positions; "reading it" is its bytes at the read bandwidth that is
measured in the same run: no step can cost less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import bandwidth
from benchmarks.toolchain import find_compiler
from lfm2_export.backends.base import Snapshot
from lfm2_export.errors import Lfm2ExportError
from lfm2_export.runners import load_runner

CASES = (("float, stock kernels", "stock", "float"), ("float", "lfm2", "float"), ("int8", "lfm2", "int8"))
SHORT, STEPS = 64, 16


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        if options.case is not None:
            print(json.dumps(measure(options)))
            return 0
        report(options)
    except Lfm2ExportError as error:
        print(f"long_context: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_context",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("artifact", help="a folder with an ONNX program of q4 or q8")
    parser.add_argument("--contexts", type=_lengths, default=(512, 8192, 32768), metavar="N,N")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)  # the process of one kind of cache
    return parser


def measure(options: argparse.Namespace) -> list[dict[str, float]]:
    """Milliseconds of a step, and bytes of the cache, of one case at each context."""
    _, kernels, kv_cache = CASES[options.case]
    runner = load_runner(options.artifact, backend="onnx", threads=options.threads, kernels=kernels, kv_cache=kv_cache)
    step_ms(runner, SHORT)  # brings the weights into memory
    short = step_ms(runner, SHORT)
    found = []
    for context in options.contexts:
        step = step_ms(runner, context)
        kv_bytes = context * runner.cache.bytes_per_token()
        found.append({"context": context, "step_ms": step, "short_ms": short, "kv_bytes": kv_bytes})
    return found


def step_ms(runner: Any, context: int) -> float:
    """The median step after ``context`` positions of random keys and values."""
    rng = np.random.default_rng(0)
    tensors = {}
    for tensor in runner.cache.tensors:
        shape = tensor.concrete_shape(1, context)
        if tensor.dtype == "uint8":
            tensors[tensor.past_name] = rng.integers(96, 160, shape, dtype=np.uint8)
            tensors[tensor.past_name][..., -4:] = np.frombuffer(np.float32(0.01).tobytes(), np.uint8)
        else:
            tensors[tensor.past_name] = rng.standard_normal(shape, dtype=np.float32).astype(tensor.dtype)
    lengths = np.array([context], dtype=np.int64)
    runner.restore(Snapshot(program_id=runner.program_id, lengths=lengths, tensors=tensors))
    times = []
    for step in range(STEPS):
        started = time.perf_counter()
        runner.decode([step])
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[2:])  # the first makes room for more positions


def report(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="lfm2-export-") as scratch:
        meter = bandwidth.build(Path(scratch), find_compiler())
        read = bandwidth.read_gb_per_s(meter, options.threads)
        rows = {name: _measured_apart(options, index) for index, (name, _, _) in enumerate(CASES)}
        read = max(read, bandwidth.read_gb_per_s(meter, options.threads))
    if options.json:
        print(json.dumps({"read_gb_per_s": read, "threads": options.threads, "rows": rows}, indent=1))
        return
    print(f"read bandwidth {read:.1f} GB/s, {options.threads} threads\n")
    print("| keys and values | context | bytes | step | tokens/s | beyond a short context | reading it |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, found in rows.items():
        for one in found:
            step, beyond = one["step_ms"], one["step_ms"] - one["short_ms"]
            print(
                f"| {name} | {one['context']:,} | {one['kv_bytes'] / 1e6:.0f} MB | {step:.1f} ms | {1e3 / step:.1f} | "
                f"{beyond:.1f} ms | {one['kv_bytes'] / read / 1e6:.1f} ms |"
            )


def _measured_apart(options: argparse.Namespace, case: int) -> list[dict[str, float]]:
    command = [sys.executable, "-m", "benchmarks.long_context", options.artifact, "--case", str(case)]
    command += ["--threads", str(options.threads), "--contexts", ",".join(map(str, options.contexts))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise Lfm2ExportError(f"{CASES[case][0]}: failed with status {done.returncode}, see above")
    return json.loads(done.stdout.splitlines()[-1])


def _lengths(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give numbers of positions, such as 512,8192")
    return found


if __name__ == "__main__":
    sys.exit(main())
