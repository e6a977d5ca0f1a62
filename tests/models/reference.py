"""The same random weights in transformers' own class and in ours, over the configs that both must agree on.

Weights are scaled so that logits lie within a few units: an absolute error then says something.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lfm2_export.families import get_family
from lfm2_export.models import get_net
from lfm2_export.models.decoder import DecoderForCausalLM
from tests.checkpoints import tiny_config

TOLERANCE = 2e-5  # found were up to 5e-6, on lfm3, whose sandwich norms undo small scales, 1.2e-5
THEIR_CONFIGS: dict[str, Any] = {
    "lfm2": transformers.Lfm2Config,
    "lfm2_moe": transformers.Lfm2MoeConfig,
    "lfm3": transformers.Lfm3Config,
}
# Matrices have entries of about gain / sqrt(in). So logits reach 4 to 8, of which rounding alone is about 3e-6.
GAIN, GAINS = 0.5, {"embed_tokens": 1.0, "lm_head": 1.0, "gate": 2.0}
CONV, ATTENTION = "conv", "full_attention"

# One entry per peculiarity; the tiny config has conv and attention layers, dense and MoE ones.
DENSE_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    **{f"conv_L_cache_{width}": {"conv_L_cache": width} for width in (2, 4, 5, 6, 7)},
    "conv_bias": {"conv_bias": True},
    "untied": {"tie_word_embeddings": False},
    "untied_by_older_name": {"tie_embedding": False},
    "one_kv_head": {"num_key_value_heads": 1},
    "as_many_kv_heads_as_heads": {"num_key_value_heads": 4},
    "one_head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "head_dim_set_apart": {"head_dim": 24},
    "head_dim_small": {"head_dim": 2, "num_attention_heads": 3, "num_key_value_heads": 3},
    "no_conv_layer": {"layer_types": [ATTENTION] * 5},
    "no_attention_layer": {"layer_types": [CONV] * 5},
    "one_layer": {"layer_types": [ATTENTION], "num_hidden_layers": 1},
    "attention_first_and_last": {"layer_types": [ATTENTION, CONV, CONV, CONV, ATTENTION]},
    "full_attn_idxs": {"layer_types": None, "full_attn_idxs": [3, 0]},
    "all_attention_by_default": {"layer_types": None},
    "rope_theta_in_rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "rope_theta_low": {"rope_theta": 100.0},
    "auto_adjusted": {"block_auto_adjust_ff_dim": True, "block_multiple_of": 16},
    "auto_adjusted_and_multiplied": {
        "block_auto_adjust_ff_dim": True,
        "block_multiple_of": 7,
        "block_ffn_dim_multiplier": 1.3,
    },
    "block_ff_dim": {"block_ff_dim": 72},
    "norm_eps": {"norm_eps": 0.1},
}
MOE_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_expert_bias": {"use_expert_bias": False},
    "norm_topk_prob_off": {"norm_topk_prob": False},
    "routed_scaling_factor": {"routed_scaling_factor": 2.5},
    "routed_scaling_factor_without_norm": {"routed_scaling_factor": 0.5, "norm_topk_prob": False},
    "one_expert_per_token": {"num_experts_per_tok": 1},
    "one_expert_per_token_without_norm": {"num_experts_per_tok": 1, "norm_topk_prob": False, "use_expert_bias": False},
    "all_experts_per_token": {"num_experts_per_tok": 4},
    "one_expert": {"num_experts": 1, "num_experts_per_tok": 1},
    "all_dense": {"num_dense_layers": 5},
    "more_dense_layers_than_layers": {"num_dense_layers": 9},
    "no_dense_layer": {"num_dense_layers": 0},
    "no_attention_layer": {"layer_types": [CONV] * 5},
    "no_conv_layer": {"layer_types": [ATTENTION] * 5},
    "everything_at_once": {
        "conv_bias": True,
        "conv_L_cache": 7,
        "use_expert_bias": False,
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.5,
        "head_dim": 8,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    },
}
SLIDING = "sliding_attention"
_FULL, _WHOLE = {"rope_type": "default", "rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 1e4}
LFM3_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_sandwich_norm": {"use_sandwich_norm": False},
    "no_gate": {"use_attention_gate": False},
    "attention_bias": {"attention_bias": True, "conv_bias": True},
    "untied": {"tie_word_embeddings": False},
    "window_of_2": {"sliding_window": 2},  # with 1, transformers' cache keeps everything
    "window_wider_than_the_text": {"sliding_window": 100},
    "no_sliding_layer": {"layer_types": [CONV, ATTENTION, CONV, ATTENTION, CONV], "sliding_window": None},
    "only_sliding_layers": {"layer_types": [SLIDING] * 5},
    "no_conv_layer": {"layer_types": [ATTENTION, SLIDING, ATTENTION, SLIDING, SLIDING]},
    "whole_heads": {"rope_parameters": {ATTENTION: _FULL, SLIDING: _WHOLE}},
    "both_in_part": {
        "rope_parameters": {
            ATTENTION: {**_FULL, "partial_rotary_factor": 0.25},
            SLIDING: {**_WHOLE, "partial_rotary_factor": 0.75, "rope_type": "proportional"},
        }
    },
    "by_default": {"rope_parameters": None, "layer_types": None, "num_hidden_layers": 6, "head_dim": None},
    "width_3": {"conv_L_cache": 3, "num_key_value_heads": 1, "norm_eps": 1e-6},
}
CASES = {f"lfm2-{name}": ("lfm2", changes) for name, changes in DENSE_CASES.items()} | {
    f"lfm2_moe-{name}": ("lfm2_moe", changes) for name, changes in MOE_CASES.items()
}
CASES |= {f"lfm3-{name}": ("lfm3", changes) for name, changes in LFM3_CASES.items()}


def their_config(raw: Mapping[str, Any]) -> Any:
    """transformers' config object; its constructor writes into nested objects, hence the copy."""
    kind = THEIR_CONFIGS[raw["model_type"]]
    return kind(**{key: copy.deepcopy(value) for key, value in raw.items() if key != "model_type"})


