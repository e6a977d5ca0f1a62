"""What a GGUF file says of its model, as the config.json that the model was published with would say it.

In: the file's settings and the names of its tensors. Out: a raw config for the family's ``parse_config``, and what
generation_config.json holds. Values are checked there; here only what a GGUF says in other words is put into ours.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lfm2_export.errors import CheckpointError
from lfm2_export.messages import shown

# general.architecture -> model_type and the class that config.json names.
ARCHITECTURES = {"lfm2": ("lfm2", "Lfm2ForCausalLM"), "lfm2moe": ("lfm2_moe", "Lfm2MoeForCausalLM")}
# Exported from safetensors alone: gguf 0.19 and the llama.cpp of llama-cpp-python 0.3.36 have no architecture for it.
_WITHOUT_GGUF = ("lfm3",)
_SIGMOID = 2  # of gguf's ExpertGatingFuncType
# Of these families' tokens, those that llama.cpp takes for the end of a reply by their text.
_ENDS = ("<|im_end|>", "<|endoftext|>")
_MOST_LAYERS = 1 << 12


class Settings:
    """Settings of one file; ``place`` names it in errors."""

    def __init__(self, settings: Mapping[str, Any], place: str):
        self._settings, self.place = settings, place
        architecture = settings.get("general.architecture")
        known = architecture if isinstance(architecture, str) else ""
        if known in _WITHOUT_GGUF:
            raise CheckpointError(
                f"{place}: general.architecture={shown(architecture)}: neither the gguf package nor llama.cpp has such "
                "an architecture, so what the file means is not known; export the safetensors checkpoint"
            )
        if known not in ARCHITECTURES:
            raise CheckpointError(
                f"{place}: general.architecture={shown(architecture)} is not supported; known: "
                f"{', '.join(ARCHITECTURES)}"
            )
        self.architecture = known
        self.model_type, self.net = ARCHITECTURES[self.architecture]

    def get(self, key: str, kind: type | tuple[type, ...], default: object = None) -> Any:
        """A setting; a ``{arch}`` in its key is the architecture.

        Raises:
            CheckpointError: it is of another kind.
        """
        key = self._spelled(key)
        value = self._settings.get(key, default)
        if value is default:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise CheckpointError(f"{self.place}: {key}={shown(value)} is of a wrong kind; convert the model again")
        return value

    def needed(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """A setting that must be there; raises as ``get``."""
        found = self.get(key, kind)
        if found is None:
            raise CheckpointError(f"{self.place}: {self._spelled(key)} is missing; convert the model again")
        return found

    def _spelled(self, key: str) -> str:
        """No format string: a key may hold a name out of the file."""
        return key.replace("{arch}", self.architecture)

    def token(self, name: str) -> int | None:
        """The id of a token with a part to play: ``bos``, ``eos``, ..."""
        found: int | None = self.get(f"tokenizer.ggml.{name}_token_id", int)
        return found


def raw_config(settings: Settings, tensors: Collection[str]) -> dict[str, Any]:
    """The contents of a config.json for a file with such tensors.

    Raises:
        CheckpointError: a setting is missing, of a wrong kind, or not what the family computes.
    """
    layers = settings.needed("{arch}.block_count", int)
    if not 1 <= layers <= _MOST_LAYERS:
        raise CheckpointError(f"{settings.place}: {settings.architecture}.block_count={layers}; convert it again")
    kv_heads = _kv_heads(settings, layers)
    scaling = settings.get("{arch}.rope.scaling.type", str, "none")
    if scaling != "none":
        raise CheckpointError(
            f"{settings.place}: {settings.architecture}.rope.scaling.type={shown(scaling)} is not supported; expected "
            "none"
        )
    tokens = settings.get("tokenizer.ggml.tokens", list)
    config: dict[str, Any] = {
        "architectures": [settings.net],
        "model_type": settings.model_type,
        "vocab_size": settings.needed("{arch}.vocab_size", int) if tokens is None else len(tokens),
        "hidden_size": settings.needed("{arch}.embedding_length", int),
        "intermediate_size": settings.needed("{arch}.feed_forward_length", int),
        "num_hidden_layers": layers,
        "num_attention_heads": settings.needed("{arch}.attention.head_count", int),
        "num_key_value_heads": max(kv_heads) or 1,
        "layer_types": ["full_attention" if heads else "conv" for heads in kv_heads],
        "conv_L_cache": settings.needed("{arch}.shortconv.l_cache", int),
        "conv_bias": False,
        "norm_eps": _decimal(settings.needed("{arch}.attention.layer_norm_rms_epsilon", float)),
        "rope_parameters": {
            "rope_theta": float(settings.needed("{arch}.rope.freq_base", (float, int))),
            "rope_type": "default",
        },
        "max_position_embeddings": settings.needed("{arch}.context_length", int),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": settings.token("bos"),
        "eos_token_id": settings.token("eos"),
        "pad_token_id": settings.token("padding"),
    }
    if (head_dim := settings.get("{arch}.attention.key_length", int)) is not None:
        config["head_dim"] = head_dim
    return config | (_of_experts(settings, tensors) if settings.model_type == "lfm2_moe" else _of_dense())


def generation_config(settings: Settings) -> dict[str, Any]:
    """The contents of a generation_config.json: the tokens that begin and end a text."""
    tokens = settings.get("tokenizer.ggml.tokens", list, [])
    by_text = (tokens.index(text) for text in _ENDS if text in tokens)
    stops = dict.fromkeys([*(settings.token(name) for name in ("eos", "eot", "eom")), *by_text])
    found = {
        "bos_token_id": settings.token("bos"),
        "eos_token_id": [token for token in stops if token is not None],
        "pad_token_id": settings.token("padding"),
    }
    return {name: value for name, value in found.items() if value not in (None, [])}


def _kv_heads(settings: Settings, layers: int) -> list[int]:
    """Heads of keys and values of every layer: a short conv has none."""
    stated = settings.needed("{arch}.attention.head_count_kv", (int, list))
    heads = stated if isinstance(stated, list) else [stated] * layers
    used = {count for count in heads if count != 0}
    if len(heads) != layers or not all(type(count) is int and count >= 0 for count in heads) or len(used) > 1:
        raise CheckpointError(
            f"{settings.place}: {settings.architecture}.attention.head_count_kv={shown(stated)} is not 0 or one number "
            f"for each of {layers} layers; convert the model again"
        )
    return heads


def _of_dense() -> dict[str, Any]:
    # What is stated is the width of the stored matrices.
    return {"block_auto_adjust_ff_dim": False}


def _of_experts(settings: Settings, tensors: Collection[str]) -> dict[str, Any]:
    gating = settings.get("{arch}.expert_gating_func", int, _SIGMOID)
    if gating != _SIGMOID:
        raise CheckpointError(
            f"{settings.place}: {settings.architecture}.expert_gating_func={gating} is not supported; expected "
            f"{_SIGMOID} (sigmoid)"
        )
    return {
        "num_experts": settings.needed("{arch}.expert_count", int),
        "num_experts_per_tok": settings.needed("{arch}.expert_used_count", int),
        "moe_intermediate_size": settings.needed("{arch}.expert_feed_forward_length", int),
        "num_dense_layers": settings.needed("{arch}.leading_dense_block_count", int),
        "use_expert_bias": any(name.endswith("exp_probs_b.bias") for name in tensors),
        "norm_topk_prob": bool(settings.get("{arch}.expert_weights_norm", (bool, int), True)),
        "routed_scaling_factor": float(settings.get("{arch}.expert_weights_scale", (float, int), 1.0)) or 1.0,
    }


def _decimal(value: float) -> float:
    """A float32 number as the decimal one that it was written from: 1e-5, not 9.99999974738e-06."""
    return float(f"{value:.7g}")
