"""The graphs of one program: the portable one, the one for fast CPU kernels, and the one that scores every position.

In: a model's config, a weight plan, a cache spec. Out: ``onnx_ir`` models with the artifact's names, operator counts
checked, that differ in a few nodes and share every initializer, so that one data file serves them all.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import onnx_ir as ir

from lfm2_export.backends.onnx import passes
from lfm2_export.backends.onnx.plan import WeightPlan
from lfm2_export.backends.onnx.trace import trace, without_collection
from lfm2_export.cache import CacheSpec
from lfm2_export.config import ModelConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Graphs:
    """``cpu`` is None where it would equal ``portable``. ``operators``: how often each fused operator occurs."""

    portable: ir.Model
    cpu: ir.Model | None
    scoring: ir.Model
    operators: dict[str, int]

    def all(self) -> list[ir.Model]:
        return [model for model in (self.portable, self.cpu, self.scoring) if model is not None]


@without_collection()
def make_graphs(config: ModelConfig, plan: WeightPlan, cache: CacheSpec) -> Graphs:
    """Traces once and derives the other graphs from copies.

    Raises:
        ExportError: an operator does not occur as often as the model's layers demand.
    """
    model = trace(config, plan, cache)
    counts = {
        "simplify": passes.simplify(model),
        "drop_unread_outputs": passes.drop_unread_outputs(model),
        "name_initializers": passes.name_initializers(model, plan),
        "name_axes": passes.name_axes(model, cache),
        "strip_debris": passes.strip_debris(model),
        "number_nodes": passes.number_nodes(model),
    }
    logger.info("passes: %s", ", ".join(f"{name} {count}" for name, count in counts.items()))
    operators = passes.check_operators(model, passes.expected_operators(config, plan))
    cpu: ir.Model | None = model.clone()
    if not passes.allow_int8_experts(cpu):
        cpu = None
    scoring = (cpu or model).clone()
    passes.score_every_position(scoring)
    return Graphs(portable=model, cpu=cpu, scoring=scoring, operators=operators)