def their_model(raw: Mapping[str, Any], *, seed: int = 0, attention: str = "sdpa", experts: str = "eager") -> Any:
    """transformers' model with random weights. Its faster experts refuse widths that are not multiples of 4."""
    kind = {
        "lfm2": transformers.Lfm2ForCausalLM,
        "lfm2_moe": transformers.Lfm2MoeForCausalLM,
        "lfm3": transformers.Lfm3ForCausalLM,
    }[raw["model_type"]]
    reference = get_family(raw["model_type"]).reference_config(raw)
    raw = raw if reference is None else reference.raw
    model = kind._from_config(their_config(raw), attn_implementation=attention, experts_implementation=experts)
    model.eval()
    randomize_(model, seed)
    return model


def our_model(raw: Mapping[str, Any], theirs: nn.Module | None = None, *, seed: int = 0) -> DecoderForCausalLM:
    """Our model with the weights of ``theirs``, or random ones."""
    model = get_net(raw["model_type"])(get_family(raw["model_type"]).parse_config(raw)).eval()
    if theirs is None:
        randomize_(model, seed)
    else:
        model.load_state_dict({published(name): value for name, value in theirs.state_dict().items()}, strict=True)
    return model


def published(name: str) -> str:
    """What checkpoints call a parameter of transformers' module."""
    return name.replace(".self_attn.g_proj.", ".self_attn.gate_proj.")


def randomize_(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            mean, scale = _distribution(name, tensor)
            if scale:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + mean)


def _distribution(name: str, tensor: Tensor) -> tuple[float, float]:
    if "inv_freq" in name:
        return 0.0, 0.0
    if "norm" in name:
        return 1.0, 0.2
    if name.endswith("expert_bias"):
        return 0.0, 0.2
    if name.endswith(".bias"):
        return 0.0, 0.3
    return 0.0, GAINS.get(name.split(".")[-2], GAIN) / math.sqrt(tensor.shape[-1])


@functools.lru_cache(maxsize=256)
def models(case: str, attention: str = "sdpa") -> tuple[Any, DecoderForCausalLM]:
    """(theirs, ours) of a named case; shared by tests, so never changed."""
    model_type, changes = CASES[case]
    raw = tiny_config(model_type, **changes)
    theirs = their_model(raw, attention=attention)
    return theirs, our_model(raw, theirs)


def token_ids(batch: int, tokens: int, *, vocab_size: int = 131, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def largest(left: Tensor, right: Tensor) -> float:
    """The largest absolute difference; infinite where the shapes or the finiteness differ."""
    if left.shape != right.shape or not torch.isfinite(left).all() or not torch.isfinite(right).all():
        return math.inf
    return (left.float() - right.float()).abs().max().item()


def perturbed(model: DecoderForCausalLM, name: str, amount: float = 0.5) -> DecoderForCausalLM:
    """A copy in which the first value of one parameter or buffer is off."""
    changed = copy.deepcopy(model)
    tensor = dict([*changed.named_parameters(), *changed.named_buffers()])[name]
    with torch.no_grad():
        tensor.view(-1)[0] += amount
    return changed
