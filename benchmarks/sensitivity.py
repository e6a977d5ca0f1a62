"""What quantizing one unit alone costs, on any number of checkpoints: from this the priors of ``mixing`` are made.

    python -m benchmarks.sensitivity tiny-moe tiny-dense tiny-lfm3 build/checkpoints/dense --output build/found.json

In: checkpoints. Out: JSON: for every unit (``mixing/units.py``: what is stored alike) the KL divergence that quantizing
it alone causes, by ``refit`` and by ``gptq`` on the default calibration text, and what the estimates know of it; the
priors: by class of unit, KL over that (``lfm2_export/mixing/prior.py``); and how well each estimate ranks the units of
a model, its prior fitted to the others: Spearman's correlation with the measured KL, and the root mean square of the
logarithm of what it is off by, as a factor.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from statistics import fmean, pstdev
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from lfm2_export.backends.executorch import plan as executorch_plan
from lfm2_export.backends.onnx.plan import make_plan
from lfm2_export.backends.weights.widths import Counted
from lfm2_export.calibration.request import Calibration
from lfm2_export.calibration.statistics import Statistics
from lfm2_export.calibration.text import DEFAULT
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.families.tensors import HEAD
from lfm2_export.mixing.estimate import relative_errors, share_of
from lfm2_export.mixing.informed import Informed
from lfm2_export.mixing.measured import Meter, read_published
from lfm2_export.mixing.prior import class_of
from lfm2_export.mixing.shares import block_shares
from lfm2_export.mixing.units import UnitShape, make_space
from lfm2_export.parity.sample import read_sample
from lfm2_export.progress import Progress
from lfm2_export.quant.algorithms import CALIBRATED_ALGORITHM, DEFAULT_ALGORITHM, get_algorithm
from lfm2_export.quant.formats import FloatArray
from lfm2_export.quant.schemes import get_scheme

TOKENS = 4096
_ROUNDS = 100  # of alternating means, which converge long before
# By algorithm: what a record calls the KL, and what is known of a matrix before its class is.
ESTIMATES = {"without data": ("kl", "known"), "informed": ("calibrated_kl", "informed")}


def rows_of(checkpoint: Checkpoint, text: Path | None, *, first: int, count: int) -> list[np.ndarray]:
    """Windows of the text: ``count`` tokens behind ``first`` tokens."""
    sample = read_sample(checkpoint, text, max_tokens=1 << 20, context_length=512)
    rows = [window.inputs for window in sample.windows if len(window.inputs) == 512]
    return rows[first // 512 : (first + count) // 512]


def measure(name: str, *, tokens: int = TOKENS) -> list[dict[str, Any]]:
    """A record for every unit."""
    checkpoint = open_checkpoint(name)
    calibration = Calibration.asked(checkpoint, DEFAULT, None)
    assert calibration is not None
    with TemporaryDirectory() as folder:
        statistics = calibration.collected(Path(folder), Progress())
        meter = Meter(checkpoint, rows_of(checkpoint, None, first=0, count=tokens))
        return list(records_of(checkpoint, statistics, meter))


def records_of(checkpoint: Checkpoint, statistics: Statistics, meter: Meter) -> Iterator[dict[str, Any]]:
    units = [*make_space(checkpoint.config, get_scheme("q4"), make_plan, Counted.FILE).units, *_heads(checkpoint)]
    informed, refit = Informed(checkpoint, statistics), get_algorithm(DEFAULT_ALGORITHM)
    guessed, measured = block_shares(checkpoint), block_shares(checkpoint, statistics)
    for unit in units:
        errors = [relative_errors(checkpoint, unit, weight, refit)[unit.formats[0]] for weight in unit.weights]
        growths = [informed.growth_of(weight) for weight in unit.weights]
        first = unit.weights[0]
        yield {
            "checkpoint": checkpoint.name,
            "unit": unit.name,
            "class": class_of(first.part, first.matrix),
            "layer": first.layer,
            "format": unit.formats[0].to_json(),
            "known": sum(errors) * share_of(first, guessed),
            "informed": sum(map(prod, zip(errors, growths, strict=True))) * share_of(first, measured),
            "kl": _kl(meter, unit),
            "calibrated_kl": _kl(meter, unit, statistics),
        }


def _heads(checkpoint: Checkpoint) -> list[UnitShape]:
    """A head that is a copy of the token table, which a .pte has: its width is a choice of its own."""
    if not checkpoint.config.tie_word_embeddings:
        return []
    space = make_space(checkpoint.config, get_scheme("8da4w"), executorch_plan.make_plan, Counted.FILE)
    return [unit for unit in space.units if HEAD in unit.tensors]


def _kl(meter: Meter, unit: UnitShape, statistics: Statistics | None = None) -> float:
    def quantized(source: str) -> FloatArray:
        name = DEFAULT_ALGORITHM if statistics is None else CALIBRATED_ALGORITHM
        algorithm = get_algorithm(name).fitted(None if statistics is None else statistics.of(source))
        return algorithm(read_published(meter.checkpoint, source), unit.formats[0]).dequantize()

    return meter.kl({source: quantized(source) for source in unit.tensors}, first_layer=unit.weights[0].layer)


def prior(records: Sequence[Mapping[str, Any]], kl: str, known: str) -> dict[str, float]:
    """By class: KL over what is known, as a factor for the class times one for the checkpoint, fitted to the
    logarithms; classes that a checkpoint lacks do not distort the others."""
    ratios = [
        (record["class"], record["checkpoint"], math.log(record[kl] / record[known]))
        for record in records
        if record[known] and record[kl]
    ]
    by_class = {name: 0.0 for name, _, _ in ratios}
    by_checkpoint = {name: 0.0 for _, name, _ in ratios}
    for _ in range(_ROUNDS):
        for name in by_checkpoint:
            by_checkpoint[name] = fmean(ratio - by_class[kind] for kind, other, ratio in ratios if other == name)
        for kind in by_class:
            by_class[kind] = fmean(ratio - by_checkpoint[name] for other, name, ratio in ratios if other == kind)
    middle = fmean(by_class.values())
    return {kind: float(f"{math.exp(value - middle):.3g}") for kind, value in sorted(by_class.items())}


def ranks(records: Sequence[Mapping[str, Any]], kl: str, known: str) -> dict[str, dict[str, float]]:
    """By checkpoint: how well an estimate whose prior is fitted to the other ones foretells the KL of layers' units."""
    found = {}
    for name in dict.fromkeys(record["checkpoint"] for record in records):
        fitted = prior([record for record in records if record["checkpoint"] != name], kl, known)
        units = [record for record in records if record["checkpoint"] == name and record["layer"] is not None]
        estimated = np.array([record[known] * fitted.get(record["class"], 1.0) for record in units])
        measured = np.array([record[kl] for record in units])
        found[name] = {
            "spearman": round(float(np.corrcoef(_places(estimated), _places(measured))[0, 1]), 3),
            "off": round(math.exp(pstdev(np.log(measured / estimated))), 2),
        }
    return found


def _places(values: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    records = [record for name in options.checkpoints for record in measure(name)]
    found = {
        "priors": {name: prior(records, *keys) for name, keys in ESTIMATES.items()},
        "ranks": {name: ranks(records, *keys) for name, keys in ESTIMATES.items()},
    }
    options.output.write_text(json.dumps({**found, "records": records}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
