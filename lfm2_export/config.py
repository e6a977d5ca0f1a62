"""What a model is and what an export should do, as frozen dataclasses; no heavy import.

In: the raw ``config.json`` of a checkpoint (through a family's ``parse_config``) or a caller's options.
Out: ``ModelConfig``, every value resolved and checked once, so that nothing downstream looks at raw JSON.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lfm2_export.drafting import DraftSettings
from lfm2_export.errors import ConfigError
from lfm2_export.heads import EncoderHead
from lfm2_export.messages import listed, shown

logger = logging.getLogger(__name__)

CONV = "conv"
FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"

# What transformers still accepts for older names.
_LAYER_TYPE_ALIASES = {"attention": FULL_ATTENTION}

_ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")

HONOURED = object()  # in ``refuse_unsupported``

# Of a checkpoint. The largest published one, the 24B, has 7,700; the names and places of so many take 150 MB.
MOST_TENSORS = 1 << 17

_LARGEST = sys.float_info.max  # NaN compares false, infinity is above, integers compare exactly


@dataclass(frozen=True, kw_only=True)
class Rope:
    """RoPE of one kind of attention layer: its base, and the share of each head's pairs that turn.

    Those are the first ones, with the frequencies that they would have if all did; the others stay as they are
    (transformers calls this "proportional").
    """

    theta: float
    share: float = 1.0

    def turning_pairs(self, head_dim: int) -> int:
        return int(self.share * head_dim // 2)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model of any family; the names are those of ``Lfm2Config``, ``Lfm2MoeConfig`` and ``Lfm3Config``.

    ``intermediate_size`` is the width that the dense MLPs really have (after ``block_auto_adjust_ff_dim``). A dense
    model has ``num_dense_layers == num_hidden_layers`` and ``num_experts == 0``. ``use_cache`` and ``output_*`` say
    what the eager forward does where its caller does not. ``rope_theta`` and ``rope_share`` are those of full
    attention; ``sliding_window`` counts the positions that a token of a sliding layer sees, itself included.
    ``encoder``: what an encoder gives beside its hidden states; ``drafter``: what a drafter reads and proposes; both
    None for a decoder.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layer_types: tuple[str, ...]
    conv_L_cache: int
    conv_bias: bool
    norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    num_dense_layers: int
    moe_intermediate_size: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    use_expert_bias: bool = False
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    use_cache: bool = True
    output_hidden_states: bool = False
    output_attentions: bool = False
    output_router_logits: bool = False
    rope_share: float = 1.0
    sliding_rope: Rope | None = None
    sliding_window: int | None = None
    attention_bias: bool = False
    use_attention_gate: bool = False
    use_sandwich_norm: bool = False
    encoder: EncoderHead | None = None
    drafter: DraftSettings | None = None

    @cached_property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers with keys and values, sliding ones among them."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind != CONV)

    @cached_property
    def ropes(self) -> dict[str, Rope]:
        """RoPE by the kinds of attention layers that there are."""
        known = {
            FULL_ATTENTION: Rope(theta=self.rope_theta, share=self.rope_share),
            SLIDING_ATTENTION: self.sliding_rope,
        }
        return {kind: rope for kind, rope in known.items() if rope is not None and kind in self.layer_types}

    def window(self, kind: str) -> int | None:
        """How many positions a token of such an attention layer sees; None: all before it."""
        return self.sliding_window if kind == SLIDING_ATTENTION else None

    @cached_property
    def sliding_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == SLIDING_ATTENTION)

    @cached_property
    def conv_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == CONV)

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(range(self.num_dense_layers, self.num_hidden_layers))


class Fields:
    """Typed access to a raw config; an error names the file's key, its value and what is allowed."""

    def __init__(self, raw: Mapping[str, Any], place: str = "config.json"):
        self.raw = raw
        self.place = place

    def fail(self, key: str, value: object, expected: str) -> ConfigError:
        return ConfigError(f"{self.place}: {key}={shown(value)} is not supported; expected {expected}")

    def _get(self, key: str, default: object) -> Any:
        value = self.raw.get(key)
        return default if value is None else value

    def integer(self, key: str, default: object, *, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self._get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(key, value, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, default: object, *, above: float = 0.0) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
            raise self.fail(key, value, "a finite number")
        if value <= above:
            raise self.fail(key, value, f"a number above {above:g}")
        return float(value)

    def boolean(self, key: str, default: object) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, value, "true or false")
        return value

    def token_id(self, key: str, default: int | None, vocab_size: int) -> int | None:
        """A token, or None where there is none; tools write -1 for that, too."""
        value = self.raw.get(key, default)
        return None if value is None or (type(value) is int and value == -1) else self._token(key, value, vocab_size)

    def token_ids(self, key: str, default: int, vocab_size: int) -> tuple[int, ...]:
        value = self.raw.get(key, default)
        if not isinstance(value, list):
            return () if value is None else (self._token(key, value, vocab_size),)
        beyond = [v for v in value if type(v) is int and v >= vocab_size]
        if beyond:  # no text can end with them
            logger.warning(
                "%s: %s names %s beyond the vocabulary of %d, left out", self.place, key, shown(beyond), vocab_size
            )
        return tuple(self._token(key, v, vocab_size) for v in value if v not in beyond)

    def _token(self, key: str, value: object, vocab_size: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
            raise self.fail(key, value, f"a token id from 0 to {vocab_size - 1} (vocab_size)")
        return value

    def integers(self, key: str, *, low: int, high: int) -> list[int] | None:
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(v) is int and low <= v <= high for v in value):
            raise self.fail(key, value, f"a list of integers from {low} to {high}")
        return value


