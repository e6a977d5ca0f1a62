"""In which format of ours each packed weight can be held bit for bit.

In: a checkpoint's tensors, what each is to the model, and the reader of the packed ones. Out: formats by published
name. A scale of more values than our groups have stands for several groups. The experts of a layer, which one operator
holds, get one format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import cast

import numpy as np

from lfm2_export.families.tensors import ModelTensor, TensorClass
from lfm2_export.packed.tensors import PackedTensor, PackedWeights
from lfm2_export.quant.formats import GROUP_SIZES, IntFormat, ScaleDtype
from lfm2_export.safetensors_file import TensorInfo

_WIDEST = 128  # of groups that a scale is repeated for: wider ones save a hundredth of a bit


def exact_formats(
    tensors: Mapping[str, TensorInfo], model_tensors: Mapping[str, ModelTensor], weights: PackedWeights
) -> dict[str, IntFormat]:
    """Reads the scales that may not be float16 numbers: bfloat16 and float32 ones.

    Raises:
        CheckpointError: a file changed or cannot be read.
    """
    found: dict[str, IntFormat] = {}
    for name, info in tensors.items():
        if isinstance(info, PackedTensor) and (form := _format(info, model_tensors[name].kind, weights)):
            found[name] = form
    for names in _layers_of_experts(model_tensors.values()):
        if all(name in found for name in names) and (one := _together([found[name] for name in names])):
            found |= dict.fromkeys(names, one)
    return found


def _format(info: PackedTensor, kind: TensorClass, weights: PackedWeights) -> IntFormat | None:
    # QMoE is not trusted with zero points where a row is a single group (``backends/onnx/plan.py``).
    whole_rows = info.symmetric or kind is not TensorClass.EXPERTS
    sizes = [size for size in GROUP_SIZES if info.step % size == 0 and (whole_rows or size < info.shape[1])]
    if not sizes:
        return None
    size = info.step if info.step in sizes else max(size for size in sizes if size <= _WIDEST)
    return IntFormat(
        bits=4 if info.bits == 4 else 8,
        group_size=size,
        symmetric=info.symmetric,
        signed_scale=info.symmetric,
        scale_dtype=_scale_dtype(info, weights),
    )


def _scale_dtype(info: PackedTensor, weights: PackedWeights) -> ScaleDtype:
    """The narrowest that holds every scale."""
    stored = info.parts["scales"]
    if stored.dtype == "F16":
        return "float16"
    scales = weights.numbers(stored)
    with np.errstate(over="ignore"):
        narrow = scales.astype(np.float16).astype(np.float32)
    return "float16" if np.array_equal(narrow, scales) else "float32"


def _layers_of_experts(model_tensors: Iterable[ModelTensor]) -> list[list[str]]:
    layers: dict[int, list[str]] = {}
    for tensor in model_tensors:
        if tensor.kind is TensorClass.EXPERTS:
            layers.setdefault(cast("int", tensor.layer), []).append(tensor.name)
    return list(layers.values())


def _together(forms: list[IntFormat]) -> IntFormat | None:
    """One format for all: the least groups, of which all others are whole numbers, and the widest scales."""
    least = min(forms, key=lambda form: form.group_size or math.inf)
    wide: ScaleDtype = "float32" if any(form.scale_dtype == "float32" for form in forms) else "float16"
    common = replace(least, scale_dtype=wide)
    alike = all((form.bits, form.symmetric) == (common.bits, common.symmetric) for form in forms)
    return common if alike else None
