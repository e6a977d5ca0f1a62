"""The encoders spelled out: one row, no padding, float64, from the published tensors; nothing of the package's nets.

After what is known of the remote code: RMS norms, gated convolutions padded with ``width // 2`` zeros on both sides and
cut to the row, attention to every token that may be attended to, RoPE on halves, SwiGLU, one norm at the end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

Arrays = dict[str, np.ndarray]


def read(folder: Path) -> tuple[dict[str, Any], Arrays]:
    """config.json and the tensors, without a prefix, in float64."""
    raw = json.loads((folder / "config.json").read_text())
    tensors = {name.removeprefix("lfm2."): value for name, value in load_file(folder / "model.safetensors").items()}
    if (folder / "1_Dense").is_dir():
        tensors |= {f"dense.{k}": v for k, v in load_file(folder / "1_Dense/model.safetensors").items()}
    return raw, {name: value.astype(np.float64) for name, value in tensors.items()}


def outputs(folder: Path, ids: Sequence[int], attended: Sequence[bool] | None = None) -> Arrays:
    """Every output of a row; tokens that are not ``attended`` are there and seen by the convolutions alone."""
    raw, tensors = read(folder)
    seen = np.ones(len(ids), bool) if attended is None else np.asarray(attended)
    hidden = _hidden(raw, tensors, np.asarray(ids), seen)
    found = {"last_hidden_state": hidden}
    if (folder / "1_Pooling").is_dir():
        found["sentence_embedding"] = _unit(hidden[0])
    if "dense.linear.weight" in tensors:
        found["token_embeddings"] = _unit(hidden @ tensors["dense.linear.weight"].T)
    if "MaskedLM" in raw["architectures"][0]:
        found["logits"] = hidden @ tensors.get("lm_head.weight", tensors["embed_tokens.weight"]).T
    return found


def _hidden(raw: Mapping[str, Any], tensors: Arrays, ids: np.ndarray, seen: np.ndarray) -> np.ndarray:
    eps = raw["norm_eps"]
    x = tensors["embed_tokens.weight"][ids]
    for layer, kind in enumerate(raw["layer_types"]):
        own = {k.removeprefix(p): v for p in (f"layers.{layer}.",) for k, v in tensors.items() if k.startswith(p)}
        normed = _norm(x, own["operator_norm.weight"], eps)
        x = x + (_conv(own, normed) if kind == "conv" else _attention(raw, own, normed, seen))
        normed = _norm(x, own["ffn_norm.weight"], eps)
        gate = normed @ own["feed_forward.w1.weight"].T
        gated = gate / (1 + np.exp(-gate)) * (normed @ own["feed_forward.w3.weight"].T)
        x = x + gated @ own["feed_forward.w2.weight"].T
    return _norm(x, tensors["embedding_norm.weight"], eps)


def _norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def _conv(own: Arrays, x: np.ndarray) -> np.ndarray:
    b, c, x = np.split(x @ own["conv.in_proj.weight"].T + own.get("conv.in_proj.bias", 0), 3, axis=-1)
    kernel = own["conv.conv.weight"][:, 0]  # [channels, width]
    width, product = kernel.shape[1], b * x
    padded = np.pad(product, ((width // 2, width // 2), (0, 0)))
    y = sum(padded[tap : tap + len(product)] * kernel[:, tap] for tap in range(width)) + own.get("conv.conv.bias", 0)
    return (c * y) @ own["conv.out_proj.weight"].T + own.get("conv.out_proj.bias", 0)


def _attention(raw: Mapping[str, Any], own: Arrays, x: np.ndarray, seen: np.ndarray) -> np.ndarray:
    heads, shared = raw["num_attention_heads"], raw["num_key_value_heads"]
    size = raw.get("head_dim") or raw["hidden_size"] // heads
    q, k, v = ((x @ own[f"self_attn.{name}_proj.weight"].T).reshape(len(x), -1, size).swapaxes(0, 1) for name in "qkv")
    q = _rotated(_norm(q, own["self_attn.q_layernorm.weight"], raw["norm_eps"]), raw["rope_theta"])
    k = _rotated(_norm(k, own["self_attn.k_layernorm.weight"], raw["norm_eps"]), raw["rope_theta"])
    k, v = (one.repeat(heads // shared, axis=0) for one in (k, v))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(size)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ v).swapaxes(0, 1).reshape(len(x), -1) @ own["self_attn.out_proj.weight"].T


def _rotated(x: np.ndarray, theta: float) -> np.ndarray:
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _unit(x: np.ndarray) -> np.ndarray:
    unit: np.ndarray = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return unit
