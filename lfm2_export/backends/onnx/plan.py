"""What ONNX Runtime's operators can store: the data from which the plan of an ONNX artifact follows.

In: a model's config and a scheme. Out: a ``WeightPlan``: one ``StoredWeight`` per weight of the graph. The lowering
makes fake parameters from it, the stream fills the data files from it, parity reads the files back through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum

import numpy as np

from lfm2_export.backends.weights import plan as plans
from lfm2_export.backends.weights.plan import Roles, Stack, Storage, StoredWeight, WeightPlan
from lfm2_export.config import FULL_ATTENTION, SLIDING_ATTENTION, ModelConfig
from lfm2_export.errors import QuantizationError
from lfm2_export.families.tensors import ModelTensor, TensorClass
from lfm2_export.quant.formats import GROUP_SIZES, FloatFormat, IntFormat, WeightFormat
from lfm2_export.quant.schemes import FormatChoice, Scheme

LEAST_GROUP = 32  # of those that are chosen for a width; the user may ask for less
# By the kind of attention layer: the layout module's parameters (cos, sin) and the initializers that they become.
ROPE_TABLES = {
    FULL_ATTENTION: {"cos": "rope.cos", "sin": "rope.sin"},
    SLIDING_ATTENTION: {"sliding_cos": "rope.sliding.cos", "sliding_sin": "rope.sliding.sin"},
}


class Layout(Enum):
    """How the values of a weight are arranged in its initializers."""

    PLAIN = "plain"  # as in the checkpoint
    TRANSPOSED = "transposed"  # [in, out], for MatMul
    MATMUL = "matmul"  # MatMulNBits
    TABLE = "table"  # GatherBlockQuantized, or the same bytes read by a tied head
    GATE_UP = "gate_up"  # all experts' w1 and w3, rows interleaved
    DOWN = "down"  # all experts' w2

    @property
    def is_whole(self) -> bool:
        return self in (Layout.PLAIN, Layout.TRANSPOSED)

    @property
    def interleaved(self) -> int:
        return 2 if self is Layout.GATE_UP else 1

    @property
    def is_bare(self) -> bool:
        return self is Layout.PLAIN

    def roles(self, shape: tuple[int, ...], form: WeightFormat) -> Roles:
        if isinstance(form, FloatFormat):
            return {"weight": (shape[::-1] if self is Layout.TRANSPOSED else shape, np.dtype(form.dtype))}
        *outer, columns = shape
        size = form.group_of(columns)
        groups = columns // size
        blob = (groups, size * form.bits // 8) if self is Layout.MATMUL else (columns * form.bits // 8,)
        found = {
            "qdata": ((*outer, *blob), np.dtype(np.uint8)),
            "scale": ((*outer, groups), np.dtype(form.scale_dtype)),
        }
        if not form.symmetric:
            found["zero_point"] = ((*outer, -(-groups * form.bits // 8)), np.dtype(np.uint8))
        return found


def make_plan(config: ModelConfig, scheme: Scheme) -> WeightPlan:
    """The plan for one checkpoint under one scheme.

    Raises:
        QuantizationError: a width is no multiple of the group size, or an excluding pattern matches nothing.
    """
    plan = plans.make_plan(config, scheme, _OnnxStorage(fits_groups=scheme.fits_groups))
    if config.drafter is not None:
        return plan
    # cos and sin of every position, for half of a head, for each kind of attention.
    values = config.max_position_embeddings * config.head_dim * len(config.ropes)
    return replace(plan, table_bytes=values * np.dtype(plan.activation_dtype).itemsize)


class _OnnxStorage(Storage):
    """One operator holds a layer's experts; a tied head reads the token table.

    ``fits_groups``: whether a width that is no multiple of the scheme's group size gets the largest that divides it.
    """

    stacks = (Stack(name="gate_up", matrices=("w1", "w3")), Stack(name="down", matrices=("w2",)))
    shares_tied_head = True

    def __init__(self, *, fits_groups: bool):
        self.fits_groups = fits_groups

    def layout(self, kind: TensorClass, form: WeightFormat, matrix: str | None) -> Layout:
        match kind:
            case TensorClass.EXPERTS:
                return Layout.GATE_UP if matrix == "gate_up" else Layout.DOWN
            case TensorClass.EMBEDDING:
                return Layout.TABLE
            case TensorClass.HEAD if isinstance(form, FloatFormat):
                return Layout.TABLE  # never transposed: a vocabulary's table is too large to hold twice
            case TensorClass.LINEAR | TensorClass.HEAD | TensorClass.ROUTER:
                return Layout.MATMUL if isinstance(form, IntFormat) else Layout.TRANSPOSED
        return Layout.PLAIN

    def name(self, tensor: ModelTensor, layout: object) -> str:
        """Plain tensors keep the checkpoint's name; the initializers of a matrix are called after its stem."""
        return tensor.name if layout is Layout.PLAIN else tensor.name.removesuffix(".weight")

    def choose(self, tensor: ModelTensor, choice: FormatChoice) -> FormatChoice:
        if tensor.kind in (TensorClass.ROUTER, TensorClass.EXPERT_BIAS):
            # fp16 scores tie now and then, and a tie picks another expert than the model would.
            return FormatChoice(FloatFormat(dtype="float32"), choice.reason)
        return _fitted(choice, tensor.shape[-1]) if self.fits_groups else choice

    def check(self, weight: StoredWeight) -> None:
        super().check(weight)
        if isinstance(weight.format, IntFormat) and weight.format.group_size is None:
            raise QuantizationError(
                f"{weight.name}: a scale for a whole row, but onnxruntime's operators take groups of 16 to 256; pass "
                "--group-size 32"
            )

    def choose_for_stack(self, choices: Mapping[str, FormatChoice], tensors: Sequence[ModelTensor]) -> FormatChoice:
        # Widths inside and outside of the experts may have got groups of different sizes, all powers of 2.
        form, reason = min(choices.values(), key=lambda choice: (_group_size(choice.format), choice.reason))
        if any(_in_groups_of(_group_size(form), choice.format) != form for choice in choices.values()):
            raise QuantizationError(
                f"{tensors[0].name}: this layer's experts are to be stored in several formats, but QMoE holds all of "
                "them in one; exclude the whole layer (model.layers.N.feed_forward.experts.*) or none of it"
            )
        if isinstance(form, IntFormat) and form.group_size in {tensor.shape[-1] for tensor in tensors}:
            # onnxruntime 1.30's QMoE misreads 4-bit zero points where a row is a single group (measured; 1.31 is
            # right).
            form = replace(form, symmetric=True, signed_scale=True)
        return FormatChoice(form, reason)


def _fitted(choice: FormatChoice, columns: int) -> FormatChoice:
    """In the largest groups of which ``columns`` are a multiple; as it was where there are none that kernels are made
    for, which is refused later."""
    form, reason = choice
    if not isinstance(form, IntFormat) or columns % form.group_of(columns) == 0:
        return choice
    fitting = [size for size in GROUP_SIZES if LEAST_GROUP <= size < form.group_of(columns) and columns % size == 0]
    if not fitting:
        return choice
    return FormatChoice(
        replace(form, group_size=fitting[-1]),
        f"{reason}; groups of {fitting[-1]}: {columns} columns are no multiple of {form.group_size}",
    )


def _group_size(form: WeightFormat) -> int:
    return form.group_size or 0 if isinstance(form, IntFormat) else 0


def _in_groups_of(size: int, form: WeightFormat) -> WeightFormat:
    return replace(form, group_size=size) if isinstance(form, IntFormat) and size else form
