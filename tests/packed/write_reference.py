"""Writes ``reference.safetensors``: small layers as compressed-tensors itself packs them, and as it reads them again.

    pip install compressed-tensors
    python -m tests.packed.write_reference

``LAYER.weight*`` is what it packed; ``LAYER.float32`` what it takes that for with scales as float32 numbers;
``LAYER.rounded`` with the scales as they are, in whose dtype it computes. The library is no dependency: its format
does not change, and the file stays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.packed.written import Grid

PATH = Path(__file__).parent / "reference.safetensors"
SHAPE = (20, 64)  # 20: no multiple of the 8 zero points in a word
LAYERS = {
    "int4": Grid(dtype=torch.bfloat16),
    "int4_rows": Grid(group=None),
    "int4_zero_points": Grid(symmetric=False, dtype=torch.bfloat16),
    "int8": Grid(bits=8, group=16, dtype=torch.float32),
    "int8_zero_points": Grid(bits=8, group=None, symmetric=False),
}


def packed(layer: str, grid: Grid, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors import PackedQuantizationCompressor as Compressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    strategy: dict[str, Any] = {"strategy": "channel"} if grid.group is None else {"group_size": grid.group}
    args = QuantizationArgs(num_bits=grid.bits, symmetric=grid.symmetric, **strategy)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    groups = weight.reshape(len(weight), -1, grid.group or weight.shape[1])
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    state = {"weight": weight.to(grid.dtype), "weight_scale": scale.to(grid.dtype)}
    if not grid.symmetric:
        state["weight_zero_point"] = zero_point.to(torch.int8)
    state = Compressor.compress(state, scheme)
    whole = Compressor.decompress({**state, "weight_scale": state["weight_scale"].float()}, scheme)["weight"]
    rounded = Compressor.decompress(dict(state), scheme)["weight"]
    found = {**state, "float32": whole, "rounded": rounded}
    return {f"{layer}.{name}": tensor.contiguous() for name, tensor in found.items()}


def main() -> None:
    torch.manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    for layer, grid in LAYERS.items():
        state |= packed(layer, grid, torch.randn(SHAPE))
    save_file(state, PATH)


if __name__ == "__main__":
    main()
