"""Each way to run experts against the eager block, without an export."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("executorch")

import numpy as np
import torch
from torch import Tensor, nn

from lfm2_export.backends.executorch.moe import StockExperts, lowered_experts
from lfm2_export.backends.executorch.plan import MoeOp, PtePlan, make_plan
from lfm2_export.checkpoint import Checkpoint
from lfm2_export.models.decoder import Recorder
from lfm2_export.models.lfm2_moe import ROUTING_EPS, SparseMoeBlock
from lfm2_export.models.loading import load_model
from lfm2_export.quant.algorithms import get_algorithm
from lfm2_export.quant.formats import IntFormat
from lfm2_export.quant.schemes import get_scheme
from tests.backends.executorch.programs import checkpoint_of, stored

NAME = "model.layers.1.feed_forward"
RECORDER = Recorder(hidden_states=False, attentions=False, router_logits=False)


def blocks(scheme: str, op: MoeOp, **overrides: object) -> tuple[SparseMoeBlock, nn.Module]:
    """The eager block with weights as they are stored, and the lowered one."""
    checkpoint = checkpoint_of("lfm2_moe", **overrides)
    plan = make_plan(checkpoint.config, get_scheme(scheme), moe_op=op if op is not MoeOp.PLAIN else None)
    lowered = copy.deepcopy(lowered_experts(NAME, stored(checkpoint, plan)))
    block = copy.deepcopy(load_model(checkpoint).get_submodule(NAME))
    assert isinstance(block, SparseMoeBlock)
    if op is not MoeOp.PLAIN:
        for expert in range(checkpoint.config.num_experts):
            one, three, two = (
                torch.from_numpy(quantized(checkpoint, plan, f"{NAME}.experts.{expert}.{part}.weight"))
                for part in ("w1", "w3", "w2")
            )
            block.experts.gate_up_proj.data[expert] = torch.cat([one, three])
            block.experts.down_proj.data[expert] = two
    return block, lowered


def quantized(checkpoint: Checkpoint, plan: PtePlan, name: str) -> np.ndarray:
    """The values that a weight has once it is quantized."""
    form = plan[name].format
    assert isinstance(form, IntFormat)
    return get_algorithm("round")(checkpoint.read(name), form).dequantize()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize(
    ("scheme", "op", "tolerance"),
    [("fp32", MoeOp.PLAIN, 1e-6), ("8da4w", MoeOp.STOCK, 2e-6), ("8da4w", MoeOp.LFM2, 3e-2)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_lowered_block_is_the_eager_block(scheme: str, op: MoeOp, tolerance: float, bias: bool) -> None:
    block, lowered = blocks(scheme, op, use_expert_bias=bias, routed_scaling_factor=1.3, num_experts_per_tok=3)
    for tokens in (1, 5, 33):
        x = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(tokens))
        error = relative_error(lowered(x, RECORDER), block(x, RECORDER))
        print(f"{op} T={tokens}: relative error {error:.1e}")
        assert error < tolerance


@torch.no_grad()
def test_stock_operator_keeps_the_routing_epsilon() -> None:
    """Scores around 1e-6: the operator alone would be wrong by a factor."""
    block, lowered = blocks("8da4w", MoeOp.STOCK, use_expert_bias=False)
    assert isinstance(lowered, StockExperts)
    router = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 0.02 - 13.5 / 64
    block.gate.weight.data, lowered.gate.weight = router, nn.Buffer(router)
    x = torch.ones(1, 7, 64) + torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(1)) * 0.05
    expected = block(x, RECORDER)
    total = (x[0] @ router.T).sigmoid().topk(2).values.sum(-1)
    assert (total < 20 * ROUTING_EPS).all()
    assert relative_error(lowered(x, RECORDER), expected) < 1e-5
    factor = (total / (total + ROUTING_EPS))[None, :, None]
    assert relative_error(lowered(x, RECORDER) / factor, expected) > 0.05