def check_layer_types(
    fields: Fields, kinds: Sequence[object], num_hidden_layers: int, known: Sequence[str] = (CONV, FULL_ATTENTION)
) -> tuple[str, ...]:
    """The layer kinds as a tuple; ``known``: those that the family has.

    Raises:
        ConfigError: the list has another length than ``num_hidden_layers`` or names an unknown kind.
    """
    names = [f'"{kind}"' for kind in known]
    choices = [", ".join(names[:-1]), names[-1]]
    if not isinstance(kinds, list):
        raise fields.fail("layer_types", kinds, f"a list of {' and '.join(choices)}")
    kinds = [_LAYER_TYPE_ALIASES.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    for index, kind in enumerate(kinds):
        if kind not in known:
            raise fields.fail(f"layer_types[{index}]", kind, " or ".join(choices))
    if len(kinds) != num_hidden_layers:
        raise ConfigError(
            f"{fields.place}: layer_types has {len(kinds)} entries but num_hidden_layers={num_hidden_layers}; "
            "they must agree"
        )
    return tuple(str(kind) for kind in kinds)


def check_expert_count(fields: Fields, *, layers: int, experts: int) -> None:
    """Refuses more experts than a checkpoint could hold, each of three matrices, before anything is made for each.

    Raises:
        ConfigError: names both counts.
    """
    if 3 * layers * experts > MOST_TENSORS:
        raise ConfigError(
            f"{fields.place}: num_experts={experts} in {layers} layers are {3 * layers * experts} tensors, more than "
            f"the {MOST_TENSORS} that are read; correct num_experts or num_hidden_layers"
        )


def rope_theta(fields: Fields, default: float) -> float:
    """The base of RoPE: from ``rope_scaling``, ``rope_parameters`` or the top-level ``rope_theta``, in this order.

    The order is that of transformers 5; there ``rope_scaling``, an older name, replaces ``rope_parameters`` as a whole.
    Anything but plain RoPE on the whole head is refused: no published LFM2 uses it, and lowering it as plain RoPE would
    be wrong at every position.
    """
    place = "rope_scaling" if fields.raw.get("rope_scaling") else "rope_parameters"
    parameters = fields.raw.get(place)
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, Mapping):
        raise fields.fail(place, parameters, "an object")
    inner = Fields(parameters, f"{fields.place}: {place}")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise inner.fail("rope_type", kind, '"default"')
    for source in (inner, fields):
        factor = source.raw.get("partial_rotary_factor")
        if factor is not None and factor != 1.0:
            raise source.fail("partial_rotary_factor", factor, "1.0")
    for key, value in parameters.items():
        if isinstance(value, Mapping):  # parameters per kind of layer, which these families do not have
            raise inner.fail(key, value, f"only {', '.join(_ROPE_KEYS)}")
    if idle := [key for key in parameters if key not in _ROPE_KEYS]:
        logger.warning("%s: %s has no effect with plain RoPE and is left out", inner.place, listed(idle))
    if parameters.get("rope_theta") is not None:
        return inner.number("rope_theta", default)
    return fields.number("rope_theta", default)


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a family takes where config.json says nothing: transformers' values."""

    hidden_size: int
    vocab_size: int = 65536
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None  # None: hidden_size over the heads
    conv_L_cache: int = 3
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0


