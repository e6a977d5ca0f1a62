"""Decides how every weight of a checkpoint is stored in a .pte; nothing is read or computed here.

In: a model's config, a scheme, how experts are to run. Out: a ``WeightPlan``: the format of every published tensor and
the reason for it. What XNNPACK or the operators for experts cannot express is refused here, by name, before any work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase

from lfm2_export.config import ModelConfig
from lfm2_export.errors import ExportError, QuantizationError
from lfm2_export.families import get_family
from lfm2_export.families.tensors import EMBEDDING, HEAD, ModelTensor, Part, TensorClass, Tensors
from lfm2_export.quant.formats import FloatFormat, IntFormat, WeightFormat
from lfm2_export.quant.schemes import FormatChoice, Scheme, check_patterns

# XNNPACK's group-wise kernels walk 32 values at a time.
XNNPACK_GROUP = 32
EMBEDDING_BITS = (4, 8)


class MoeOp(StrEnum):
    """How a layer's experts run."""

    PLAIN = "plain"  # every expert on every token, as fp32 linear layers
    STOCK = "stock"  # llama::quantized_moe_ffn, which ExecuTorch ships
    LFM2 = "lfm2"  # lfm2::moe, ours


@dataclass(frozen=True, kw_only=True)
class WeightPlan:
    """Formats by published name. ``head`` is what the head is stored as: a tied one has no published name.

    ``moe_op`` is None in a model without experts.
    """

    config: ModelConfig
    scheme: Scheme
    tensors: Tensors
    choices: dict[str, FormatChoice]
    head: FormatChoice
    moe_op: MoeOp | None

    def format(self, name: str) -> WeightFormat:
        return self.choices[name].format

    def spilled_bytes(self) -> int:
        """Bytes of the experts that lie on disk until the program is written: those that are packed for an operator."""
        if self.moe_op in (None, MoeOp.PLAIN):
            return 0
        return sum(self._nbytes(tensor) for tensor in self.tensors.values() if tensor.kind is TensorClass.EXPERTS)

    def nbytes(self) -> int:
        """Bytes of all weights as stored."""
        total = sum(map(self._nbytes, self.tensors.values()))
        if self.config.tie_word_embeddings:
            total += _nbytes(self.tensors[EMBEDDING].shape, self.head.format)
        return total

    def _nbytes(self, tensor: ModelTensor) -> int:
        return _nbytes(tensor.shape, self.choices[tensor.name].format)


def make_plan(
    config: ModelConfig, scheme: Scheme, *, moe_op: MoeOp | None = None, embedding_bits: int | None = None
) -> WeightPlan:
    """The plan for one checkpoint under one scheme.

    Raises:
        QuantizationError: a width does not fit the group size, or an excluding pattern matches nothing.
        ExportError: a layer that the operators cannot express.
    """
    _check_config(config)
    if embedding_bits is not None:
        scheme = _with_embedding_bits(scheme, embedding_bits)
    tensors = get_family(config.model_type).tensors(config)
    check_patterns(scheme.exclude, tensors)
    choices = {name: _choose(scheme, tensor) for name, tensor in tensors.items()}
    head = choices[HEAD] if HEAD in choices else scheme.format_for(_untied_head(tensors[EMBEDDING]))
    if HEAD not in choices and any(fnmatchcase(EMBEDDING, pattern) for pattern in scheme.exclude):
        head = choices[EMBEDDING]
    _check_linear(HEAD, head.format, (config.vocab_size, config.hidden_size))
    chosen_op = _moe_op(config, tensors, choices, moe_op, scheme.name)
    return WeightPlan(config=config, scheme=scheme, tensors=tensors, choices=choices, head=head, moe_op=chosen_op)


def _untied_head(table: ModelTensor) -> ModelTensor:
    """A .pte stores a tied head as a matrix of its own, since XNNPACK multiplies by no token table."""
    return replace(table, name=HEAD, kind=TensorClass.HEAD, part=Part.HEAD)


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


def _choose(scheme: Scheme, tensor: ModelTensor) -> FormatChoice:
    choice = scheme.format_for(tensor)
    if tensor.kind in (TensorClass.LINEAR, TensorClass.HEAD):
        _check_linear(tensor.name, choice.format, tensor.shape)
    elif isinstance(choice.format, IntFormat):
        choice.format.groups(tensor.shape[-1], tensor.name)
    return choice


def _check_linear(name: str, form: WeightFormat, shape: tuple[int, ...]) -> None:
    if isinstance(form, FloatFormat):
        return
    form.groups(shape[-1], name)
    if form.group_size % XNNPACK_GROUP:
        raise QuantizationError(
            f"{name}: group_size={form.group_size}, but XNNPACK takes multiples of {XNNPACK_GROUP}; "
            "pass --group-size 32"
        )


def _moe_op(
    config: ModelConfig,
    tensors: Tensors,
    choices: dict[str, FormatChoice],
    asked: MoeOp | None,
    scheme_name: str,
) -> MoeOp | None:
    if not config.moe_layers:
        if asked is not None:
            raise ExportError(f"--moe-op {asked}: this checkpoint has no experts; leave it out")
        return None
    experts = [name for name, tensor in tensors.items() if tensor.kind is TensorClass.EXPERTS]
    is_quantized = _one_kind(experts, choices)
    if not is_quantized:
        if asked is not None:
            raise ExportError(
                f"--moe-op: scheme {scheme_name} leaves the experts unquantized, and neither operator takes them as "
                "numbers; export that scheme apart, without --moe-op"
            )
        return MoeOp.PLAIN
    op = asked or MoeOp.STOCK
    if op is MoeOp.STOCK:
        _check_stock(config)
    return op


def _one_kind(experts: Sequence[str], choices: dict[str, FormatChoice]) -> bool:
    """Whether the experts are quantized; one operator holds all of a layer, so all of them or none."""
    quantized = {isinstance(choices[name].format, IntFormat) for name in experts}
    if len(quantized) > 1:
        raise QuantizationError(
            f"{experts[0]}: --exclude names some experts and not others, but all are stored alike; exclude all of them "
            "(model.layers.*.feed_forward.experts.*)"
        )
    return quantized.pop()


def _check_stock(config: ModelConfig) -> None:
    """What llama::quantized_moe_ffn computes: sigmoid scores, always normalized."""
    if not config.norm_topk_prob:
        raise ExportError(
            "norm_topk_prob=false: llama::quantized_moe_ffn always normalizes the routing weights; pass --moe-op lfm2 "
            "or --scheme fp32"
        )


def _nbytes(shape: tuple[int, ...], form: WeightFormat) -> int:
    count = 1
    for size in shape:
        count *= size
    return int(count * form.bits_per_weight / 8)
