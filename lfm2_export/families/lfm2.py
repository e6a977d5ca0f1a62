"""The dense family, ``model_type: lfm2`` (LFM2 and LFM2.5, 230M to 2.6B): its config and its tensors.

Source: transformers' ``configuration_lfm2.py``; the older keys (``block_*``, ``full_attn_idxs``, ``tie_embedding``) are
those of the first published checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lfm2_export.config import (
    CONV,
    FULL_ATTENTION,
    Defaults,
    Fields,
    ModelConfig,
    check_layer_types,
    common_fields,
    refuse_unsupported,
    rope_theta,
)
from lfm2_export.errors import ConfigError
from lfm2_export.families.tensors import FusedTensor, ModelTensor, backbone, by_name, mlp
from lfm2_export.messages import shown

ARCHITECTURES = ("Lfm2ForCausalLM", "Lfm2Model")


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """A checked ``ModelConfig`` from a checkpoint's ``config.json``.

    Raises:
        ConfigError: a value is missing, out of range, contradicted by another one, or not supported.
    """
    fields = Fields(raw)
    common = common_fields(fields, Defaults(hidden_size=2560))
    layers = common["num_hidden_layers"]
    refuse_unsupported(fields, common)
    return ModelConfig(
        model_type="lfm2",
        **common,
        rope_theta=rope_theta(fields, 1_000_000.0),
        intermediate_size=_intermediate_size(fields),
        layer_types=_layer_types(fields, layers),
        num_dense_layers=layers,
    )


def _intermediate_size(fields: Fields) -> int:
    """The dense MLP's real width: ``block_ff_dim`` wins over ``intermediate_size``; both may be adjusted."""
    stated = fields.integer("block_ff_dim", fields.integer("intermediate_size", 12288))
    if not fields.boolean("block_auto_adjust_ff_dim", True):
        return stated
    width = _adjusted(fields, stated)
    if not 0 < width < 2**31:
        raise ConfigError(
            f"{fields.place}: intermediate_size={stated} becomes {shown(width)} under block_auto_adjust_ff_dim; "
            "expected a width from 1 to 2147483647"
        )
    return width


def _adjusted(fields: Fields, width: int) -> int:
    width = int(2 * width / 3)
    # Absent means 1.0; an explicit null means that neither the multiplier nor the rounding is wanted.
    if fields.raw.get("block_ffn_dim_multiplier", 1.0) is None:
        return width
    multiple = fields.integer("block_multiple_of", 256)
    width = int(fields.number("block_ffn_dim_multiplier", 1.0) * width)
    return multiple * ((width + multiple - 1) // multiple)


def _layer_types(fields: Fields, layers: int) -> tuple[str, ...]:
    kinds = fields.raw.get("layer_types")
    if kinds is None:
        attention = fields.integers("full_attn_idxs", low=0, high=layers - 1)
        chosen = range(layers) if attention is None else frozenset(attention)
        kinds = [FULL_ATTENTION if i in chosen else CONV for i in range(layers)]
    return check_layer_types(fields, kinds, layers)


def tensors(config: ModelConfig) -> dict[str, ModelTensor]:
    """Every tensor of a published checkpoint by its name."""
    blocks = (tensor for layer in range(config.num_hidden_layers) for tensor in mlp(config, layer))
    return by_name((*backbone(config), *blocks))


def fused_tensors(config: ModelConfig) -> dict[str, FusedTensor]:
    """No tensor of this family is ever stored fused."""
    return {}


def reference_config(raw: Mapping[str, Any]) -> None:
    """transformers takes these configs as they stand."""