def common_fields(fields: Fields, defaults: Defaults) -> dict[str, Any]:
    """The values that all families read alike, checked; keyword arguments for ``ModelConfig``."""
    vocab_size = fields.integer("vocab_size", defaults.vocab_size)
    hidden_size = fields.integer("hidden_size", defaults.hidden_size)
    num_attention_heads = fields.integer("num_attention_heads", defaults.num_attention_heads)
    num_key_value_heads = fields.integer("num_key_value_heads", defaults.num_key_value_heads)
    if num_attention_heads % num_key_value_heads:
        raise ConfigError(
            f"{fields.place}: num_attention_heads={num_attention_heads} is not a multiple of "
            f"num_key_value_heads={num_key_value_heads}; grouped-query attention needs whole groups"
        )
    if fields.raw.get("head_dim") is None and defaults.head_dim is None and hidden_size % num_attention_heads:
        raise ConfigError(
            f"{fields.place}: hidden_size={hidden_size} is not a multiple of "
            f"num_attention_heads={num_attention_heads}; state head_dim"
        )
    head_dim = fields.integer("head_dim", defaults.head_dim or hidden_size // num_attention_heads)
    if head_dim % 2:
        raise fields.fail("head_dim", head_dim, "an even number (RoPE turns pairs)")
    tied = fields.boolean("tie_word_embeddings", True)
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": fields.integer("num_hidden_layers", defaults.num_hidden_layers, high=10_000),
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "conv_L_cache": fields.integer("conv_L_cache", defaults.conv_L_cache, low=2, high=1024),
        "conv_bias": fields.boolean("conv_bias", False),
        "norm_eps": fields.number("norm_eps", 1e-5),
        "max_position_embeddings": fields.integer("max_position_embeddings", 128_000),
        # tie_embedding is the older name and wins where both stand, as in transformers.
        "tie_word_embeddings": fields.boolean("tie_embedding", tied),
        "bos_token_id": fields.token_id("bos_token_id", defaults.bos_token_id, vocab_size),
        "eos_token_id": fields.token_ids("eos_token_id", defaults.eos_token_id, vocab_size),
        "pad_token_id": fields.token_id("pad_token_id", defaults.pad_token_id, vocab_size),
        "use_cache": fields.boolean("use_cache", True),
        "output_hidden_states": fields.boolean("output_hidden_states", False),
        "output_attentions": fields.boolean("output_attentions", False),
    }


def refuse_unsupported(fields: Fields, common: Mapping[str, object], own: Mapping[str, object] | None = None) -> None:
    """Refuses keys that ask for something else than what is built, among them some that published configs repeat.

    ``own``: the only values of further keys, or, in place of those below, the family's own; a key whose value is
    ``HONOURED`` is read elsewhere.

    Raises:
        ConfigError: names the key, its value and the only value that is supported.
    """
    width = common["hidden_size"]
    supported = {
        "block_dim": width,
        "conv_dim": width,
        "conv_dim_out": width,
        "num_heads": common["num_attention_heads"],
        "block_norm_eps": common["norm_eps"],
        "block_use_swiglu": True,
        "use_pos_enc": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "sliding_window": None,
        "is_encoder_decoder": False,
        "return_dict": True,
        "tie_last_hidden_states": True,
        "per_layer_config": None,
    }
    if fields.raw.get("quantization_config") is not None:
        raise ConfigError(
            f"{fields.place}: quantization_config says that the weights are quantized already; export the checkpoint "
            "that they were made of, with a --scheme of ours"
        )
    for key, only in {**supported, **(own or {})}.items():
        value = fields.raw.get(key)
        if value is not None and only is not HONOURED and value != only:
            raise fields.fail(key, value, f"{json.dumps(only)}, or no such key")  # as the file would say it
