"""One timed run of one program in a process of its own: prints its figures as one line of JSON.

As llama-bench does it: load, a warm-up prefill and a warm-up step, then one timed prefill, then timed decode steps from
an (almost) empty context. Tokens are random and never chosen from the logits.

    python -m benchmarks.one_run ARTIFACT --backend onnx --threads 2 --prompt 512 --new 128
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np


def measure(
    artifact: str, backend: str, threads: int, prompt: int, new: int, kernels: str = "auto"
) -> dict[str, float]:
    """Seconds of loading; tokens per second."""
    from lfm2_export import load_runner

    print("loading", file=sys.stderr, flush=True)  # whoever watches counts from here
    started = time.perf_counter()
    runner = load_runner(artifact, backend=backend, threads=threads, kernels=kernels)
    load_s = time.perf_counter() - started
    tokens = np.random.default_rng(0).integers(0, runner.vocab_size, max(prompt, new)).tolist()
    runner.prefill([tokens[:prompt]])
    runner.decode([tokens[0]])
    runner.reset()
    started = time.perf_counter()
    runner.prefill([tokens[:prompt]])
    prefill_s = time.perf_counter() - started
    runner.reset()
    runner.prefill([tokens[:1]])
    started = time.perf_counter()
    for token in tokens[:new]:
        runner.decode([token])
    decode_s = time.perf_counter() - started
    return {"load_s": load_s, "prefill_tps": prompt / prefill_s, "decode_tps": new / decode_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--backend", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--kernels", default="auto")
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
