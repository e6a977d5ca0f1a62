"""What the LFM2 families share: an eager PyTorch decoder whose state is explicit tensors.

In: token ids (or embeddings), an attention mask, and the cache that the previous call returned. Out: hidden states or
logits, and the new cache: a dict from ``StateTensor.past_name`` to tensor, as ``CacheSpec`` describes it. Nothing is
kept inside the modules, so a call can be repeated, batched, snapshotted and traced.

Backends lower a model by replacing its leaf modules (those of ``layers.py``, ``nn.Linear``, ``nn.Embedding`` and a
family's own) by ones with the same signature; the forward passes in this file are written once for all of them.

Shape suffixes as in ``layers.py``; V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfm2_export.cache import CacheSpec
from lfm2_export.config import ModelConfig
from lfm2_export.models.layers import (
    MLP,
    Attention,
    CausalConv,
    GroupedQueryAttention,
    Recorder,
    ResidualRMSNorm,
    RMSNorm,
    SequenceLayout,
    SequenceLayoutBuilder,
    ShortConv,
    rope_tables,
)
from lfm2_export.models.loading import load_pretrained

__all__ = [
    "MLP",
    "Attention",
    "Cache",
    "CausalConv",
    "CausalLMOutput",
    "DecoderForCausalLM",
    "DecoderLayer",
    "DecoderModel",
    "GroupedQueryAttention",
    "ModelOutput",
    "RMSNorm",
    "Recorder",
    "ResidualRMSNorm",
    "SequenceLayout",
    "SequenceLayoutBuilder",
    "ShortConv",
    "cache_length",
    "empty_cache",
    "rope_tables",
]

Cache = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """``last_hidden_state`` [B, T, D] after the final norm; the rest on request, else None.

    ``hidden_states``: embeddings, then each layer's output, the last one after the final norm (transformers' rule).
    ``attentions``: [B, N, T, S] per attention layer. ``router_logits``: [B*T, experts] per MoE layer.
    """

    last_hidden_state: Tensor
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class CausalLMOutput:
    """``logits`` [B, T', V] for the positions that ``logits_to_keep`` chose; the rest as in ``ModelOutput``."""

    logits: Tensor
    cache: Cache | None = None
    loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


class DecoderLayer(nn.Module):
    """One block: a short conv or an attention, then a feed-forward, each behind a norm on the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, feed_forward: nn.Module):
        super().__init__()
        self.layer = layer
        self.is_attention = layer in config.attention_layers
        if self.is_attention:
            self.self_attn = self.make_attention(config, layer)
        else:
            self.conv = ShortConv(config)
        self.feed_forward = feed_forward
        self.operator_norm = ResidualRMSNorm(config.hidden_size, config.norm_eps)
        self.ffn_norm = ResidualRMSNorm(config.hidden_size, config.norm_eps)

    @staticmethod
    def make_attention(config: ModelConfig, layer: int) -> nn.Module:
        """The operator of an attention layer; its signature is ``Attention``'s."""
        return Attention(config)

    def forward(
        self,
        stream_BTD: Tensor,
        delta_BTD: Tensor | None,
        past: Cache,
        present: Cache,
        layout: SequenceLayout,
        recorder: Recorder,
    ) -> tuple[Tensor, Tensor]:
        """Reads this layer's state from ``past`` and writes it to ``present``; returns the stream and what to add."""
        normed, stream_BTD = self.operator_norm(stream_BTD, delta_BTD)
        delta_BTD = self._operator(normed, past, present, layout, recorder)
        normed, stream_BTD = self.ffn_norm(stream_BTD, delta_BTD)
        return stream_BTD, self.feed_forward(normed, recorder)

    def _operator(
        self, x_BTD: Tensor, past: Cache, present: Cache, layout: SequenceLayout, recorder: Recorder
    ) -> Tensor:
        if not self.is_attention:
            name = f"past_conv.{self.layer}"
            y_BTD, present[name] = self.conv(x_BTD, past[name], layout)
            return y_BTD
        key, value = (f"past_key_values.{self.layer}.{kind}" for kind in ("key", "value"))
        wanted = recorder.attentions is not None
        y_BTD, present[key], present[value], weights = self.self_attn(x_BTD, past[key], past[value], layout, wanted)
        if recorder.attentions is not None:
            recorder.attentions.append(weights)
        return y_BTD


def slice_logits(hidden_BTD: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The positions that need logits: the last n, all for 0, or those that a 1-D index tensor names."""
    if isinstance(logits_to_keep, Tensor):
        return hidden_BTD[:, logits_to_keep]
    if logits_to_keep < 0:
        raise ValueError(f"logits_to_keep={logits_to_keep}; pass 0 for all positions or how many of the last to keep")
    return hidden_BTD[:, -logits_to_keep:] if logits_to_keep else hidden_BTD


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy (fp32) of each position's logits against the next position's label; -100 is ignored.

    Raises:
        ValueError: the labels do not cover the same positions as the logits.
    """
    if labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels have the shape {tuple(labels.shape)} but the logits cover {tuple(logits.shape[:2])}; "
            "use logits_to_keep=0 with labels"
        )
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


def check_inputs(
    config: ModelConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
) -> None:
    """Refuses inputs whose shapes contradict each other, before any work is done."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    if input_ids is not None:
        _check_shape("input_ids", input_ids, "batch", "tokens")
    if inputs_embeds is not None:
        _check_shape("inputs_embeds", inputs_embeds, "batch", "tokens", config.hidden_size)
    batch, tokens = (input_ids if input_ids is not None else inputs_embeds).shape[:2]  # type: ignore[union-attr]
    if position_ids is not None:
        _check_shape("position_ids", position_ids, 1 if position_ids.shape[:1] == (1,) else batch, tokens)
    past_length = cache_length(config, cache)
    if cache is not None:
        _check_cache(config, cache, batch, past_length)
    if attention_mask is not None:
        # Without an attention layer a cache does not know how long it is.
        known = cache is None or config.attention_layers
        wanted = past_length + tokens if known else max(tokens, attention_mask.shape[-1])
        _check_shape("attention_mask", attention_mask, batch, wanted)


def _check_shape(name: str, tensor: Tensor, *expected: int | str) -> None:
    """Sizes must match; a named axis may have any size but 0."""
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected) and all(
        size > 0 if isinstance(axis, str) else size == axis for size, axis in zip(shape, expected, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has the shape {list(shape)}; expected [{', '.join(map(str, expected))}]")


def _check_cache(config: ModelConfig, cache: Cache, batch: int, length: int) -> None:
    tensors = CacheSpec.from_config(config).tensors
    if cache.keys() != {t.past_name for t in tensors}:
        raise ValueError(f"cache holds {', '.join(sorted(cache)) or 'nothing'}; pass what the last call returned")
    for t in tensors:
        _check_shape(t.past_name, cache[t.past_name], *t.concrete_shape(batch, length))


class DecoderModel(nn.Module):
    """Embedding, decoder layers, final norm; a family says what its layers are and which feed-forward each has."""

    layer_class: ClassVar[type[DecoderLayer]] = DecoderLayer

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layout = SequenceLayoutBuilder(config)
        self.layers = nn.ModuleList(
            type(self).layer_class(config, i, self.make_feed_forward(config, i))
            for i in range(config.num_hidden_layers)
        )
        self.embedding_norm = ResidualRMSNorm(config.hidden_size, config.norm_eps)

    @staticmethod
    def make_feed_forward(config: ModelConfig, layer: int) -> nn.Module:
        """The block of a layer: called with hidden states [B, T, D] and the ``Recorder``."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
    ) -> ModelOutput:
        """Hidden states of T new tokens after what ``cache`` holds.

        Args:
            input_ids: int64 [B, T]; or ``inputs_embeds`` [B, T, D] in its place.
            attention_mask: [B, P + T], 1 for tokens, 0 for padding on any side; None where there is no padding.
            position_ids: int64 [B or 1, T]; by default each row counts its attended tokens. They turn RoPE only:
                convolutions and the causal mask go by the order of the tokens.
            cache: what the previous call returned; None for a fresh start.
            use_cache: whether to return the new cache. None: where one was passed, else as the config says.
            output_hidden_states, output_attentions, output_router_logits: None: as the config says.

        Raises:
            ValueError: inputs contradict each other or the cache.
        """
        check_inputs(self.config, input_ids, inputs_embeds, attention_mask, position_ids, cache)
        if use_cache is None:
            use_cache = cache is not None or self.config.use_cache
        past_length = cache_length(self.config, cache)
        stream = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if cache is None:
            cache = empty_cache(self.config, stream.shape[0], stream.dtype, stream.device)
        layout = self.layout(stream, attention_mask, position_ids, past_length)
        recorder = self._recorder(output_hidden_states, output_attentions, output_router_logits)
        hidden, present = self.run_layers(stream, cache, layout, recorder)
        return ModelOutput(last_hidden_state=hidden, cache=present if use_cache else None, **recorder.collected())

    def _recorder(self, hidden_states: bool | None, attentions: bool | None, router_logits: bool | None) -> Recorder:
        config = self.config
        return Recorder(
            hidden_states=config.output_hidden_states if hidden_states is None else hidden_states,
            attentions=config.output_attentions if attentions is None else attentions,
            router_logits=config.output_router_logits if router_logits is None else router_logits,
        )

    def run_layers(
        self, stream: Tensor, past: Cache, layout: SequenceLayout, recorder: Recorder
    ) -> tuple[Tensor, Cache]:
        """All layers and the final norm on embeddings [B, T, D]; returns (normed hidden states, new cache)."""
        present: Cache = {}
        delta: Tensor | None = None
        for layer in self.layers:
            if recorder.hidden_states is not None:
                recorder.hidden_states.append(stream if delta is None else delta + stream)
            stream, delta = layer(stream, delta, past, present, layout, recorder)
        hidden, _ = self.embedding_norm(stream, delta)
        if recorder.hidden_states is not None:
            recorder.hidden_states.append(hidden)
        return hidden, present


