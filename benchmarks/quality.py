"""What quantizing costs, against llama.cpp's own quantizers on the same weights and the same tokens.

    python -m benchmarks.quality tiny-moe tiny-dense build/checkpoints/moe --output build/quality.json

In: checkpoints. Out: a table and JSON: the KL divergence from the unquantized model (mean and standard error over
windows of held-out text), bits a weight of the file and of what a decode step reads. Both sides are computed by the
same eager model in float32 with the weights that each file would hold, so that only the rounding of weights differs.
llama-quantize runs without an importance matrix and with one, which llama-imatrix measures on the text that --calibrate
default takes; both are built from the sources that llama-bench is built from, unless --tools names a folder that has
them. --ours leaves them out.
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
from benchmarks.llama_cpp import LlamaTools, get_llama_tools
from benchmarks.random_gguf import ARCHITECTURES, tensors
from benchmarks.sensitivity import TOKENS as SEEN
from benchmarks.sensitivity import rows_of
from benchmarks.toolchain import find_compiler
from lfm2_export.backends.onnx.plan import make_plan
from lfm2_export.backends.weights.plan import WeightPlan
from lfm2_export.backends.weights.widths import Counted, counted_bytes
from lfm2_export.calibration.request import Calibration
from lfm2_export.calibration.statistics import Statistics
from lfm2_export.calibration.text import DEFAULT, DEFAULT_TEXT
from lfm2_export.calibration.text import TOKENS as CALIBRATION_TOKENS
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.mixing import MixRequest, mix
from lfm2_export.mixing.budget import Budget
from lfm2_export.mixing.measured import Meter
from lfm2_export.progress import Progress
from lfm2_export.quant.algorithms import DEFAULT_ALGORITHM, Algorithm, get_algorithm
from lfm2_export.quant.formats import FloatArray, IntFormat
from lfm2_export.quant.schemes import Scheme, get_scheme

LLAMA_TYPES = ("Q4_0", "IQ4_XS", "Q4_K_M", "Q5_0", "Q5_K_S")
TOKENS = 8192
CALIBRATED = "gptq"


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


def ours(meter: Meter, name: str, scheme: Scheme, statistics: Statistics | None = None) -> Quality:
    """A scheme, its choices included, as the plan of an ONNX program stores it; with statistics, calibrated."""
    plan = make_plan(meter.checkpoint.config, scheme)
    return measure(meter, name, plan_weights(meter.checkpoint, plan, statistics), plan_bits(plan))


def plan_bits(plan: WeightPlan) -> tuple[float, float]:
    file, step = (counted_bytes(plan, counted) for counted in (Counted.FILE, Counted.STEP))
    return 8 * file[0] / file[1], 8 * step[0] / step[1]


def plan_weights(
    checkpoint: Checkpoint, plan: WeightPlan, statistics: Statistics | None = None
) -> dict[str, FloatArray]:
    """What a program computes with, by published name."""

    def algorithm(multiplied: str) -> Algorithm:
        if statistics is None:
            return get_algorithm(DEFAULT_ALGORITHM)
        return get_algorithm(CALIBRATED).fitted(statistics.of(multiplied))

    return {
        (name := weight.multiplied(source)): algorithm(name)(
            checkpoint.read(source), weight.format, fqn=name
        ).dequantize()
        for weight in plan.values()
        if weight.same_bytes_as is None and isinstance(weight.format, IntFormat)
        for source in weight.sources
    }


def our_schemes(checkpoint: Checkpoint) -> Iterator[tuple[str, Scheme]]:
    q4 = get_scheme("q4")
    yield "q4, default mix", mix(checkpoint, q4, make_plan, MixRequest())
    widths = {tensor.shape[-1] for tensor in checkpoint.model_tensors.values() if tensor.matrix is not None}
    for size in (32, 64):
        if not any(width % size for width in widths):
            yield f"q4, groups of {size}", q4.with_group_size(size)


def calibrated(meter: Meter) -> Iterator[Quality]:
    """The default budget, and the bytes of llama.cpp's Q4_0, as ``--calibrate default`` exports them: weights fitted to
    the statistics, widths chosen by them. And with the widths that the weights alone suggest."""
    calibration = Calibration.asked(meter.checkpoint, DEFAULT, None)
    assert calibration is not None
    with TemporaryDirectory() as folder:
        statistics = calibration.collected(Path(folder), Progress())
        for bytes_of, budget in budgets(meter.checkpoint).items():
            for judged_by, known in (("", statistics), (", widths by the weights alone", None)):
                scheme = mix(meter.checkpoint, get_scheme("q4"), make_plan, MixRequest(budget=budget), known)
                yield ours(meter, f"q4, calibrated{bytes_of}{judged_by}", scheme, statistics)


def budgets(checkpoint: Checkpoint) -> dict[str, Budget | None]:
    """By what is said of them: the default, and Q4_0's bytes where llama.cpp knows the family."""
    if checkpoint.config.model_type not in ARCHITECTURES:
        return {"": None}
    stored = tensors(checkpoint.raw_config)
    bits = 8 * sum(one.nbytes for one in stored) / sum(one.count for one in stored)
    return {"": None, ", Q4_0's bytes": Budget(bits=bits)}


def llama(meter: Meter, tools: LlamaTools) -> Iterator[Quality]:
    """What llama-quantize makes of the same checkpoint, without an importance matrix and with one."""
    with TemporaryDirectory() as folder:
        source = write_gguf(Path(folder) / "source.gguf", meter.checkpoint)
        importance = Path(folder) / "importance.gguf"
        tools.importance(source, importance, DEFAULT_TEXT, chunks=CALIBRATION_TOKENS // 512)
        for name in LLAMA_TYPES:
            for title, given in ((name, None), (f"{name}, imatrix", importance)):
                made = tools.quantize(source, Path(folder) / "made.gguf", name, given)
                yield measure(meter, f"llama.cpp {title}", dequantized(made), stored_bits(made))


def qualities(name: str, tools: LlamaTools | None) -> Iterator[Quality]:
    """Every row of a checkpoint's table."""
    checkpoint = open_checkpoint(name)
    meter = Meter(checkpoint, rows_of(checkpoint, None, first=SEEN, count=TOKENS))
    for title, scheme in our_schemes(checkpoint):
        yield ours(meter, title, scheme)
    yield from calibrated(meter)
    if tools is not None and checkpoint.config.model_type in ARCHITECTURES:
        yield from llama(meter, tools)


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
    parser.add_argument("--tools", type=Path, help="a folder with a llama-quantize and a llama-imatrix")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tools = None if options.ours else LlamaTools(folder=options.tools) if options.tools else None
    if tools is None and not options.ours:
        tools = get_llama_tools(find_compiler())
    found = []
    for name in options.checkpoints:
        for one in qualities(name, tools):
            print(one, flush=True)
            found.append(one)
    options.output.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
