"""A sparse mixture-of-experts block as ExecuTorch runs it: by one of three ways, whichever the plan says.

In: a block's name and the program's weights. Out: a module in place of the eager block, with the same signature, that
holds the experts as its operator wants them.

Shape suffixes: T tokens, D hidden_size, I moe_intermediate_size, E experts, k experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfm2_export.backends.executorch import ops
from lfm2_export.backends.executorch.packing import check_stock
from lfm2_export.backends.executorch.plan import MoeOp
from lfm2_export.backends.executorch.weights import ProgramWeights
from lfm2_export.config import ModelConfig
from lfm2_export.models.lfm2_moe import ROUTING_EPS
from lfm2_export.quant.formats import IntFormat


class Router(nn.Module):
    """Scores [1, T, E] and the chosen experts' [1, T, k], as the eager router has them."""

    def __init__(self, name: str, weights: ProgramWeights):
        super().__init__()
        self.top_k = weights.plan.config.num_experts_per_tok
        self.weight = nn.Buffer(weights.numbers(f"{name}.gate.weight"))
        bias = f"{name}.expert_bias"
        self.bias = nn.Buffer(weights.numbers(bias)) if weights.has(bias) else None

    def logits(self, x_BTD: Tensor) -> Tensor:
        return F.linear(x_BTD, self.weight)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """(all scores, indices of the chosen)."""
        scores = self.logits(x_BTD).sigmoid()
        ranked = scores if self.bias is None else scores + self.bias
        return scores, torch.topk(ranked, self.top_k, dim=-1).indices


class PlainExperts(nn.Module):
    """Every expert on every token, the others' share being 0: num_experts / num_experts_per_tok times the work, but
    nothing
    but linear layers, which XNNPACK runs. Picking experts out of a stack instead would copy their weights for each
    token, and plan that memory for the longest prompt."""

    def __init__(self, name: str, weights: ProgramWeights):
        super().__init__()
        self.config: ModelConfig = weights.plan.config
        self.gate = Router(name, weights)
        experts = range(self.config.num_experts)
        for part in ("w1", "w3", "w2"):
            matrices = [weights.linear(f"{name}.experts.{e}.{part}.weight") for e in experts]
            for expert, matrix in enumerate(matrices):
                assert isinstance(matrix, Tensor)
                self.register_buffer(f"{part}_{expert}", matrix)
        for expert, unit in enumerate(torch.eye(self.config.num_experts)):
            self.register_buffer(f"unit_{expert}", unit[None].clone())

    def forward(self, x_BTD: Tensor, recorder: object) -> Tensor:
        scores, chosen = self.gate(x_BTD)
        share = scores.gather(-1, chosen)
        if self.config.norm_topk_prob:
            share = share / (share.sum(-1, keepdim=True) + ROUTING_EPS)
        share = (scores * 0.0).scatter(-1, chosen, share * self.config.routed_scaling_factor)
        out: Tensor | None = None
        for expert in range(self.config.num_experts):
            # A product with a unit vector: XNNPACK cannot cut a column out of a tensor of dynamic length.
            y = self._expert(x_BTD, expert) * F.linear(share, self.get_buffer(f"unit_{expert}"))
            out = y if out is None else out + y
        assert out is not None
        return out

    def _expert(self, x_BTD: Tensor, expert: int) -> Tensor:
        w1, w3, w2 = (self.get_buffer(f"{part}_{expert}") for part in ("w1", "w3", "w2"))
        return F.linear(F.silu(F.linear(x_BTD, w1)) * F.linear(x_BTD, w3), w2)


class StockExperts(nn.Module):
    """llama::quantized_moe_ffn. It divides the chosen scores by their sum, the model by their sum + 1e-6: what it
    returns is multiplied by sum / (sum + 1e-6), so that nothing is left of the difference."""

    def __init__(self, name: str, weights: ProgramWeights):
        super().__init__()
        self.config: ModelConfig = weights.plan.config
        self.gate = Router(name, weights)
        form = weights.plan[f"{name}.experts.0.w1.weight"].format
        assert isinstance(form, IntFormat)
        self.group_size = check_stock(form)
        # No bias is a bias of zero; an empty tensor cannot be stored.
        self.bias = nn.Buffer(torch.zeros(self.config.num_experts)) if self.gate.bias is None else None
        self.w13, self.w2 = map(nn.Buffer, weights.experts(f"{name}.experts."))

    def forward(self, x_BTD: Tensor, recorder: object) -> Tensor:
        config, bias = self.config, self.gate.bias if self.bias is None else self.bias
        assert bias is not None
        scores, chosen = self.gate(x_BTD)
        total = scores.gather(-1, chosen).sum(-1, keepdim=True)
        y_TD = ops.stock_experts(
            x_BTD.flatten(0, 1),
            self.gate.weight,
            bias,
            self.w13,
            self.w2,
            top_k=config.num_experts_per_tok,
            inner=config.moe_intermediate_size,
            group_size=self.group_size,
            scale=config.routed_scaling_factor,
        )
        return y_TD.unflatten(0, (1, -1)) * (total / (total + ROUTING_EPS))


class Lfm2Experts(nn.Module):
    """lfm2::moe_ffn, which does all that follows the router's product."""

    def __init__(self, name: str, weights: ProgramWeights):
        super().__init__()
        self.config: ModelConfig = weights.plan.config
        self.gate = Router(name, weights)
        self.gate_up, self.down = map(nn.Buffer, weights.experts(f"{name}.experts."))

    def forward(self, x_BTD: Tensor, recorder: object) -> Tensor:
        from lfm2_export.kernels.ops import moe_ffn

        config = self.config
        return moe_ffn(
            x_BTD,
            self.gate.logits(x_BTD),
            self.gate.bias,
            self.gate_up,
            self.down,
            config.num_experts_per_tok,
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )


_BY_OP = {MoeOp.PLAIN: PlainExperts, MoeOp.STOCK: StockExperts, MoeOp.LFM2: Lfm2Experts}


def lowered_experts(name: str, weights: ProgramWeights) -> nn.Module:
    """What takes the place of the block ``name``."""
    op = weights.plan.moe_op
    assert op is not None
    return _BY_OP[op](name, weights)
