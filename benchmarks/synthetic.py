"""Random checkpoints in the published format, at any shape: for benchmarks at real sizes and for the tests' small ones.

In: a raw config.json (or the name of a real model's shape) and a seed. Out: a folder that reads like a download.
Tensors are drawn and written one by one, in some 20 MB of memory, at the speed of the disk. The weights are no
noise alone: norms lie near 1, linears near 1/sqrt(in), and routers are wide enough that some experts clearly win,
and all of them now and then.

    python benchmarks/synthetic.py 8b-a1b FOLDER
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lfm2_export.errors import Lfm2ExportError
from lfm2_export.families import find_family
from lfm2_export.families.lfm2_dspark import own_tensors
from lfm2_export.families.tensors import ModelTensor, Part, TensorClass, Tensors
from lfm2_export.resources import check_disk
from lfm2_export.source import ASSETS

_ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4}
# Larger tensors repeat a pool of this many normal values from a random start on: drawing 10 GB of them takes minutes.
_POOL = 1_000_003
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def _layer_types(layers: int, attention: tuple[int, ...]) -> list[str]:
    return ["full_attention" if layer in attention else "conv" for layer in range(layers)]


_BASE: dict[str, Any] = {
    "vocab_size": 65536,
    "num_key_value_heads": 8,
    "conv_L_cache": 3,
    "conv_bias": False,
    "norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 128_000,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 7,
    "pad_token_id": 0,
}
_DENSE = {**_BASE, "model_type": "lfm2", "architectures": ["Lfm2ForCausalLM"], "block_auto_adjust_ff_dim": False}
_MOE = {
    **_BASE,
    "model_type": "lfm2_moe",
    "architectures": ["Lfm2MoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "moe_intermediate_size": 1792,
    "num_attention_heads": 32,
    "num_dense_layers": 2,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "use_expert_bias": True,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}
_SIXTEEN = _layer_types(16, (2, 5, 8, 10, 12, 14))
_THIRTY = _layer_types(30, (2, 5, 9, 13, 17, 21, 24, 27))

# The shapes of published models; "8b-head" is the first six layers of the 8B, for tests of memory at real widths.
REAL_SHAPES: dict[str, dict[str, Any]] = {
    "350m": {
        **_DENSE,
        "hidden_size": 1024,
        "intermediate_size": 4608,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "layer_types": _SIXTEEN,
    },
    "1.2b": {
        **_DENSE,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "layer_types": _SIXTEEN,
    },
    "2.6b": {
        **_DENSE,
        "hidden_size": 2048,
        "intermediate_size": 10752,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
        "layer_types": _THIRTY,
    },
    "8b-a1b": {**_MOE, "num_hidden_layers": 24, "layer_types": _layer_types(24, (2, 6, 10, 14, 18, 21))},
    "8b-head": {**_MOE, "num_hidden_layers": 6, "layer_types": _layer_types(6, (2,))},
}


def _drafter(shape: str, layers: list[int]) -> dict[str, Any]:
    """The config of a drafter for a real shape, as the 1.2B's is published; other targets have other widths."""
    target = REAL_SHAPES[shape]
    return {
        "architectures": ["Lfm2DSparkDraftModel"],
        "model_type": "qwen3",
        "vocab_size": target["vocab_size"],
        "hidden_size": target["hidden_size"],
        "intermediate_size": 3 * target["hidden_size"],
        "num_hidden_layers": 5,
        "num_attention_heads": target["num_attention_heads"],
        "num_key_value_heads": target["num_key_value_heads"],
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000_000.0,
        "rope_is_neox_style": False,
        "max_position_embeddings": target["max_position_embeddings"],
        "block_size": 9,
        "markov_rank": 256,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "dflash_config": {
            "mask_token_id": 64402,
            "target_layer_ids": layers,
            "num_target_layers": target["num_hidden_layers"],
        },
    }


# The 350M's is made up: none is published.
DRAFTER_SHAPES = {
    "1.2b-dspark": _drafter("1.2b", [2, 5, 8, 11, 14]),
    "350m-dspark": _drafter("350m", [2, 5, 8, 11, 14]),
}


