"""The tensors of AutoGPTQ and GPTQModel: int4 or int8 weights, packed along the columns of [columns, rows].

    qweight  int32 [columns * bits / 32, rows]: the codes; neighbours along ``columns`` in a word
    qzeros   int32 [groups, rows * bits / 32]: zero points, in ``checkpoint_format`` "gptq" less one
    scales   float16 (or bfloat16, float32) [groups, rows]
    g_idx    int32 [columns]: the group of each

Source: github.com/ModelCloud/GPTQModel, ``nn_modules/qlinear``. Groups follow from the shapes: ``dynamic`` may give a
layer others than the config's. A zero point of 0 in "gptq" is stored as -1 and comes out as 16 or 0, depending on who
reads it: it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lfm2_export import paths
from lfm2_export.errors import CheckpointError
from lfm2_export.messages import named, shown
from lfm2_export.packed.tensors import (
    PackedTensor,
    PackedWeights,
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

# checkpoint_format -> what is added to the stored zero points.
_FORMATS = {"gptq": 1, "gptq_v2": 0}
_CODES = ".qweight"


def check(section: Mapping[str, Any]) -> str | None:
    """As ``Method.check``."""
    if section.get("bits") not in BITS:
        return f"bits={shown(section.get('bits'))} is not taken over, only {' or '.join(map(str, BITS))}"
    if not isinstance(name := _format(section), str) or name not in _FORMATS:
        return f"checkpoint_format={shown(name)} is none that can be taken over ({', '.join(_FORMATS)})"
    if (dtype := section.get("pack_dtype", "int32")) != "int32":
        return f"pack_dtype={shown(dtype)} is not taken over, only int32"
    return "sym is neither true nor false" if not isinstance(section.get("sym", True), bool) else None


def _format(section: Mapping[str, Any]) -> object:
    if section.get("is_marlin_format"):
        return "marlin"
    return section.get("checkpoint_format") or section.get("format") or "gptq"


def packed_tensors(
    section: Mapping[str, Any], stored: Mapping[str, TensorInfo], weights: PackedWeights
) -> tuple[dict[str, PackedTensor], set[str]]:
    """As ``Method.packed_tensors``."""
    layout = _Columns(offset=_FORMATS[str(_format(section))])
    found: dict[str, PackedTensor] = {}
    used: set[str] = set()
    for name, codes in stored.items():
        if name.endswith(_CODES):
            tensor = _tensor(name.removesuffix(_CODES), codes, stored, section, layout, weights)
            found[tensor.name] = tensor
            used |= {info.name for info in tensor.parts.values()}
    return found, used


def _tensor(
    layer: str,
    codes: TensorInfo,
    stored: Mapping[str, TensorInfo],
    section: Mapping[str, Any],
    layout: _Columns,
    weights: PackedWeights,
) -> PackedTensor:
    scales, zero_points = (required(stored, f"{layer}.{part}", codes) for part in ("scales", "qzeros"))
    order = stored.get(f"{layer}.g_idx")
    if section.get("desc_act"):
        order = required(stored, f"{layer}.g_idx", codes)
    bits, columns = _bits(codes, order, section)
    rows, groups = codes.shape[1], scales.shape[0] if is_matrix(scales) else 0
    if not groups or columns % groups or rows * bits % 32:
        raise CheckpointError(
            f"{paths.shown(scales.file)}: {named(scales.name)} is {shown(list(scales.shape))}, which does not divide "
            f"{rows} rows of {columns} into groups; export the checkpoint that it was made of"
        )
    check_part(codes, ("I32",), (columns * bits // 32, rows))
    check_scales(scales, (groups, rows))
    check_part(zero_points, ("I32",), (groups, rows * bits // 32))
    parts = {"codes": codes, "scales": scales, "zero points": zero_points}
    if order is not None:
        check_order(order, columns, columns // groups, weights)
        parts["order"] = order
    return packed_tensor(
        f"{layer}.weight",
        (rows, columns),
        tool="GPTQ",
        bits=bits,
        step=columns // groups,
        symmetric=bool(section.get("sym", True)),
        layout=layout,
        parts=parts,
    )


def _bits(codes: TensorInfo, order: TensorInfo | None, section: Mapping[str, Any]) -> tuple[int, int]:
    """Bits of a code, and codes in a row: by the groups of the columns where they are there."""
    if not is_matrix(codes):
        raise CheckpointError(
            f"{paths.shown(codes.file)}: {named(codes.name)} is {shown(list(codes.shape))}, which is no matrix; "
            "download it again"
        )
    bits = int(section["bits"])
    words = codes.shape[0]
    if order is not None and order.shape and order.shape[0]:
        bits = 32 * words // order.shape[0]
    if bits not in BITS:
        raise CheckpointError(
            f"{paths.shown(codes.file)}: {named(codes.name)} has codes of {bits} bits, and only {BITS[0]} and "
            f"{BITS[1]} are taken over; export the checkpoint that it was made of"
        )
    return bits, 32 * words // bits


class _Columns:
    """The ``Layout``. ``offset``: what is added to the stored zero points."""

    def __init__(self, *, offset: int):
        self._offset = offset

    def codes(self, tensor: PackedTensor, weights: PackedWeights, block_rows: int) -> Iterator[ByteArray]:
        words = weights.integers(tensor.parts["codes"])  # half a byte a weight; rows lie across it
        for first in range(tensor.row_range.start, tensor.row_range.stop, block_rows):
            rows = slice(first, min(first + block_rows, tensor.row_range.stop))
            yield unpack_columns(words[:, rows], tensor.bits)

    def scales(self, tensor: PackedTensor, weights: PackedWeights) -> FloatArray:
        return weights.numbers(tensor.parts["scales"]).T[tensor.row_range]

    def zero_points(self, tensor: PackedTensor, weights: PackedWeights) -> ByteArray | None:
        info = tensor.parts["zero points"]
        points = unpack_rows(weights.integers(info), tensor.bits).astype(np.int64) + self._offset
        greatest, middle = (1 << tensor.bits) - 1, 1 << (tensor.bits - 1)
        expected = f"{middle} everywhere, as sym=true says" if tensor.symmetric else f"at most {greatest}"
        if (points != middle).any() if tensor.symmetric else (points > greatest).any():
            bad = points[points != middle] if tensor.symmetric else points[points > greatest]
            raise CheckpointError(
                f"{paths.shown(info.file)}: {named(info.name)} has the zero point {int(bad[0])}, expected {expected}; "
                "export the checkpoint that it was made of"
            )
        return None if tensor.symmetric else points.astype(np.uint8).T[tensor.row_range]
