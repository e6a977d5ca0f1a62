"""What a .pte's operators can store: the data from which the plan of its weights follows.

In: a model's config, a scheme, how experts are to run. Out: a ``PtePlan``: one ``StoredWeight`` per published tensor,
and one for the head where that is tied. What XNNPACK or the operators for experts cannot express is refused here, by
name, before any work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from math import prod

import numpy as np

from lfm2_export.backends.executorch.packing import HEADER_BYTES, check_stock, stock_bytes
from lfm2_export.backends.weights import plan as plans
from lfm2_export.backends.weights.plan import Roles, Storage, StoredWeight, WeightPlan
from lfm2_export.config import ModelConfig
from lfm2_export.errors import ExportError, QuantizationError
from lfm2_export.families.tensors import Part, TensorClass
from lfm2_export.kernels.packing import check_format, tiles_shape
from lfm2_export.quant.formats import FloatFormat, IntFormat, WeightFormat
from lfm2_export.quant.schemes import Scheme

# XNNPACK's group-wise kernels walk 32 values at a time.
XNNPACK_GROUP = 32
EMBEDDING_BITS = (4, 8)


class MoeOp(StrEnum):
    """How a layer's experts run."""

    PLAIN = "plain"  # every expert on every token, as fp32 linear layers
    STOCK = "stock"  # llama::quantized_moe_ffn, which ExecuTorch ships
    LFM2 = "lfm2"  # lfm2::moe_ffn, ours


