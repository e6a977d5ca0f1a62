"""One sparse feed-forward at LFM2-8B-A1B's shape: our operator, the stock one, and the memory bandwidth, side by side.

    python benchmarks/moe_operator.py [--threads 2] [--tokens 1 64] [--rounds 5] [--kernels avx2] [--json]

Random weights and random routing, new for every call, so that the weights come from memory and not from a cache: all
32 experts take 198 MB, one token's four take 25. Ours runs as a .pte in ExecuTorch's Python runtime, weights in its
memory map; the stock one (``llama::quantized_moe_ffn``) through its PyTorch binding, which calls the same kernel.
Rounds alternate between all that is measured, so that another process disturbs all of them alike.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lfm2_export.kernels import ops
from lfm2_export.kernels.packing import PackedExperts

EXPERTS, TOP_K, WIDTH, INNER = 32, 4, 2048, 1792
TARGET_MS = {1: 1.6, 64: 25.0}  # two threads, AVX512-VNNI
SWEEP_BYTES = 512 << 20  # far beyond any cache
EXPERT_BYTES = 3 * WIDTH * INNER * 9 // 16  # 4.5 bits a weight

Call = Callable[[Tensor, Tensor], object]


class Layer(nn.Module):
    """The operator alone."""

    def __init__(self, packed: PackedExperts):
        super().__init__()
        self.gate_up, self.down = nn.Buffer(torch.from_numpy(packed.gate_up)), nn.Buffer(torch.from_numpy(packed.down))

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        return ops.moe_ffn(x, logits, None, self.gate_up, self.down, TOP_K, True, 1.0)


def random_packed(rng: np.random.Generator) -> PackedExperts:
    packed = PackedExperts(EXPERTS, WIDTH, INNER)
    for tiles in (packed.gate_up, packed.down):
        tiles[...] = np.frombuffer(rng.bytes(tiles.size), np.uint8).reshape(tiles.shape)
        scales = (rng.normal(size=(*tiles.shape[:-1], 32)) * 0.005).astype("<f2")
        tiles[..., :64] = scales.view(np.uint8)
    return packed


def our_program(folder: Path, threads: int) -> Call:
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.extension.pybindings import portable_lib

    tokens = torch.export.Dim("T", min=1, max=4096)
    inputs = torch.zeros(5, WIDTH), torch.zeros(5, EXPERTS)
    layer = Layer(random_packed(np.random.default_rng(0)))
    exported = torch.export.export(layer, inputs, dynamic_shapes=({0: tokens}, {0: tokens}), strict=False)
    edge = to_edge(exported, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    planning = MemoryPlanningPass(alloc_graph_input=False)
    path = folder / "layer.pte"
    with path.open("wb") as file:
        edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning)).write_to_file(file)
    if not ops.load():
        raise SystemExit("no compiler, so there is nothing to measure")
    portable_lib._unsafe_reset_threadpool(threads)
    program = portable_lib._load_for_executorch(str(path))
    return lambda x, logits: program.forward((x, logits))


def stock_operator() -> Call:
    """``llama::quantized_moe_ffn`` on random weights in its layout; its router is the identity on the first inputs."""
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers it)

    rng = np.random.default_rng(0)
    w13, w2 = stock_weights(rng, 2 * INNER, WIDTH), stock_weights(rng, WIDTH, INNER)
    router = torch.eye(EXPERTS, WIDTH)
    sizes = TOP_K, EXPERTS, INNER, WIDTH, 32, 4
    return lambda x, _: torch.ops.llama.quantized_moe_ffn(
        x, router, torch.zeros(EXPERTS), w13, w2, *sizes, "sigmoid", 1.0
    )


def stock_weights(rng: np.random.Generator, rows: int, columns: int) -> Tensor:
    """Header, then per 8 rows and group: 128 bytes of codes, 8 float scales, 8 sums."""
    blob = np.empty((EXPERTS, 64 + rows // 8 * (columns // 32) * 192), np.uint8)
    blob[:, :64] = np.array([6712, 1, 4, 0, 0, 8, 16, 2, *[0] * 8], np.int32).view(np.uint8)
    tiles = blob[:, 64:].reshape(EXPERTS, -1, 192)
    tiles[...] = np.frombuffer(rng.bytes(192), np.uint8)
    tiles[..., 128:160] = np.full(8, 0.005, np.float32).view(np.uint8)
    tiles[..., 160:] = 0
    return torch.from_numpy(blob)


def bandwidth(buffer: Tensor, threads: int) -> float:
    """GB/s of a sum over the buffer, the best of three."""
    torch.set_num_threads(threads)
    best = min(milliseconds(buffer.sum) for _ in range(3))
    torch.set_num_threads(1)  # PyTorch's threads spin after each use, and would take a core from ExecuTorch's
    time.sleep(0.05)
    return buffer.nbytes / best / 1e6


def milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def one_call(call: Call, tokens: int) -> tuple[float, int]:
    """Time of a call on new random inputs, and the bytes of weights that it has to read."""
    x, logits = torch.randn(tokens, WIDTH), torch.randn(tokens, EXPERTS) * 2
    x[:, :EXPERTS] = logits
    chosen, _ = ops.choose_experts(logits, None, TOP_K, True, 1.0)
    return milliseconds(lambda: call(x, logits)), len(chosen.unique()) * EXPERT_BYTES


def measure(ours: Call, stock: Call | None, tokens: int, rounds: int, threads: int) -> dict[str, Any]:
    buffer = torch.ones(SWEEP_BYTES // 4)
    repeats = max(3, 200 // tokens)
    speeds, times, shares, stock_times = [], [], [], []
    one_call(ours, tokens)
    for _ in range(rounds):
        speeds.append(bandwidth(buffer, threads))
        for _ in range(repeats):
            time_ms, size = one_call(ours, tokens)
            times.append(time_ms)
            shares.append(size / time_ms / 1e6)
        if stock is not None:
            stock_times.append(one_call(stock, tokens)[0])
    return {
        "tokens": tokens,
        "ours_ms": {"median": statistics.median(times), "best": min(times)},
        "target_ms": TARGET_MS.get(tokens),
        "stock_ms": {"median": statistics.median(stock_times), "best": min(stock_times)} if stock_times else None,
        "ours_gb_per_s": statistics.median(shares),
        "bandwidth_gb_per_s": statistics.median(speeds),
    }


def show(result: dict[str, Any]) -> str:
    ours, stock = result["ours_ms"], result["stock_ms"]
    target = f" (target {result['target_ms']} on two quiet cores)" if result["target_ms"] else ""
    ratio = f"stock {stock['median']:.1f} ms, {stock['median'] / ours['median']:.0f} times ours; " if stock else ""
    return (
        f"T={result['tokens']}: ours {ours['median']:.2f} ms, best {ours['best']:.2f}{target}; {ratio}"
        f"weights read at {result['ours_gb_per_s']:.1f} GB/s of {result['bandwidth_gb_per_s']:.1f} measured"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--kernels", help="instead of this processor's best: avx512vnni, avxvnni, avx2, neondot, scalar..."
    )
    parser.add_argument("--no-stock", action="store_true", help="leave the stock operator out: it is slow on x86")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.kernels:
        os.environ["LFM2_KERNELS"] = arguments.kernels
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        ours = our_program(Path(folder), arguments.threads)
        stock = None if arguments.no_stock else stock_operator()
        results = [measure(ours, stock, tokens, arguments.rounds, arguments.threads) for tokens in arguments.tokens]
    if arguments.json:
        print(json.dumps({"threads": arguments.threads, "load": os.getloadavg()[0], "results": results}))
    else:
        print(f"{arguments.threads} threads, load average {os.getloadavg()[0]:.1f}")
        print("\n".join(map(show, results)))


if __name__ == "__main__":
    main()
