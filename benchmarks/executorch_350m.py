"""Exports the 350M's shape (random weights) as an 8da4w .pte and times it; beside it, plain torch products of the same
shapes.

A decode step reads every weight once, so its rival is the sum of all linear layers of one token in torch, fp32; a
prefill computes with them, so its rival is the same for 512 tokens. Both are timed in turn in one process, so that
the ratios hold on another machine, or on a busy one. The export runs in a process of its own.

    python benchmarks/executorch_350m.py [--threads 2] [--algorithm refit|round] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.synthetic import REAL_SHAPES, write_random_checkpoint

SHAPE, SCHEME, MAX_CONTEXT = "350m", "8da4w", 1024
PROMPT, STEPS, ROUNDS = 512, 64, 5

_EXPORT = """
import json, resource, sys, time
import lfm2_export
started, cpu = time.perf_counter(), time.process_time()
lfm2_export.export(sys.argv[1], backend="executorch", scheme=sys.argv[3], output=sys.argv[2], algorithm=sys.argv[4],
                   max_context=int(sys.argv[5]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"export_s": time.perf_counter() - started, "export_cpu_s": time.process_time() - cpu,
                  "export_peak_bytes": peak}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--algorithm", default="refit")
    parser.add_argument("--keep", metavar="FOLDER", help="where checkpoint and artifact are kept and looked for")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.keep or scratch)
        figures = export(folder, options.algorithm) | measure(folder / "artifact", options.threads)
    print(json.dumps(figures, indent=2))


def export(folder: Path, algorithm: str) -> dict[str, float]:
    """Seconds and memory of the export, nothing if the artifact is there."""
    if (folder / "artifact").is_dir():
        return {}
    write_random_checkpoint(folder / "checkpoint", REAL_SHAPES[SHAPE], seed=0, tokenizer_from="tiny-dense")
    command = [str(folder / "checkpoint"), str(folder / "artifact"), SCHEME, algorithm, str(MAX_CONTEXT)]
    done = subprocess.run([sys.executable, "-c", _EXPORT, *command], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(artifact: Path, threads: int) -> dict[str, float]:
    """Tokens per second of the program and of torch's products, and the ratios."""
    import torch

    from lfm2_export import load_runner

    started = time.perf_counter()
    runner = load_runner(artifact, threads=threads)
    load_s = time.perf_counter() - started
    torch.set_num_threads(threads)
    prompt = np.random.default_rng(0).integers(0, runner.vocab_size, PROMPT)

    def prefill() -> None:
        runner.reset()
        runner.prefill([prompt])

    def decode() -> None:
        for token in prompt[:STEPS]:
            runner.decode([token])

    weights = [torch.randn(shape) for shape in linear_shapes()]
    head = torch.randn(REAL_SHAPES[SHAPE]["vocab_size"], REAL_SHAPES[SHAPE]["hidden_size"])

    def products(tokens: int) -> None:
        inputs = {w.shape[1]: torch.randn(tokens, w.shape[1]) for w in weights}
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        torch.nn.functional.linear(torch.randn(1, head.shape[1]), head)

    times = in_turn(
        {
            "prefill": prefill,
            "decode": decode,
            "torch_prefill": lambda: products(PROMPT),
            "torch_decode": lambda: [products(1) for _ in range(8)] and None,
        }
    )
    rates = {
        "prefill_tps": PROMPT / times["prefill"],
        "torch_prefill_tps": PROMPT / times["torch_prefill"],
        "decode_tps": STEPS / times["decode"],
        "torch_decode_tps": 8 / times["torch_decode"],
    }
    return {
        "load_s": load_s,
        **rates,
        "prefill_over_torch": rates["prefill_tps"] / rates["torch_prefill_tps"],
        "decode_over_torch": rates["decode_tps"] / rates["torch_decode_tps"],
        "pte_bytes": float(sum(path.stat().st_size for path in (artifact / "executorch").iterdir())),
        "peak_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
    }


def linear_shapes() -> list[tuple[int, int]]:
    """Every linear layer's [out, in] but the head's."""
    from lfm2_export.families import get_family
    from lfm2_export.families.tensors import TensorClass

    family = get_family(REAL_SHAPES[SHAPE]["model_type"])
    tensors = family.tensors(family.parse_config(REAL_SHAPES[SHAPE])).values()
    return [(t.shape[0], t.shape[1]) for t in tensors if t.kind is TensorClass.LINEAR]


def in_turn(work: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median seconds of each, taken in turn, so that what else the machine does falls on all of them."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS + 1):
        for name, function in work.items():
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


if __name__ == "__main__":
    main()
