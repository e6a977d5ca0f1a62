"""The graphs of one program: the portable one, those for faster CPU kernels, and those that score every position.

In: a model's config, a weight plan, a cache spec. Out: ``onnx_ir`` models with the artifact's names, operator counts
checked, that differ in a few nodes and share every initializer, so that one data file serves them all. Those that score
also return the residual stream behind every layer, for a run that asks for it: drafters read some. In the others they
would have to outlive their layer, too: 64 MB for a prompt of 512 tokens on the 1.2B.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from lfm2_export.backends.onnx import own_layers, own_ops, passes
from lfm2_export.backends.onnx.trace import trace, trace_drafter, trace_encoder, without_collection
from lfm2_export.backends.onnx.variants import CPU, LFM2, LFM2_KV8, LFM2_KV8_SCORING, LFM2_SCORING, SCORING
from lfm2_export.backends.weights.plan import WeightPlan
from lfm2_export.cache import CacheSpec
from lfm2_export.config import ModelConfig
from lfm2_export.errors import ExportError
from lfm2_export.manifest import MODEL

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Graphs:
    """``by_role``: what each is for (variants.py). ``operators``: how often each fused operator occurs in the portable
    one. ``own_cache``: the state of those on our operators, keys and values in floats; None where there are none."""

    by_role: dict[str, ir.Model]
    operators: dict[str, int]
    own_cache: CacheSpec | None = None

    @property
    def portable(self) -> ir.Model:
        return self.by_role[MODEL]


@without_collection()
def make_graphs(config: ModelConfig, plan: WeightPlan, cache: CacheSpec) -> Graphs:
    """Traces once and derives the other graphs from copies.

    Raises:
        ExportError: an operator does not occur as often as the model's layers demand.
    """
    if config.encoder is not None:
        return _encoder_graphs(config, plan)
    if config.drafter is not None:
        return _drafter_graphs(config, plan)
    model = trace(config, plan, cache)
    _rewrite(model, plan, lambda: passes.name_axes(model, cache))
    operators = passes.check_operators(model, passes.expected_operators(config, plan))
    found, own_cache = _variants(model, config), None
    if own_ops.fits(plan):
        own_cache = own_ops.cache_of(config, cache)
        found |= _own_variants(_on_own_operators(model, config, plan, own_cache), own_cache)
    return Graphs(by_role=found, operators=operators, own_cache=own_cache)


def _encoder_graphs(config: ModelConfig, plan: WeightPlan) -> Graphs:
    """One graph, on stock operators."""
    model = trace_encoder(config, plan)
    _rewrite(model, plan, lambda: passes.name_encoder_axes(model))
    operators = passes.check_operators(model, passes.expected_encoder_operators(config, plan))
    return Graphs(by_role={MODEL: model}, operators=operators)


def _drafter_graphs(config: ModelConfig, plan: WeightPlan) -> Graphs:
    """The graph on stock operators, and the same with our products where these take its weights: a drafter's results
    need not be the same bits in any company."""
    model = trace_drafter(config, plan)
    _rewrite(model, plan, lambda: passes.name_drafter_axes(model, config))
    expected = passes.expected_drafter_operators(config, plan)
    found = {MODEL: model}
    operators = passes.check_operators(model, expected)
    if own_ops.fits(plan):
        own = found[LFM2] = model.clone()
        _use_own_products(own, plan, expected["MatMulNBits"])
        passes.number_nodes(own)
    return Graphs(by_role=found, operators=operators)


def _use_own_products(model: ir.Model, plan: WeightPlan, expected: int) -> None:
    if (count := own_ops.use_own_products(model)) != expected:
        raise ExportError(f"{count} of {expected} products became our own; this is a defect, please report it")
    own_ops.use_own_float_products(model)
    own_ops.fuse_feed_forwards(model, plan)


def _rewrite(model: ir.Model, plan: WeightPlan, name_axes: Callable[[], int]) -> None:
    counts = {
        "simplify": passes.simplify(model),
        "drop_unread_outputs": passes.drop_unread_outputs(model),
        "name_initializers": passes.name_initializers(model, plan),
        "share_tied_scales": passes.share_tied_scales(model, plan),
        "name_axes": name_axes(),
        "strip_debris": passes.strip_debris(model),
        "number_nodes": passes.number_nodes(model),
    }
    logger.info("passes: %s", ", ".join(f"{name} {count}" for name, count in counts.items()))


def _variants(model: ir.Model, config: ModelConfig) -> dict[str, ir.Model]:
    """The graph and those derived from copies of it on the runtime's own operators; none that would equal another."""
    found = {MODEL: model}
    cpu = model.clone()
    if passes.allow_int8_experts(cpu):
        found[CPU] = cpu
    found[SCORING] = _scoring(cpu)
    passes.show_residuals(found[SCORING], config)
    return found


def _own_variants(own: ir.Model, cache: CacheSpec) -> dict[str, ir.Model]:
    found = {LFM2: own, LFM2_SCORING: _verifying(own, cache), **_with_int8_cache(own, cache)}
    for role in (LFM2, LFM2_KV8):
        if role in found:
            passes.hide_residuals(found[role])
            passes.number_nodes(found[role])
    return found


def _on_own_operators(model: ir.Model, config: ModelConfig, plan: WeightPlan, cache: CacheSpec) -> ir.Model:
    """The graph on our operators; the residual streams are shown before these take in what makes them."""
    own = model.clone()
    passes.show_residuals(own, config)
    before = passes.expected_operators(config, plan)
    counts = own_ops.use_own_products(own), own_ops.use_own_experts(own, config)
    if counts != (before["MatMulNBits"], before["QMoE"]):
        raise ExportError(f"{counts} operators became our own; this is a defect, please report it")
    own_ops.use_own_float_products(own)
    own_ops.fuse_feed_forwards(own, plan)
    fused = own_ops.fuse_short_convs(own), own_ops.fuse_attention(own, config)
    if fused != (len(config.conv_layers), len(config.attention_layers) * own_ops.takes_heads(config)):
        raise ExportError(f"{fused} short convs and attentions became our own; this is a defect, please report it")
    rings = own_ops.keep_rings(own, cache)
    if rings != len(cache.bounded) // 2:
        raise ExportError(f"{rings} sliding layers keep a ring; this is a defect, please report it")
    own_ops.fuse_projections(own)
    own_layers.fuse_routers(own)
    own_layers.fuse_norms(own)
    own_layers.lay_out_tokens(own, config)
    own_ops.mark_independent_rows(own)
    passes.number_nodes(own)
    return own


def _with_int8_cache(model: ir.Model, cache: CacheSpec) -> dict[str, ir.Model]:
    """Empty where no attention is ours, or there is none."""
    quantized = model.clone()
    if not own_ops.quantize_cache(quantized, cache.with_int8_positions()):
        return {}
    return {LFM2_KV8: quantized, LFM2_KV8_SCORING: _verifying(quantized, cache)}


def _verifying(model: ir.Model, cache: CacheSpec) -> ir.Model:
    """The logits of every position, and what it takes to go back to any of them."""
    verifying = _scoring(model)
    own_ops.show_windows(verifying, cache)
    passes.number_nodes(verifying)
    return verifying


def _scoring(model: ir.Model) -> ir.Model:
    scoring = model.clone()
    passes.score_every_position(scoring)
    return scoring
