"""What quantizing costs, against llama.cpp's own quantizers on the same weights and the same tokens.

    python -m benchmarks.quality tiny-moe tiny-dense build/checkpoints/moe --output build/quality.json

In: checkpoints. Out: a table and JSON: the KL divergence from the unquantized model (mean and standard error over
windows of held-out text), bits a weight of the file and of what a decode step reads. Both sides are computed by the
same eager model in float32 with the weights that each file would hold, so that only the rounding of weights differs.
llama-quantize, without an importance matrix, is built from the sources that llama-bench is built from, unless
--quantize names one; --ours leaves it out.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.gguf_checkpoint import dequantized, stored_bits, write_gguf
from benchmarks.llama_cpp import get_llama_quantize
from benchmarks.sensitivity import TOKENS as SEEN
from benchmarks.sensitivity import rows_of
from benchmarks.toolchain import find_compiler
from lfm2_export.backends.onnx.plan import make_plan
from lfm2_export.backends.weights.plan import WeightPlan
from lfm2_export.backends.weights.widths import Counted, counted_bytes
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.mixing import MixRequest, mix
from lfm2_export.mixing.measured import Meter
from lfm2_export.quant.algorithms import DEFAULT_ALGORITHM, get_algorithm
from lfm2_export.quant.formats import FloatArray, IntFormat
from lfm2_export.quant.schemes import Scheme, get_scheme

LLAMA_TYPES = ("Q4_0", "Q4_K_M", "Q5_K_S")
TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class Quality:
    """``kl`` in nats, ``kl_error`` its standard error; bits a weight."""

    checkpoint: str
    name: str
    kl: float
    kl_error: float
    file_bits: float
    step_bits: float


def measure(meter: Meter, name: str, weights: Mapping[str, FloatArray], bits: tuple[float, float]) -> Quality:
    """One set of weights, by published name; those that are missing are as in the checkpoint."""
    windows = meter.token_kl(weights).reshape(-1, 512).mean(-1)
    error = float(windows.std(ddof=1)) / math.sqrt(len(windows))
    return Quality(
        checkpoint=meter.checkpoint.name,
        name=name,
        kl=float(windows.mean()),
        kl_error=error,
        file_bits=bits[0],
        step_bits=bits[1],
    )


def ours(meter: Meter, name: str, scheme: Scheme, *, algorithm: str = DEFAULT_ALGORITHM) -> Quality:
    """A scheme, its choices included, as the plan of an ONNX program stores it."""
    plan = make_plan(meter.checkpoint.config, scheme)
    return measure(meter, name, plan_weights(meter.checkpoint, plan, algorithm), plan_bits(plan))


def plan_bits(plan: WeightPlan) -> tuple[float, float]:
    file, step = (counted_bytes(plan, counted) for counted in (Counted.FILE, Counted.STEP))
    return 8 * file[0] / file[1], 8 * step[0] / step[1]


def plan_weights(checkpoint: Checkpoint, plan: WeightPlan, algorithm: str) -> dict[str, FloatArray]:
    """What a program computes with, by published name."""
    quantize = get_algorithm(algorithm)
    return {
        source: quantize(checkpoint.read(source), weight.format, fqn=source).dequantize()
        for weight in plan.values()
        if weight.same_bytes_as is None and isinstance(weight.format, IntFormat)
        for source in weight.sources
    }


def our_schemes(checkpoint: Checkpoint) -> Iterator[tuple[str, Scheme]]:
    q4 = get_scheme("q4")
    yield "q4, default mix", mix(checkpoint, q4, make_plan, MixRequest())
    for size in (32, 64):
        yield f"q4, groups of {size}", q4.with_group_size(size)


def llama(meter: Meter, quantize: Path) -> Iterator[Quality]:
    """What llama-quantize makes of the same checkpoint, without an importance matrix."""
    from benchmarks.llama_cpp import quantize_gguf

    with TemporaryDirectory() as folder:
        source = write_gguf(Path(folder) / "source.gguf", meter.checkpoint)
        for name in LLAMA_TYPES:
            made = quantize_gguf(quantize, source, Path(folder) / f"{name}.gguf", name)
            yield measure(meter, f"llama.cpp {name}", dequantized(made), stored_bits(made))


def qualities(name: str, quantize: Path | None) -> Iterator[Quality]:
    """Every row of a checkpoint's table."""
    checkpoint = open_checkpoint(name)
    meter = Meter(checkpoint, rows_of(checkpoint, None, first=SEEN, count=TOKENS))
    for title, scheme in our_schemes(checkpoint):
        yield ours(meter, title, scheme)
    if quantize is not None:
        yield from llama(meter, quantize)


def table(found: Sequence[Quality]) -> str:
    lines = ["| Checkpoint | Weights | KL | Bits, file | Bits, step |", "|---|---|---|---|---|"]
    for one in found:
        lines.append(
            f"| {one.checkpoint} | {one.name} | {one.kl:.5f} ± {one.kl_error:.5f} | {one.file_bits:.2f} | "
            f"{one.step_bits:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ours", action="store_true", help="leave llama.cpp out")
    parser.add_argument("--quantize", type=Path, help="a llama-quantize that is there already")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    quantize = None if options.ours else options.quantize or get_llama_quantize(find_compiler())
    found = []
    for name in options.checkpoints:
        for one in qualities(name, quantize):
            print(one, flush=True)
            found.append(one)
    options.output.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
