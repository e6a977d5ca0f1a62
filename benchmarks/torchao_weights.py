"""The int4 weights of a .pte against torchao's own, on the same weights and the same tokens.

    python -m benchmarks.torchao_weights tiny-moe tiny-dense --output build/torchao.json

In: checkpoints. Out: a table and JSON: the KL divergence from the unquantized model that the rounding of weights alone
causes, in the eager model in float32: torchao's ``Int8DynamicActivationIntxWeightConfig`` (int4, groups of 32,
symmetric), ours, and ours calibrated. What 8da4w stores in 4 bits is rounded by each; what it stores in 8 bits is ours
in all.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.quality import TOKENS, Quality, measure, plan_weights
from benchmarks.sensitivity import TOKENS as SEEN
from benchmarks.sensitivity import rows_of
from lfm2_export.backends.executorch.plan import make_plan
from lfm2_export.backends.weights.plan import WeightPlan
from lfm2_export.calibration.request import Calibration
from lfm2_export.calibration.text import DEFAULT
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.mixing.measured import Meter
from lfm2_export.progress import Progress
from lfm2_export.quant.formats import FloatArray, IntFormat
from lfm2_export.quant.schemes import get_scheme

_SAME_BITS = (math.nan, math.nan)  # in every row of a table: not asked here


def torchao_weights(checkpoint: Checkpoint, plan: WeightPlan) -> dict[str, FloatArray]:
    """What torchao makes of each matrix of 4 bits, by published name."""
    return {
        source: _rounded(checkpoint.read(source), weight.format.group_size)
        for weight in plan.values()
        if weight.same_bytes_as is None and isinstance(weight.format, IntFormat) and weight.format.bits == 4
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


def qualities(name: str) -> Iterator[Quality]:
    """Three rows of a checkpoint's table."""
    checkpoint = open_checkpoint(name)
    plan = make_plan(checkpoint.config, get_scheme("8da4w"))
    meter = Meter(checkpoint, rows_of(checkpoint, None, first=SEEN, count=TOKENS))
    calibration = Calibration.asked(checkpoint, DEFAULT, None)
    assert calibration is not None
    plain = plan_weights(checkpoint, plan)
    yield measure(meter, "torchao", plain | torchao_weights(checkpoint, plan), _SAME_BITS)
    yield measure(meter, "8da4w", plain, _SAME_BITS)
    with TemporaryDirectory() as folder:
        statistics = calibration.collected(Path(folder), Progress())
        yield measure(meter, "8da4w, calibrated", plan_weights(checkpoint, plan, statistics), _SAME_BITS)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = [one for name in options.checkpoints for one in qualities(name)]
    rows = [
        {"checkpoint": one.checkpoint, "weights": one.name, "kl": one.kl, "kl_error": one.kl_error} for one in found
    ]
    options.output.write_text(json.dumps(rows, indent=1) + "\n")
    for one in found:
        print(f"{one.checkpoint:12} {one.name:20} {one.kl:.5f} ± {one.kl_error:.5f}")


if __name__ == "__main__":
    main()
