"""``lfm2::moe_ffn`` for PyTorch: what torch.export traces, a reference on the CPU, and loading it into ExecuTorch.

The operator is one sparse feed-forward of LFM2-MoE, from the router's logits on:

    moe_ffn(x [..., D] f32, router_logits [..., E] f32, expert_bias [E] f32 or None, gate_up u8, down u8,
            top_k, normalize, scale) -> [..., D] f32

scores = sigmoid(router_logits); the top_k of scores + expert_bias are chosen (equal ones: the lower index); their
weights are the scores without bias, over their sum + 1e-6 if ``normalize``, times ``scale``. Each chosen expert adds
its weight times w2(silu(w1 x) * w3 x). Weights: packing.py. What enters a matrix is quantized to int8 in groups of 32
per token.

The router's matrix stays outside: it is an ordinary linear, which a delegate computes together with the norm before it.
All that follows is inside, where it is exact and one call, instead of eight small operators that split the delegates.

Shape suffixes: M tokens, D hidden_size, I moe_intermediate_size, E experts, k top_k.
"""

from __future__ import annotations

import ctypes
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from lfm2_export.kernels import build
from lfm2_export.kernels.packing import GROUP_SIZE, TILE_BYTES, TILE_ROWS, unpack_expert
from lfm2_export.models.lfm2_moe import ROUTING_EPS

logger = logging.getLogger(__name__)

OPERATOR = "lfm2::moe_ffn.out"

_ARGUMENTS = (
    "Tensor x, Tensor router_logits, Tensor? expert_bias, Tensor gate_up, Tensor down, "
    "int top_k, bool normalize, float scale"
)
_library = torch.library.Library("lfm2", "DEF")
_library.define(f"moe_ffn({_ARGUMENTS}) -> Tensor")
_library.define(f"moe_ffn.out({_ARGUMENTS}, *, Tensor(a!) out) -> Tensor(a!)")


def load() -> bool:
    """Registers the operator with this process's ExecuTorch runtime, building the library at first use.

    Returns False where there is no compiler to build it: programs that need the operator cannot be loaded then.

    Raises:
        KernelBuildError: executorch is not installed, or the build failed.
    """
    if is_loaded():
        return True
    library = build.library_path()
    if library is None:
        return False
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        raise build.KernelBuildError(
            f"{library}: cannot be loaded ({error}); delete it to have it built again"
        ) from error
    logger.debug("%s comes from %s", OPERATOR, library)
    return True


def is_loaded() -> bool:
    """Whether this process's ExecuTorch runtime knows the operator."""
    from executorch.extension.pybindings import _C as bindings  # not needed to export

    return OPERATOR in bindings._get_operator_names()


def choose_experts(
    logits_ME: Tensor, expert_bias: Tensor | None, top_k: int, normalize: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Expert indices and weights [M, k] of each token, as the operator chooses them."""
    scores = logits_ME.sigmoid()
    ranked = scores if expert_bias is None else scores + expert_bias
    chosen = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, chosen)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + ROUTING_EPS)
    return chosen, weights * scale


def round_to_int8(x: Tensor) -> Tensor:
    """What int8 in groups of 32 with a scale per token leaves of x [..., n]."""
    groups = x.unflatten(-1, (-1, GROUP_SIZE))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    codes = (groups * torch.where(scale > 0, 1 / scale, 0)).round()
    return (codes * scale).flatten(-2)


def moe_ffn(
    x: Tensor,
    router_logits: Tensor,
    expert_bias: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    top_k: int,
    normalize: bool,
    scale: float,
) -> Tensor:
    """The operator, as the module's docstring describes it."""
    return torch.ops.lfm2.moe_ffn(x, router_logits, expert_bias, gate_up, down, top_k, normalize, scale)


@torch.library.impl(_library, "moe_ffn", "CPU")
def _moe_ffn(
    x: Tensor,
    router_logits: Tensor,
    expert_bias: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    top_k: int,
    normalize: bool,
    scale: float,
) -> Tensor:
    """The reference: the same arithmetic up to the order of float sums."""
    _check_shapes(x, router_logits, expert_bias, gate_up, down, top_k)
    x_MD = x.reshape(-1, x.shape[-1])
    chosen, weights = choose_experts(router_logits.flatten(0, -2), expert_bias, top_k, normalize, scale)
    out = torch.zeros_like(x_MD)
    for expert in chosen.unique().tolist():
        w1, w3, w2 = (torch.from_numpy(w.dequantize()) for w in unpack_expert(gate_up.numpy(), down.numpy(), expert))
        token, place = torch.where(chosen == expert)
        x_ = round_to_int8(x_MD[token])
        inner = round_to_int8(F.silu(x_ @ w1.T) * (x_ @ w3.T))
        out.index_add_(0, token, (inner @ w2.T) * weights[token, place, None])
    return out.view_as(x)


@torch.library.impl(_library, "moe_ffn.out", "CPU")
def _moe_ffn_out(
    x: Tensor,
    router_logits: Tensor,
    expert_bias: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    top_k: int,
    normalize: bool,
    scale: float,
    *,
    out: Tensor,
) -> Tensor:
    return out.copy_(_moe_ffn(x, router_logits, expert_bias, gate_up, down, top_k, normalize, scale))


@torch.library.impl(_library, "moe_ffn", "Meta")
def _moe_ffn_meta(
    x: Tensor,
    router_logits: Tensor,
    expert_bias: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    top_k: int,
    normalize: bool,
    scale: float,
) -> Tensor:
    _check_shapes(x, router_logits, expert_bias, gate_up, down, top_k)
    return torch.empty_like(x)


def _check_shapes(
    x: Tensor, logits: Tensor, expert_bias: Tensor | None, gate_up: Tensor, down: Tensor, top_k: int
) -> None:
    _expect_dtype("x", x, torch.float32)
    _expect_dtype("router_logits", logits, torch.float32)
    _expect_dtype("gate_up", gate_up, torch.uint8)
    _expect_dtype("down", down, torch.uint8)
    for name, tensor, least in (("x", x, 1), ("router_logits", logits, 1), ("down", down, 4)):
        torch._check(tensor.dim() >= least, lambda n=name, t=tensor: f"lfm2::moe_ffn: {n} has {t.dim()} dimensions")
    width, experts, inner_blocks = x.shape[-1], logits.shape[-1], down.shape[2]
    torch._check(width % GROUP_SIZE == 0, lambda: f"lfm2::moe_ffn: width {width} is not a multiple of {GROUP_SIZE}")
    torch._check(1 <= top_k <= experts, lambda: f"lfm2::moe_ffn: top_k={top_k} of {experts} experts")
    _expect_shape("router_logits", logits, (*x.shape[:-1], experts))
    _expect_shape("gate_up", gate_up, (experts, 2 * inner_blocks, width // GROUP_SIZE, TILE_BYTES))
    _expect_shape("down", down, (experts, width // TILE_ROWS, inner_blocks, TILE_BYTES))
    if expert_bias is not None:
        _expect_dtype("expert_bias", expert_bias, torch.float32)
        _expect_shape("expert_bias", expert_bias, (experts,))


def _expect_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    torch._check_type(tensor.dtype == dtype, lambda: f"lfm2::moe_ffn: {name} is {tensor.dtype}, not {dtype}")


def _expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    torch._check(tensor.shape == shape, lambda: f"lfm2::moe_ffn: {name} is {list(tensor.shape)}, not {list(shape)}")
