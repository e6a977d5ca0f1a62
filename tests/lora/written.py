"""Adapters as peft writes them, of random factors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lfm2_export.checkpoint import open_checkpoint

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "LiquidAI/LFM2-350M",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "in_proj", "w1"],
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "inference_mode": True,
    "modules_to_save": None,
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "peft_version": "0.21.0",
}


def write_adapter(
    folder: Path, base: Path, modules: Sequence[str], *, ranks: dict[str, int] | None = None, **changes: Any
) -> dict[str, torch.Tensor]:
    """An adapter as peft writes it, of random factors; the product B A of each module in float64."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    tensors, products = {}, {}
    generator = torch.Generator().manual_seed(5)
    for module in modules:
        rows, columns = open_checkpoint(base).tensors[f"{module}.weight"].shape
        rank = (ranks or {}).get(module, changes.get("r", CONFIG["r"]))
        a, b = torch.randn(rank, columns, generator=generator) / 8, torch.randn(rows, rank, generator=generator) / 8
        tensors |= {f"base_model.model.{module}.lora_{name}.weight": one for name, one in (("A", a), ("B", b))}
        products[module] = b.double() @ a.double()
    save_file(tensors, folder / "adapter_model.safetensors")
    return products
