"""The weights of a .pte against torchao's own, on the same weights and the same tokens, with the bytes of both.

    python -m benchmarks.torchao_weights tiny-moe tiny-dense --output build/torchao.json

In: checkpoints. Out: a table and JSON: the KL divergence from the unquantized model that the rounding of weights alone
causes, in the eager model in float32: torchao's ``Int8DynamicActivationIntxWeightConfig`` (int4, groups of 32,
symmetric), ours, ours with mixed widths in the same file and in one that is 5 % larger, and each of ours calibrated.
What 8da4w stores in 4 bits is rounded by each, the head (a copy of the token table) among it; the table itself is
8da4w's in all. torchao's bits are those of the same program with its weights. Experts are counted as the stock operator
holds them (6 bits in groups of 32), or as ours does (``--moe-op lfm2``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.quality import TOKENS, Quality, measure, plan_bits, plan_weights, table
from benchmarks.sensitivity import TOKENS as SEEN
from benchmarks.sensitivity import rows_of
from lfm2_export.backends.executorch.export import plan_to_mix
from lfm2_export.backends.weights.plan import WeightPlan
from lfm2_export.backends.weights.widths import Counted, counted_bytes
from lfm2_export.calibration.request import Calibration
from lfm2_export.calibration.statistics import Statistics
from lfm2_export.calibration.text import DEFAULT
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.config import ModelConfig
from lfm2_export.families.tensors import Part
from lfm2_export.mixing import MakePlan, MixRequest, mix
from lfm2_export.mixing.budget import Budget
from lfm2_export.mixing.measured import Meter
from lfm2_export.progress import Progress
from lfm2_export.quant.formats import FloatArray, IntFormat
from lfm2_export.quant.schemes import Scheme, get_scheme

MORE = 1.05  # of the same file


def torchao_weights(checkpoint: Checkpoint, plan: WeightPlan) -> dict[str, FloatArray]:
    """What torchao makes of each matrix of 4 bits, by published name."""
    return {
        weight.multiplied(source): _rounded(checkpoint.read(source), weight.format.group_of(weight.shape[-1]))
        for weight in plan.values()
        if isinstance(weight.format, IntFormat) and weight.format.bits == 4 and weight.part is not Part.EMBEDDING
        for source in weight.sources
    }


def _rounded(weight: FloatArray, group_size: int) -> FloatArray:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    rows, columns = weight.shape
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight = torch.nn.Parameter(torch.from_numpy(weight.copy()), requires_grad=False)
    holder = torch.nn.Sequential(linear)
    granularity = PerGroup(group_size)
    quantize_(holder, Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=granularity))
    return holder[0].weight.dequantize().detach().float().numpy()


def qualities(name: str, moe_op: str, tokens: int = TOKENS) -> Iterator[Quality]:
    """The rows of a checkpoint's table."""
    checkpoint = open_checkpoint(name)
    options = {"moe_op": moe_op} if checkpoint.config.num_experts else {}

    def make_plan(config: ModelConfig, scheme: Scheme) -> WeightPlan:
        return plan_to_mix(config, scheme, options)

    uniform = make_plan(checkpoint.config, get_scheme("8da4w"))
    meter = Meter(checkpoint, rows_of(checkpoint, None, first=SEEN, count=tokens))
    rounded = plan_weights(checkpoint, uniform) | torchao_weights(checkpoint, uniform)
    yield measure(meter, "torchao", rounded, plan_bits(uniform))
    calibration = Calibration.asked(checkpoint, DEFAULT, None)
    assert calibration is not None
    with TemporaryDirectory() as folder:
        for title, statistics in (("", None), (", calibrated", calibration.collected(Path(folder), Progress()))):
            for within, scheme in _schemes(checkpoint, uniform, make_plan, statistics):
                plan = make_plan(checkpoint.config, scheme)
                weights = plan_weights(checkpoint, plan, statistics)
                yield measure(meter, f"8da4w{within}{title}", weights, plan_bits(plan))


def _schemes(
    checkpoint: Checkpoint, uniform: WeightPlan, make_plan: MakePlan, statistics: Statistics | None
) -> Iterator[tuple[str, Scheme]]:
    """As it is, and mixed within its own bytes and within more."""
    yield "", get_scheme("8da4w")
    nbytes, _ = counted_bytes(uniform, Counted.FILE)
    for within, factor in ((", mixed, same file", 1.0), (f", mixed, {MORE:.0%} of it", MORE)):
        request = MixRequest(budget=Budget(nbytes=int(nbytes * factor) + uniform.table_bytes))
        yield within, mix(checkpoint, get_scheme("8da4w"), make_plan, request, statistics)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--moe-op", choices=("stock", "lfm2"), default="stock", help="how experts are stored")
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help=f"of held-out text ({TOKENS})")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = []
    for name in options.checkpoints:
        for one in qualities(name, options.moe_op, options.tokens):
            found.append(one)
            print(one, flush=True)
    options.output.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
