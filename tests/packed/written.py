"""Packed checkpoints as compressed-tensors and GPTQModel save them, made of another checkpoint with any codes.

Codes, scales and zero points are drawn, so the weights are no good; the values they stand for are returned with them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.families.tensors import ModelTensor, TensorClass
from lfm2_export.safetensors_file import read_shard

QUANTIZED = (TensorClass.LINEAR, TensorClass.EXPERTS)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """``group``: None for one scale a row. ``dtype``: of the scales."""

    bits: int = 4
    group: int | None = 32
    symmetric: bool = True
    dtype: torch.dtype = torch.float16
    only: tuple[str, ...] = ("",)  # parts of names


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Codes [rows, columns], zero points and scales [rows, groups], all unsigned integers but the scales."""

    codes: np.ndarray
    zero_points: np.ndarray
    scales: torch.Tensor

    def values(self) -> np.ndarray:
        """float32 [rows, columns]."""
        size = self.codes.shape[1] // self.scales.shape[1]
        zero_points, scales = (np.repeat(one, size, axis=1) for one in (self.zero_points, self.scales.float().numpy()))
        return ((self.codes.astype(np.int64) - zero_points) * scales.astype(np.float64)).astype(np.float32)


def draw(rng: np.random.Generator, shape: tuple[int, ...], grid: Grid, *, least_zero: int = 0) -> Drawn:
    rows, columns = shape
    groups = columns // (grid.group or columns)
    middle = 1 << (grid.bits - 1)
    zero_points = rng.integers(least_zero, 2 * middle, (rows, groups)) if not grid.symmetric else None
    scales = torch.from_numpy(rng.uniform(0.5, 1.5, (rows, groups)) * 0.05 / middle).to(grid.dtype)
    return Drawn(
        codes=rng.integers(0, 2 * middle, shape),
        zero_points=np.full((rows, groups), middle) if zero_points is None else zero_points,
        scales=scales,
    )


def pack(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Neighbours in a row into int32 words, the first in the lowest bits; a last word may be partly empty."""
    per_word = 32 // bits
    padded = np.pad(codes.astype(np.uint64), [(0, 0), (0, -codes.shape[1] % per_word)])
    parts = padded.reshape(len(codes), -1, per_word)
    words = sum(parts[:, :, index] << np.uint64(bits * index) for index in range(per_word))
    return torch.from_numpy(np.ascontiguousarray(words, np.uint32).view(np.int32))


def as_compressed_tensors(layer: str, drawn: Drawn, grid: Grid) -> dict[str, torch.Tensor]:
    found = {
        "weight_packed": pack(drawn.codes, grid.bits),
        "weight_scale": drawn.scales,
        "weight_shape": torch.tensor(drawn.codes.shape),
    }
    if not grid.symmetric:
        found["weight_zero_point"] = pack(drawn.zero_points.T, grid.bits).T.contiguous()
    return {f"{layer}.{name}": tensor for name, tensor in found.items()}


def as_gptq(layer: str, drawn: Drawn, grid: Grid, *, less: int = 1) -> dict[str, torch.Tensor]:
    columns = drawn.codes.shape[1]
    found = {
        "qweight": pack(drawn.codes, grid.bits).T.contiguous(),
        "qzeros": pack(drawn.zero_points.T - less, grid.bits),
        "scales": drawn.scales.T.contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // (grid.group or columns),
    }
    return {f"{layer}.{name}": tensor for name, tensor in found.items()}


def compressed_tensors_section(*grids: Grid) -> dict[str, Any]:
    def weights(grid: Grid) -> dict[str, Any]:
        strategy = "channel" if grid.group is None else "group"
        stated = {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, "strategy": strategy}
        return {**stated, "group_size": grid.group, "dynamic": False, "observer": "minmax"}

    groups = {
        f"group_{index}": {"targets": ["Linear"], "weights": weights(grid), "input_activations": None}
        for index, grid in enumerate(grids)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def gptq_section(grid: Grid, *, checkpoint_format: str = "gptq") -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": grid.bits,
        "group_size": grid.group or -1,
        "sym": grid.symmetric,
        "desc_act": False,
        "checkpoint_format": checkpoint_format,
        "pack_dtype": "int32",
    }


Arrange = Callable[[str, Drawn, Grid], dict[str, torch.Tensor]]


def write(
    folder: Path,
    original: Checkpoint | str | Path,
    section: Mapping[str, Any],
    arrange: Arrange,
    *grids: Grid,
    kinds: tuple[TensorClass, ...] = QUANTIZED,
    least_zero: int = 0,
) -> dict[str, np.ndarray]:
    """Writes the checkpoint; returns the values of each weight that is packed. A weight has the first grid of which a
    part is in its name."""
    opened = original if isinstance(original, Checkpoint) else open_checkpoint(original)
    shutil.copytree(opened.path, folder)
    state: dict[str, torch.Tensor] = {}
    values: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(0)
    for tensor in opened.model_tensors.values():
        if tensor.kind in kinds and (grid := _grid(tensor, grids)):
            drawn = draw(rng, tensor.shape, grid, least_zero=least_zero)
            state |= arrange(tensor.name.removesuffix(".weight"), drawn, grid)
            values[tensor.name] = drawn.values()
        else:
            state[tensor.name] = torch.from_numpy(opened.read(tensor.name))
    save_file(state, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": section}))
    return values


def _grid(tensor: ModelTensor, grids: tuple[Grid, ...]) -> Grid | None:
    return next((grid for grid in grids if any(part in tensor.name for part in grid.only)), None)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Changes the stored tensors."""
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
    read_shard(path)
