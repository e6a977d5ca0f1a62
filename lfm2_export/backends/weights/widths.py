"""How wide the weights of a plan are: bytes and bits, as a file holds them and as a decode step reads them.

In: a ``WeightPlan``. Out: bytes and numbers of weights, and what the manifest says of them: ``bits_per_weight`` and
``widths``, how many weights of each part have which format.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from math import prod
from typing import Any

from lfm2_export.backends.weights.plan import StoredWeight, WeightPlan
from lfm2_export.families.tensors import Part
from lfm2_export.quant.formats import IntFormat, WeightFormat


class Counted(StrEnum):
    """What is counted: every byte of the weights, or those that a decode step reads."""

    FILE = "file"
    STEP = "step"


def owners(plan: WeightPlan) -> Iterator[StoredWeight]:
    """The weights that have bytes of their own."""
    return (weight for weight in plan.values() if weight.same_bytes_as is None)


def read_bytes(weight: StoredWeight, plan: WeightPlan, counted: Counted) -> int:
    """Bytes of a weight: all, or those that a decode step reads."""
    return share(plan.bytes_of(weight), weight, plan, counted)


def share(whole: int, weight: StoredWeight, plan: WeightPlan, counted: Counted) -> int:
    """The part of ``whole`` that counts: a step reads of experts those that a token is sent to, of a token table one
    row, unless the head reads it all."""
    if counted is Counted.FILE:
        return whole
    if weight.part is Part.EXPERTS:
        return whole * plan.config.num_experts_per_tok // plan.config.num_experts
    if weight.part is Part.EMBEDDING and not any(one.same_bytes_as == weight.name for one in plan.values()):
        return whole // weight.shape[0]
    return whole


def counted_bytes(plan: WeightPlan, counted: Counted) -> tuple[int, int]:
    """Bytes and weights of a plan."""
    weights = list(owners(plan))
    return (
        sum(read_bytes(weight, plan, counted) for weight in weights),
        sum(share(prod(weight.shape), weight, plan, counted) for weight in weights),
    )


def describe(plan: WeightPlan) -> dict[str, Any]:
    """For the manifest: bits a weight, scales and zero points included, the widths of each part, and how mixed ones
    were chosen."""
    mixture = plan.scheme.mixture
    return {
        **({} if mixture is None else {"mixture": {"within": mixture.within, "judged_by": str(mixture.judged_by)}}),
        "bits_per_weight": {str(counted): round(_bits(plan, counted), 3) for counted in Counted},
        "widths": [
            {"part": part, "format": form, "tensors": tensors, "weights": count}
            for (part, form), (tensors, count) in sorted(_by_format(plan).items())
        ],
    }


def _bits(plan: WeightPlan, counted: Counted) -> float:
    nbytes, count = counted_bytes(plan, counted)
    return 8 * nbytes / max(1, count)


def _by_format(plan: WeightPlan) -> dict[tuple[str, str], tuple[int, int]]:
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for weight in owners(plan):
        key = str(weight.part), _name(weight.format)
        tensors, count = found.get(key, (0, 0))
        found[key] = tensors + len(weight.sources), count + prod(weight.shape)
    return found


def _name(form: WeightFormat) -> str:
    if not isinstance(form, IntFormat):
        return form.dtype
    return f"{form.dtype} by rows" if form.group_size is None else f"{form.dtype} in groups of {form.group_size}"