def write_random_checkpoint(
    folder: Path | str,
    raw_config: Mapping[str, Any],
    *,
    seed: int,
    dtype: str = "BF16",
    fused: bool = False,
    shards: int = 1,
    tokenizer_from: str | None = None,
) -> Path:
    """Writes config.json and random weights; one run of a seed equals the next, whatever dtype, layout and shards.

    ``fused`` stores the experts as transformers 5 does. ``tokenizer_from`` names a bundled checkpoint whose tokenizer
    files are copied. Memory stays at some 20 MB, so real widths can be written too.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(raw_config), indent=2))
    family = find_family(raw_config, "config.json")
    config = family.parse_config(raw_config)
    published = own_tensors(config) if config.drafter is not None else family.tensors(config)
    stored = {name: [name] for name in published}
    shapes = {name: tensor.shape for name, tensor in published.items()}
    if fused:
        for name, tensor in family.fused_tensors(config).items():
            stored = {n: parts for n, parts in stored.items() if n not in tensor.parts}
            stored[name] = _parts_in_order(tensor.parts)
            shapes[name] = tensor.shape
    _write_shards(folder, stored, shapes, published, dtype, shards, seed)
    if tokenizer_from is not None:
        for name in _TOKENIZER_FILES:
            shutil.copy(ASSETS / tokenizer_from / name, folder / name)
    return folder


def _parts_in_order(parts: Mapping[str, Any]) -> list[str]:
    return sorted(parts, key=lambda name: (parts[name].expert, parts[name].start))


def _write_shards(
    folder: Path,
    stored: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[int, ...]],
    published: Tensors,
    dtype: str,
    shards: int,
    seed: int,
) -> None:
    pool = _Pool(seed)
    names = list(stored)
    size = math.ceil(len(names) / shards)
    weight_map: dict[str, str] = {}
    for index in range(shards):
        chosen = names[index * size : (index + 1) * size]
        file = "model.safetensors" if shards == 1 else f"model-{index + 1:05}-of-{shards:05}.safetensors"
        weight_map |= dict.fromkeys(chosen, file)
        with open(folder / file, "wb") as out:
            write_header(out, {name: (dtype, shapes[name]) for name in chosen})
            for part in (part for name in chosen for part in stored[name]):
                _write_tensor(out, published[part], dtype, seed, pool)
    if shards > 1:
        index_json = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_json))


def write_header(out: BinaryIO, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors header for tensors that will follow in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, (dtype, shape) in tensors.items():
        end = begin + math.prod(shape) * _ITEMSIZE[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    out.write(len(header).to_bytes(8, "little") + header)


def _write_tensor(out: BinaryIO, tensor: ModelTensor, dtype: str, seed: int, pool: _Pool) -> None:
    mean, scale = _distribution(tensor)
    count = math.prod(tensor.shape)
    rng = np.random.default_rng([seed, *tensor.name.encode()])
    if count <= _POOL:
        values = rng.standard_normal(count, dtype=np.float32)
        out.write(to_stored(values * np.float32(scale) + np.float32(mean), dtype))
        return
    stored = pool.stored(mean, scale, dtype)
    start = int(rng.integers(stored.size))
    while count:
        block = stored[start : start + count]
        out.write(block)
        count -= block.size
        start = 0


class _Pool:
    """Normal values, converted once per distribution and dtype."""

    def __init__(self, seed: int):
        self._values = np.random.default_rng(seed).standard_normal(_POOL, dtype=np.float32)
        self._stored: dict[tuple[float, float, str], np.ndarray] = {}

    def stored(self, mean: float, scale: float, dtype: str) -> np.ndarray:
        key = (mean, scale, dtype)
        if key not in self._stored:
            self._stored[key] = to_stored(self._values * np.float32(scale) + np.float32(mean), dtype)
        return self._stored[key]


def _distribution(tensor: ModelTensor) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values."""
    if tensor.part is Part.NORMS:
        return 1.0, 0.1
    if tensor.kind is TensorClass.EXPERT_BIAS:
        return 0.0, 0.05
    if len(tensor.shape) == 1:
        return 0.0, 0.1
    wide = tensor.kind in (TensorClass.ROUTER, TensorClass.EMBEDDING, TensorClass.HEAD)
    return 0.0, (2.0 if wide else 1.0) / math.sqrt(tensor.shape[-1])


def to_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values in a stored dtype; BF16 (round to nearest even) as its bits in uint16."""
    if dtype == "BF16":
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype])


def stored_bytes(raw_config: Mapping[str, Any], dtype: str = "BF16") -> int:
    """Bytes of all weights of a checkpoint with this config."""
    family = find_family(raw_config, "config.json")
    config = family.parse_config(raw_config)
    tensors = own_tensors(config) if config.drafter is not None else family.tensors(config)
    return sum(math.prod(tensor.shape) for tensor in tensors.values()) * _ITEMSIZE[dtype]


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a random checkpoint of a real model's shape.")
    parser.add_argument("shape", choices=sorted(REAL_SHAPES | DRAFTER_SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=4)
    options = parser.parse_args()
    raw_config = (REAL_SHAPES | DRAFTER_SHAPES)[options.shape]
    try:
        check_disk(options.folder, stored_bytes(raw_config), purpose="the checkpoint")
    except Lfm2ExportError as error:
        print(f"synthetic: {error}", file=sys.stderr)
        return error.exit_code
    write_random_checkpoint(options.folder, raw_config, seed=options.seed, shards=options.shards)
    return 0


if __name__ == "__main__":
    sys.exit(main())
