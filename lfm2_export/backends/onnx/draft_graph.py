"""The names and axes of a drafter's graph, for those that make it and those that run it; needs no torch.

Inputs: ``streams`` float32 [1, new_positions, width], the target's residual streams of the tokens that it has processed
since; ``anchor`` int64 [1], the newest token; ``past_length`` int64 [1]; ``past.N.key`` and ``.value`` float32 [1,
kv_heads, capacity, head_dim], of which the first ``past_length`` positions count. Outputs: ``tokens`` int64
[block_size]; ``confidence`` float32 [block_size], from 0 to 1, where there is such a head; ``new.N.key`` and ``.value``
[1, kv_heads, new_positions, head_dim], which go behind the past.
"""

from __future__ import annotations

from lfm2_export.config import ModelConfig

NEW, CAPACITY = "new_positions", "capacity"
STREAMS, ANCHOR, PAST_LENGTH = "streams", "anchor", "past_length"
TOKENS, CONFIDENCE = "tokens", "confidence"

Axes = dict[str, tuple[int | str, ...]]


def cache_names(prefix: str, layer: int) -> tuple[str, str]:
    """The key and the value of a layer; ``prefix``: "past" or "new"."""
    return f"{prefix}.{layer}.key", f"{prefix}.{layer}.value"


def draft_inputs(config: ModelConfig) -> Axes:
    """The shape of every input, in the graph's order."""
    assert config.drafter is not None
    width = len(config.drafter.target_layers) * config.hidden_size
    return {STREAMS: (1, NEW, width), ANCHOR: (1,), PAST_LENGTH: (1,), **_cache(config, "past", CAPACITY)}


def draft_outputs(config: ModelConfig) -> Axes:
    """The same of the outputs."""
    assert config.drafter is not None
    block = (config.drafter.block_size,)
    scores: Axes = {CONFIDENCE: block} if config.drafter.has_confidence else {}
    return {TOKENS: block, **scores, **_cache(config, "new", NEW)}


def _cache(config: ModelConfig, prefix: str, axis: str) -> Axes:
    shape = (1, config.num_key_value_heads, axis, config.head_dim)
    return {name: shape for layer in range(config.num_hidden_layers) for name in cache_names(prefix, layer)}