class DecoderForCausalLM(nn.Module):
    """A family's ``DecoderModel`` with the language model head; logits are in the weights' dtype."""

    backbone: ClassVar[type[DecoderModel]]

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = type(self).backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        offline: bool = False,
    ) -> Self:
        """The model of a checkpoint (directory, bundled name or Hub id), its weights converted to ``dtype``.

        Raises:
            CheckpointError: it cannot be found or read, is damaged, or is of another family than this class.
            ConfigError: its config is not supported.
        """
        model = load_pretrained(cls, name_or_path, dtype=dtype, revision=revision, offline=offline)
        assert isinstance(model, cls)
        return model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
    ) -> CausalLMOutput:
        """Logits of T new tokens; arguments as in ``DecoderModel.forward``, and:

        Args:
            labels: int64 [B, T], -100 where no loss is wanted; ``loss`` predicts each next label.
            logits_to_keep: the last n positions, 0 for all, or a 1-D index tensor.

        Raises:
            ValueError: inputs contradict each other or the cache.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_router_logits=output_router_logits,
        )
        logits = self.lm_head(slice_logits(out.last_hidden_state, logits_to_keep))
        return CausalLMOutput(
            logits=logits,
            loss=None if labels is None else next_token_loss(logits, labels),
            cache=out.cache,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            router_logits=out.router_logits,
        )


def cache_length(config: ModelConfig, cache: Cache | None) -> int:
    """Positions that a cache holds; 0 without an attention layer, where nothing depends on it."""
    if not cache or not config.attention_layers:
        return 0
    key = cache.get(f"past_key_values.{config.attention_layers[0]}.key")
    return 0 if key is None else key.shape[2]


def empty_cache(config: ModelConfig, batch_size: int, dtype: torch.dtype, device: torch.device) -> Cache:
    """A cache with no position in it."""
    return {
        t.past_name: torch.zeros(t.concrete_shape(batch_size, 0), dtype=dtype, device=device)
        for t in CacheSpec.from_config(config).tensors
    }
