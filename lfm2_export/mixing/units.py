"""What may be stored wider or narrower, and what that costs in bytes.

In: a config, a scheme, a backend's plan of it. Out: ``Space``: the units of a plan (``quant.mixture``) without their
damages, the bytes of everything else, and how many weights these are, as a file or a decode step counts them.

Matrices that one operator reads together are one unit, so that a mixture runs on the same operators as a uniform file:
q, k and v; w1 and w3 of a dense feed-forward; all experts of a layer, which QMoE holds in one format. The token table
stays at 8 bits: at 4 it costs more than all the rest (measured, on three models).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod

from lfm2_export.backends.weights.plan import StoredWeight, WeightPlan
from lfm2_export.backends.weights.widths import Counted, counted_bytes, owners, read_bytes, share
from lfm2_export.config import ModelConfig
from lfm2_export.families import get_family
from lfm2_export.families.tensors import Part, Tensors
from lfm2_export.quant.formats import IntFormat
from lfm2_export.quant.schemes import Scheme

_TOGETHER = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "w1": "w1 w3", "w3": "w1 w3"}


@dataclass(frozen=True, kw_only=True)
class UnitShape:
    """A unit that has no damages yet: its weights in the plan, and the formats that all of them can have."""

    name: str
    weights: tuple[StoredWeight, ...]
    formats: tuple[IntFormat, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Published names; a head that is a copy of the token table goes by its own."""
        return tuple(dict.fromkeys(weight.multiplied(source) for weight in self.weights for source in weight.sources))


@dataclass(frozen=True, kw_only=True)
class Space:
    """``fixed`` bytes of the weights that have no choice, and ``own_bytes`` of all under the scheme's own widths,
    counted as ``counted`` says."""

    units: tuple[UnitShape, ...]
    plan: WeightPlan
    counted: Counted
    own_bytes: int

    def nbytes(self, unit: UnitShape, form: IntFormat) -> int:
        """Of a unit in a format."""
        return sum(read_bytes(replace(one, format=form), self.plan, self.counted) for one in unit.weights)

    def floor(self) -> int:
        """The fewest bytes that the units can have."""
        return sum(min(self.nbytes(unit, form) for form in unit.formats) for unit in self.units)

    @property
    def fixed(self) -> int:
        free = {weight.name for unit in self.units for weight in unit.weights}
        return sum(
            read_bytes(weight, self.plan, self.counted) for weight in owners(self.plan) if weight.name not in free
        )

    @property
    def count(self) -> int:
        """Weights."""
        return sum(share(prod(weight.shape), weight, self.plan, self.counted) for weight in owners(self.plan))


def make_space(
    config: ModelConfig,
    scheme: Scheme,
    make_plan: Callable[[ModelConfig, Scheme], WeightPlan],
    counted: Counted,
) -> Space:
    """The units of a checkpoint under a scheme whose linear layers have 4 bits and whose sensitive ones have 8."""
    free = replace(scheme, sensitive_patterns=(), choices={})
    plan = make_plan(config, free)
    tensors = get_family(config.model_type).tensors(config)
    groups: dict[str, list[StoredWeight]] = {}
    for weight in owners(plan):
        if isinstance(weight.format, IntFormat):
            groups.setdefault(_unit_name(weight), []).append(weight)
    units = (_unit(name, weights, plan, tensors) for name, weights in groups.items())
    own_bytes, _ = counted_bytes(make_plan(config, replace(scheme, choices={})), counted)
    return Space(units=tuple(unit for unit in units if unit.formats), plan=plan, counted=counted, own_bytes=own_bytes)


def _unit_name(weight: StoredWeight) -> str:
    if weight.layer is None:
        return weight.name
    matrix = "experts" if weight.part is Part.EXPERTS else _TOGETHER.get(weight.matrix or "", weight.matrix)
    return f"layer {weight.layer} {weight.part} {matrix}"


def _unit(name: str, weights: Iterable[StoredWeight], plan: WeightPlan, tensors: Tensors) -> UnitShape:
    found, scheme = tuple(weights), plan.scheme
    first = found[0]
    base = first.format if first.part is Part.HEAD else scheme.format_for(tensors[first.sources[0]]).format
    assert isinstance(base, IntFormat)
    formats = dict.fromkeys(
        form if form.group_size is None else replace(form, group_size=size)
        for form in _bases(base, scheme, first.part)
        for size in scheme.group_sizes
    )
    fitting = tuple(form for form in formats if all(plan.takes(replace(weight, format=form)) for weight in found))
    return UnitShape(name=name, weights=found, formats=fitting)


def _bases(base: IntFormat, scheme: Scheme, part: Part) -> list[IntFormat]:
    """Of a matrix of 4 bits: its own format, the same without zero points, which cost bits, and 8 bits; of a token
    table, and of a head that has 8 by itself, its own."""
    if base.bits == 8 or part is Part.EMBEDDING:
        return [base]
    wide = scheme.sensitive if isinstance(scheme.sensitive, IntFormat) else base
    without_points = base if base.symmetric else replace(base, symmetric=True, signed_scale=True)
    return [base, without_points, wide]