class Layout(Enum):
    """How the values of a weight are arranged in the tensors that the lowered model holds."""

    PLAIN = "plain"  # numbers of any shape
    ROWS = "rows"  # numbers [rows, columns]
    CODES = "codes"  # a signed code a byte; XNNPACK packs them when the program is put together
    NIBBLES = "nibbles"  # two unsigned codes a byte, the first in the upper half: a token table of 4 bits
    STOCK = "stock"  # a blob of the stock operator for experts (``packing``)
    STOCK_BELOW = "stock below"  # the same without its header, since it lies below another's rows
    TILES = "tiles"  # a matrix of our operator for experts (``kernels.packing``)

    @property
    def is_whole(self) -> bool:
        return self in (Layout.PLAIN, Layout.STOCK, Layout.STOCK_BELOW, Layout.TILES)

    @property
    def interleaved(self) -> int:
        return 1

    @property
    def is_bare(self) -> bool:
        return self in (Layout.PLAIN, Layout.ROWS)

    def roles(self, shape: tuple[int, ...], form: WeightFormat) -> Roles:
        byte, single = np.dtype(np.uint8), np.dtype(np.float32)
        if isinstance(form, FloatFormat):
            return {"weight": (shape, np.dtype(form.dtype))}
        rows, columns = shape
        match self:
            case Layout.STOCK | Layout.STOCK_BELOW:
                nbytes = stock_bytes(rows, columns, form.group_of(columns))
                return {"qdata": ((nbytes if self is Layout.STOCK else nbytes - HEADER_BYTES,), byte)}
            case Layout.TILES:
                return {"qdata": (tiles_shape(rows, columns), byte)}
        qdata = (shape, np.dtype(np.int8)) if self is Layout.CODES else ((rows, columns // 2), byte)
        return {"qdata": qdata, "scale": ((rows, columns // form.group_of(columns)), single)}

    def program_bytes(self, shape: tuple[int, ...], form: WeightFormat) -> int:
        """Of a weight in the finished program, in which XNNPACK has codes of 4 bits packed and scales of groups as
        bfloat16."""
        roles = self.roles(shape, form)
        if self is Layout.CODES and isinstance(form, IntFormat) and form.bits == 4:
            return sum(prod(sizes) // 2 if role == "qdata" else 2 * prod(sizes) for role, (sizes, _) in roles.items())
        return sum(prod(sizes) * dtype.itemsize for sizes, dtype in roles.values())


@dataclass(frozen=True, kw_only=True)
class PtePlan(WeightPlan):
    """``moe_op`` is None in a model without experts; ``also``: how they run in another program of the same weights."""

    moe_op: MoeOp | None
    also: MoeOp | None = None

    def bytes_of(self, weight: StoredWeight) -> int:
        assert isinstance(weight.layout, Layout)
        return weight.layout.program_bytes(weight.shape, weight.format)

    def takes(self, weight: StoredWeight) -> bool:
        try:
            for op in filter(None, (self.moe_op or MoeOp.STOCK, self.also)):
                _PteStorage(op).check(weight)
        except QuantizationError:
            return False
        return True

    def program_bytes(self) -> int:
        """Bytes of all weights in the program."""
        return sum(map(self.bytes_of, self.values()))

    def held_bytes(self) -> int:
        """Of these, what is in memory when the program is put together: all but the experts that an operator takes
        packed, which lie in files."""
        return sum(self.bytes_of(weight) for weight in self.values() if not is_packed(weight))


def is_packed(weight: StoredWeight) -> bool:
    """Whether it is part of what an operator for experts takes: all matrices of a kind in a layer as one tensor."""
    return weight.layout in (Layout.STOCK, Layout.STOCK_BELOW, Layout.TILES)


def make_plan(
    config: ModelConfig,
    scheme: Scheme,
    *,
    moe_op: MoeOp | None = None,
    embedding_bits: int | None = None,
    also: MoeOp | None = None,
) -> PtePlan:
    """The plan for one checkpoint under one scheme; ``also``: another way to run its experts, in a program apart.

    Raises:
        QuantizationError: a width does not fit the group size, or an excluding pattern matches nothing.
        ExportError: a layer that the operators cannot express.
    """
    _check_config(config)
    if embedding_bits is not None:
        scheme = _with_embedding_bits(scheme, embedding_bits)
    plan = plans.make_plan(config, scheme, _PteStorage(moe_op or MoeOp.STOCK))
    chosen = _moe_op(plan, moe_op)
    return PtePlan(config=config, scheme=plan.scheme, weights=plan.weights, moe_op=chosen, also=also)


class _PteStorage(Storage):
    """Each matrix is a weight of its own; a tied head is a copy, since XNNPACK multiplies by no token table."""

    def __init__(self, moe_op: MoeOp):
        self.moe_op = moe_op

    def layout(self, kind: TensorClass, form: WeightFormat, matrix: str | None) -> Layout:
        if kind in (TensorClass.SMALL, TensorClass.EXPERT_BIAS):
            return Layout.PLAIN
        if isinstance(form, FloatFormat):
            return Layout.ROWS
        if kind is TensorClass.EMBEDDING and form.bits == 4:
            return Layout.NIBBLES
        if kind is not TensorClass.EXPERTS:
            return Layout.CODES
        if self.moe_op is MoeOp.LFM2:
            return Layout.TILES
        return Layout.STOCK_BELOW if matrix == "w3" else Layout.STOCK

    def check(self, weight: StoredWeight) -> None:
        super().check(weight)
        if isinstance(weight.format, FloatFormat):
            return
        if weight.part is Part.EXPERTS:
            # That the rows of ours fill their blocks follows from the other matrix's groups.
            (check_format if self.moe_op is MoeOp.LFM2 else check_stock)(weight.format)
        elif weight.part is not Part.EMBEDDING:
            _check_linear(weight.name, weight.format)


def _check_config(config: ModelConfig) -> None:
    if config.head_dim % 2:
        raise ExportError(f"head_dim={config.head_dim}: RoPE turns pairs, so it must be even")
    if config.conv_L_cache < 2:
        raise ExportError(
            f"conv_L_cache={config.conv_L_cache}: a conv without a state cannot be exported to executorch"
        )


def _with_embedding_bits(scheme: Scheme, bits: int) -> Scheme:
    if bits not in EMBEDDING_BITS:
        raise ExportError(f"--embedding-bits {bits}: pass one of {', '.join(map(str, EMBEDDING_BITS))}")
    if not isinstance(scheme.embedding, IntFormat):
        raise ExportError(
            f"--embedding-bits {bits}: scheme {scheme.name} stores the embedding as numbers; leave it out"
        )
    return replace(scheme, embedding=replace(scheme.embedding, bits=4 if bits == 4 else 8))


def _check_linear(name: str, form: IntFormat) -> None:
    if form.bits == 8 and form.group_size is not None:
        raise QuantizationError(
            f"{name}: 8 bits in groups of {form.group_size}, but XNNPACK takes 8 bits with a scale for a whole row; "
            "pass --backend onnx"
        )
    if form.bits == 4 and (form.group_size is None or form.group_size % XNNPACK_GROUP):
        raise QuantizationError(
            f"{name}: group_size={form.group_size}, but XNNPACK takes multiples of {XNNPACK_GROUP}; "
            "pass --group-size 32"
        )


def _moe_op(plan: WeightPlan, asked: MoeOp | None) -> MoeOp | None:
    experts = [weight for weight in plan.values() if weight.part is Part.EXPERTS]
    if not experts:
        if asked is not None:
            raise ExportError(f"--moe-op {asked}: this checkpoint has no experts; leave it out")
        return None
    if not _one_kind(experts):
        if asked is not None:
            raise ExportError(
                f"--moe-op: scheme {plan.scheme.name} leaves the experts unquantized, and neither operator takes them "
                "as numbers; export that scheme apart, without --moe-op"
            )
        return MoeOp.PLAIN
    op = asked or MoeOp.STOCK
    if op is MoeOp.STOCK:
        _check_stock(plan.config)
    return op


def _one_kind(experts: Sequence[StoredWeight]) -> bool:
    """Whether the experts are quantized; one operator holds all of a layer, so all of them or none."""
    quantized = {isinstance(weight.format, IntFormat) for weight in experts}
    if len(quantized) > 1:
        raise QuantizationError(
            f"{experts[0].name}: --exclude names some experts and not others, but all are stored alike; exclude all of "
            "them (model.layers.*.feed_forward.experts.*)"
        )
    return quantized.pop()


def _check_stock(config: ModelConfig) -> None:
    """What llama::quantized_moe_ffn computes: sigmoid scores, always normalized."""
    if not config.norm_topk_prob:
        raise ExportError(
            "norm_topk_prob=false: llama::quantized_moe_ffn always normalizes the routing weights; pass --moe-op lfm2 "
            "or --scheme fp32"
        )
