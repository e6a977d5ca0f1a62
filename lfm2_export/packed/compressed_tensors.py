"""compressed-tensors' format ``pack-quantized``, as llm-compressor saves it: int4 or int8 weights, and no more.

    weight_packed      int32 [rows, columns * bits / 32]: code + 2^(bits-1), neighbours in a row in a word
    weight_scale       [rows, columns / group_size], or [rows, 1] for strategy "channel"
    weight_shape       int64 [2]: rows, columns
    weight_zero_point  int32 [rows * bits / 32, scales of a row]: neighbours in a COLUMN in a word; asymmetric only
    weight_g_idx       int32 [columns]: the group of each; actorder "group" only

Source: github.com/vllm-project/compressed-tensors, ``compressors/pack_quantized``. Bits and groups follow from the
shapes, and have to be among those that the config states: which of its schemes a layer has is not looked up, since
their targets are patterns of a stranger's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lfm2_export import paths
from lfm2_export.errors import CheckpointError
from lfm2_export.messages import named, shown
from lfm2_export.packed.tensors import (
    PackedTensor,
    PackedWeights,
    as_integers,
    check_order,
    check_part,
    check_scales,
    is_matrix,
    packed_tensor,
    required,
)
from lfm2_export.packed.words import BITS, unpack_columns, unpack_rows
from lfm2_export.quant.formats import ByteArray, FloatArray
from lfm2_export.safetensors_file import TensorInfo

_FORMAT = "pack-quantized"
_STRATEGIES = ("group", "channel")
_CODES = ".weight_packed"


def check(section: Mapping[str, Any]) -> str | None:
    """As ``Method.check``."""
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return f"config_groups={shown(groups)} names no scheme"
    if section.get("kv_cache_scheme") is not None:
        return "kv_cache_scheme quantizes the cache of keys and values, which no program here does so"
    if section.get("transform_config"):
        return "transform_config turns what the weights are multiplied with, which no program here does"
    formats = [section.get("format"), *(one.get("format") for one in groups.values() if isinstance(one, dict))]
    others = [one for one in formats if one not in (None, _FORMAT, "mixed-precision")]
    if others or formats[0] is None:
        return f"format={shown((others or formats)[0])} is none that can be taken over ({_FORMAT})"
    return next(filter(None, map(_unfit, groups.values())), None)


def _unfit(group: object) -> str | None:
    if not isinstance(group, dict) or not isinstance(weights := group.get("weights"), dict):
        return f"config_groups has {shown(group)}, which says nothing of weights"
    for kind in ("input_activations", "output_activations"):
        if group.get(kind) is not None:
            return f"{kind} are quantized, and no program here rounds them so"
    wanted = {"type": ("int",), "num_bits": BITS, "strategy": (*_STRATEGIES, None), "dynamic": (False, None)}
    for key, values in wanted.items():
        if (value := weights.get(key, "int" if key == "type" else None)) not in values:
            listing = " or ".join(str(one) for one in values if one is not None)
            return f"{key}={shown(value)} of weights is not taken over, only {listing}"
    return None


def packed_tensors(
    section: Mapping[str, Any], stored: Mapping[str, TensorInfo], weights: PackedWeights
) -> tuple[dict[str, PackedTensor], set[str]]:
    """As ``Method.packed_tensors``."""
    stated = [group["weights"] for group in section["config_groups"].values()]
    found: dict[str, PackedTensor] = {}
    used: set[str] = set()
    for name, codes in stored.items():
        if name.endswith(_CODES):
            tensor = _tensor(name.removesuffix(_CODES), codes, stored, stated, weights)
            found[tensor.name] = tensor
            used |= {info.name for info in tensor.parts.values()}
    return found, used


def _tensor(
    layer: str,
    codes: TensorInfo,
    stored: Mapping[str, TensorInfo],
    stated: list[Mapping[str, Any]],
    weights: PackedWeights,
) -> PackedTensor:
    scales, shape = (required(stored, f"{layer}.weight_{part}", codes) for part in ("scale", "shape"))
    zero_points, order = (stored.get(f"{layer}.weight_{part}") for part in ("zero_point", "g_idx"))
    rows, columns = _shape(codes, shape, weights)
    bits = 32 * codes.shape[1] // columns
    step = _step(scales, rows, columns)
    check_part(codes, ("I32",), (rows, columns * bits // 32))
    if not any(_is_stated(one, bits, step, columns, symmetric=zero_points is None) for one in stated):
        kind = "symmetric" if zero_points is None else "asymmetric"
        raise CheckpointError(
            f"{paths.shown(codes.file)}: {named(codes.name)} is int{bits} in groups of {step}, {kind}, which none of "
            "config.json's config_groups is; use the config.json of these weights"
        )
    parts = {"codes": codes, "scales": scales, "shape": shape}
    if zero_points is not None:
        check_part(zero_points, ("I32",), (-(-rows * bits // 32), scales.shape[1]))
        parts["zero points"] = zero_points
    if order is not None:
        check_order(order, columns, step, weights)
        parts["order"] = order
    return packed_tensor(
        f"{layer}.weight",
        (rows, columns),
        tool="compressed-tensors",
        bits=bits,
        step=step,
        symmetric=zero_points is None,
        layout=_LAYOUT,
        parts=parts,
    )


def _shape(codes: TensorInfo, shape: TensorInfo, weights: PackedWeights) -> tuple[int, int]:
    """Rows and columns as they are stated; they agree with the words that there are."""
    check_part(shape, ("I64",), (2,))
    rows, columns = (int(size) for size in weights.integers(shape))
    if not is_matrix(codes) or rows != codes.shape[0] or all(32 * codes.shape[1] != columns * bits for bits in BITS):
        raise CheckpointError(
            f"{paths.shown(codes.file)}: {named(codes.name)} is {shown(list(codes.shape))}, which holds no int4 or "
            f"int8 codes of the shape {[rows, columns]} that {named(shape.name)} states; download it again"
        )
    return rows, columns


def _step(scales: TensorInfo, rows: int, columns: int) -> int:
    count = scales.shape[1] if is_matrix(scales) else 0
    if not count or columns % count:
        raise CheckpointError(
            f"{paths.shown(scales.file)}: {named(scales.name)} is {shown(list(scales.shape))}, which does not divide "
            f"rows of {columns} into groups; export the checkpoint that it was made of"
        )
    check_scales(scales, (rows, count))
    return columns // count


def _is_stated(weights: Mapping[str, Any], bits: int, step: int, columns: int, *, symmetric: bool) -> bool:
    """Whether a scheme's weights are so."""
    size = weights.get("group_size")
    steps = (step,) if weights.get("strategy") == "group" else (step, -1, None)
    fits = size in steps and (size not in (-1, None) or step == columns)
    return fits and weights.get("num_bits") == bits and weights.get("symmetric", True) is symmetric


class _Rows:
    """The ``Layout``."""

    def codes(self, tensor: PackedTensor, weights: PackedWeights, block_rows: int) -> Iterator[ByteArray]:
        codes = as_integers(tensor.parts["codes"])
        for first in range(tensor.row_range.start, tensor.row_range.stop, block_rows):
            rows = slice(first, min(first + block_rows, tensor.row_range.stop))
            yield unpack_rows(weights.integers(codes.rows(rows)), tensor.bits)

    def scales(self, tensor: PackedTensor, weights: PackedWeights) -> FloatArray:
        return weights.numbers(tensor.parts["scales"].rows(tensor.row_range))

    def zero_points(self, tensor: PackedTensor, weights: PackedWeights) -> ByteArray | None:
        if tensor.symmetric:
            return None
        return unpack_columns(weights.integers(tensor.parts["zero points"]), tensor.bits).T[tensor.row_range]


_LAYOUT = _Rows()
