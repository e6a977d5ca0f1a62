"""The operator's PyTorch side: the reference, shapes under tracing, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lfm2_export.config import ModelConfig
from lfm2_export.kernels import ops
from lfm2_export.kernels.packing import unpack_expert
from lfm2_export.models.lfm2_moe import Experts, Router
from tests.kernels import c_api
from tests.kernels.toy_program import random_experts

WIDTH, INNER, EXPERTS, TOP_K = 64, 96, 5, 2


def arguments(tokens: int = 6) -> dict:
    packed = random_experts(np.random.default_rng(3), EXPERTS, WIDTH, INNER)
    torch.manual_seed(0)
    return {
        "x": torch.randn(1, tokens, WIDTH),
        "router_logits": torch.randn(1, tokens, EXPERTS),
        "expert_bias": torch.randn(EXPERTS),
        "gate_up": torch.from_numpy(packed.gate_up),
        "down": torch.from_numpy(packed.down),
        "top_k": TOP_K,
        "normalize": True,
        "scale": 1.25,
    }


def test_the_reference_is_what_the_kernels_compute():
    given = arguments()
    want = ops.moe_ffn(**given)
    x, logits = given["x"][0].numpy(), given["router_logits"][0].numpy()
    bias, gate_up, down = (given[name].numpy() for name in ("expert_bias", "gate_up", "down"))
    got = c_api.moe_ffn("scalar", x, logits, bias, gate_up, down, top_k=TOP_K, scale=1.25)
    error = np.abs(got - want[0].numpy()).max() / np.abs(got).max()
    print(f"greatest difference {error:.1e}")
    assert error < 5e-3  # where a float32 sum rounds to another int8 code


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_it_is_the_eager_block_up_to_int8_activations(normalize: bool, with_bias: bool):
    given = arguments(tokens=11) | {"normalize": normalize}
    given["expert_bias"] = given["expert_bias"] if with_bias else None
    config = ModelConfig.__new__(ModelConfig)
    for name, value in {
        "num_experts": EXPERTS, "hidden_size": WIDTH, "moe_intermediate_size": INNER, "num_experts_per_tok": TOP_K,
        "norm_topk_prob": normalize, "routed_scaling_factor": 1.25,
    }.items():  # fmt: skip
        object.__setattr__(config, name, value)
    router, experts = Router(config), Experts(config)
    with torch.no_grad():
        for expert in range(EXPERTS):
            matrices = unpack_expert(given["gate_up"].numpy(), given["down"].numpy(), expert)
            w1, w3, w2 = (torch.from_numpy(matrix.dequantize()) for matrix in matrices)
            experts.gate_up_proj[expert], experts.down_proj[expert] = torch.cat((w1, w3)), w2
        torch.nn.init.normal_(router.weight, std=0.2)
        logits, weights, chosen = router(given["x"][0], given["expert_bias"])
        want = experts(given["x"][0], weights, chosen)
        got = ops.moe_ffn(**(given | {"router_logits": logits[None]}))[0]
    error = float((got - want).norm() / want.norm())
    print(f"relative difference {error:.1e}")
    assert error < 0.02


def test_equal_scores_go_to_the_lower_index():
    chosen, weights = ops.choose_experts(torch.zeros(2, 6), None, 3, True, 1.0)
    assert chosen.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 3), atol=1e-5, rtol=0)


def test_the_out_variant_writes_into_out():
    given, out = arguments(), torch.empty(1, 6, WIDTH)
    returned = torch.ops.lfm2.moe_ffn.out(**given, out=out)
    assert returned is out
    torch.testing.assert_close(out, ops.moe_ffn(**given))


def test_shapes_are_known_without_values():
    given = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments().items()}
    assert ops.moe_ffn(**given).shape == (1, 6, WIDTH)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 6, 48)}, "width 48 is not a multiple of 32"),
        ({"x": torch.zeros(1, 6, 96)}, r"gate_up is \[5, 6, 2, 576\], not \[5, 6, 3, 576\]"),
        ({"x": torch.zeros(1, 6, 64).half()}, "x is torch.float16"),
        ({"router_logits": torch.zeros(1, 7, 5)}, r"router_logits is \[1, 7, 5\], not \[1, 6, 5\]"),
        ({"expert_bias": torch.zeros(4)}, r"expert_bias is \[4\], not \[5\]"),
        ({"top_k": 6}, "top_k=6 of 5 experts"),
        ({"top_k": 0}, "top_k=0 of 5 experts"),
        ({"down": torch.zeros(5, 2, 3, 512, dtype=torch.uint8)}, r"down is \[5, 2, 3, 512\]"),
        ({"down": torch.zeros(5, 2, 3, 576)}, "down is torch.float32"),
        ({"down": torch.zeros(10, 1728, dtype=torch.uint8)}, "down has 2 dimensions"),
        ({"x": torch.zeros(())}, "x has 0 dimensions"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict, message: str):
    with pytest.raises((RuntimeError, TypeError), match=message):
        ops.moe_ffn(**(arguments() | change))
