"""What quantizing one matrix alone costs, on any number of checkpoints: from this the prior of ``mixing`` is made.

    python -m benchmarks.sensitivity tiny-moe tiny-dense build/checkpoints/moe --output build/sensitivity.json

In: checkpoints. Out: JSON: for every matrix (an expert stack counts as one) and format: the KL divergence that
quantizing it alone causes, the relative squared error of its values and of its outputs; and the prior: by class of
matrix, KL over relative error, the geometric mean over layers and checkpoints (``lfm2_export/mixing/prior.py``).
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from lfm2_export.backends.onnx.plan import make_plan
from lfm2_export.backends.weights.widths import Counted
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.mixing.measured import Meter
from lfm2_export.mixing.prior import class_of
from lfm2_export.mixing.units import make_space
from lfm2_export.parity.sample import read_sample
from lfm2_export.quant.algorithms import get_algorithm
from lfm2_export.quant.formats import FloatArray
from lfm2_export.quant.schemes import get_scheme

TOKENS = 4096
FORMATS = ((4, 32), (4, 128), (8, 128))


def rows_of(checkpoint: Checkpoint, text: Path | None, *, first: int, count: int) -> list[np.ndarray]:
    """Windows of the text: ``count`` tokens behind ``first`` tokens."""
    sample = read_sample(checkpoint, text, max_tokens=1 << 20, context_length=512)
    rows = [window.inputs for window in sample.windows if len(window.inputs) == 512]
    return rows[first // 512 : (first + count) // 512]


class Hessians(TorchFunctionMode):
    """Sums of x xT of what goes into every matrix, by where the matrix lies in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, FloatArray] = {}

    def __torch_function__(self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            where = args[1].data_ptr()
            self.found[where] = self.found.get(where, 0) + (x.T @ x).numpy()
        return func(*args, **(kwargs or {}))


def hessians(meter: Meter, checkpoint: Checkpoint, rows: Sequence[np.ndarray]) -> dict[str, FloatArray]:
    """By published name."""
    with torch.inference_mode(), Hessians() as seen:
        for row in rows:
            meter.model(torch.from_numpy(row)[None], use_cache=False)
    found = {}
    for name, tensor in checkpoint.model_tensors.items():
        if len(tensor.shape) == 2:
            where = meter._values(name).data_ptr()
            if tensor.matrix == "w3" and tensor.expert is not None:  # computed together with w1
                where = meter._values(name.replace(".w3.", ".w1.")).data_ptr()
            if where in seen.found:
                found[name] = seen.found[where]
    return found


def measure(name: str, *, tokens: int = TOKENS) -> list[dict[str, Any]]:
    """A record for every matrix and format."""
    checkpoint = open_checkpoint(name)
    rows = rows_of(checkpoint, None, first=0, count=tokens)
    meter, refit = Meter(checkpoint, rows), get_algorithm("refit")
    space = make_space(checkpoint.config, get_scheme("q4"), make_plan, Counted.FILE)
    seen = hessians(meter, checkpoint, rows)
    found = []
    for unit in space.units:
        for weight in unit.weights:
            before = {source: checkpoint.read(source) for source in weight.sources}
            for form in unit.formats:
                if (form.bits, form.group_size) not in FORMATS:
                    continue
                after = {source: refit(values, form).dequantize() for source, values in before.items()}
                found.append(
                    {
                        "checkpoint": name,
                        "weight": weight.name,
                        "unit": unit.name,
                        "class": class_of(weight.part, weight.matrix, weight.layer),
                        "layer": weight.layer,
                        "layers": checkpoint.config.num_hidden_layers,
                        "bits": form.bits,
                        "group_size": form.group_size,
                        "error": relative_error(before, after),
                        "output_error": output_error(before, after, seen),
                        "kl": meter.kl(after, first_layer=weight.layer),
                    }
                )
                print(found[-1], flush=True)
    return found


def relative_error(before: Mapping[str, FloatArray], after: Mapping[str, FloatArray]) -> float:
    lost = sum(float(np.square(before[name] - after[name]).sum(dtype=np.float64)) for name in before)
    return lost / sum(float(np.square(values).sum(dtype=np.float64)) for values in before.values())


def output_error(
    before: Mapping[str, FloatArray], after: Mapping[str, FloatArray], seen: Mapping[str, FloatArray]
) -> float | None:
    """Relative squared error of the outputs: trace(dW H dWT) over trace(W H WT)."""
    if not all(name in seen for name in before):
        return None
    lost = sum(_energy(before[name] - after[name], seen[name]) for name in before)
    return lost / sum(_energy(before[name], seen[name]) for name in before)


def _energy(weight: FloatArray, hessian: FloatArray) -> float:
    return float(((weight @ hessian) * weight).sum(dtype=np.float64))


def prior(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By class, at 4 bits in groups of 32: the geometric mean of KL over relative error, every checkpoint's in units of
    its own mean."""
    found: dict[str, list[float]] = defaultdict(list)
    for checkpoint in dict.fromkeys(record["checkpoint"] for record in records):
        ratios = [
            (record["class"], record["kl"] / record["error"])
            for record in _at(records, checkpoint=checkpoint, bits=4, group_size=32)
        ]
        middle = geometric_mean(ratio for _, ratio in ratios)
        for name, ratio in ratios:
            found[name].append(ratio / middle)
    return {name: float(f"{geometric_mean(ratios):.3g}") for name, ratios in sorted(found.items())}


def _at(records: Sequence[Mapping[str, Any]], **wanted: object) -> Iterator[Mapping[str, Any]]:
    return (record for record in records if all(record[key] == value for key, value in wanted.items()))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    records = [record for name in options.checkpoints for record in measure(name)]
    found = {"prior": prior(records), "records": records}
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["prior"], indent=1))


if __name__ == "__main__":
    main()
