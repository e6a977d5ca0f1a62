"""Small random checkpoints of both families for tests; the writer is the benchmarks' own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.synthetic import to_stored, write_header, write_random_checkpoint
from lfm2_export.source import ASSETS

__all__ = ["tiny_config", "to_stored", "write_header", "write_random_checkpoint"]


# What published configs say of the half rotation; see families/lfm3.py.
_LFM3: dict[str, Any] = {
    "architectures": ["Lfm3ForCausalLM"],
    "layer_types": ["conv", "sliding_attention", "full_attention", "sliding_attention", "conv"],
    "conv_L_cache": 7,
    "head_dim": 32,
    "sliding_window": 6,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.5, "rope_theta": 1_000_000.0, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"},
    },
}


def tiny_config(model_type: str = "lfm2_moe", **overrides: Any) -> dict[str, Any]:
    """The raw config.json of a small model; ``overrides`` replace or add keys, None removes one."""
    config: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": 131,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"],
        "conv_L_cache": 3,
        "conv_bias": False,
        "norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if model_type == "lfm2":
        config |= {"architectures": ["Lfm2ForCausalLM"], "block_auto_adjust_ff_dim": False}
    elif model_type == "lfm3":
        config |= _LFM3
        del config["rope_theta"]
    else:
        config |= {
            "architectures": ["Lfm2MoeForCausalLM"],
            "moe_intermediate_size": 32,
            "num_dense_layers": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "use_expert_bias": True,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
        }
    config |= overrides
    return {key: value for key, value in config.items() if value is not None}


def with_a_token_too_many(folder: Path) -> Path:
    """A copy of tiny-dense whose tokenizer has a token, a frequent one, that its weights lack."""
    shutil.copytree(ASSETS / "tiny-dense", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["\u0120the"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder
