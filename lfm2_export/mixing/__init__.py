"""Mixed widths: which tensors get 8 bits and which 4, in groups of what size, so that a budget of bytes loses least.

In: a checkpoint, a scheme with 4-bit linear layers, a budget. Out: the scheme with a choice for every tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lfm2_export.backends.weights.plan import WeightPlan
from lfm2_export.calibration.statistics import Statistics
from lfm2_export.checkpoint import Checkpoint
from lfm2_export.config import ModelConfig
from lfm2_export.errors import QuantizationError
from lfm2_export.messages import shown
from lfm2_export.mixing.budget import Budget, bytes_for, make_budget
from lfm2_export.mixing.estimate import Damages, WithoutData, estimate_damages
from lfm2_export.mixing.informed import Informed
from lfm2_export.mixing.units import Space, make_space
from lfm2_export.quant.algorithms import DEFAULT_ALGORITHM, get_algorithm
from lfm2_export.quant.mixture import Option, Unit, choose
from lfm2_export.quant.schemes import FormatChoice, JudgedBy, Mixture, Scheme

__all__ = ["Budget", "MixRequest", "check_mixable", "make_budget", "mix", "mixed", "with_choices"]

MakePlan = Callable[[ModelConfig, Scheme], WeightPlan]


@dataclass(frozen=True, kw_only=True)
class MixRequest:
    """How widths are found.

    ``budget`` None: each scheme's own, in those that mix by themselves, unless ``by_default`` is False. ``algorithm``
    is the one whose errors count. ``text``: a file of text on which damages are measured; None estimates them from
    statistics, or without data.
    """

    budget: Budget | None = None
    by_default: bool = True
    algorithm: str = DEFAULT_ALGORITHM
    text: str | Path | None = None

    def budget_of(self, scheme: Scheme) -> Budget | None:
        """What a scheme is mixed within; None where it stays as it is."""
        wanted = self.budget or (Budget(keeps_size=scheme.keeps_size) if scheme.mixed and self.by_default else None)
        return wanted if scheme.can_mix else None

    def decides(self, scheme: Scheme, statistics: Statistics | None) -> bool:
        """Whether there is something to choose: not again by what was measured, which statistics do not change."""
        settled = scheme.mixture is not None and (statistics is None or self.text is not None)
        return self.budget_of(scheme) is not None and not settled


def check_mixable(schemes: Sequence[Scheme], request: MixRequest, group_size: int | None = None) -> None:
    """Refuses a budget that nothing can be done with, before a checkpoint is opened.

    Raises:
        QuantizationError: no scheme has widths to mix, or the group size was given as well.
    """
    budget = request.budget
    mixes = budget is not None or (request.by_default and any(scheme.mixed for scheme in schemes))
    if request.text is not None and not mixes:
        raise QuantizationError(f"--measure {shown(str(request.text))}: pass --target-bits or --target-size with it")
    if budget is None:
        return
    if not any(scheme.can_mix for scheme in schemes):
        names = ", ".join(scheme.name for scheme in schemes)
        raise QuantizationError(
            f"{budget}: scheme {names} has one width for its linear layers; pass --scheme q4 (onnx) or 8da4w "
            "(executorch)"
        )
    if group_size is not None:
        raise QuantizationError(f"{budget}: chooses the group sizes, too; leave --group-size {group_size} out")


def mixed(
    checkpoint: Checkpoint,
    schemes: Sequence[Scheme],
    make_plan: MakePlan,
    request: MixRequest,
    statistics: Statistics | None = None,
) -> list[Scheme]:
    """The schemes, with choices in those that mix: all that can where a budget was asked for; else those that do so by
    themselves.

    Raises:
        QuantizationError: the budget is below the floor or above 8 bits, or a width does not fit the groups.
        CheckpointError: a tensor holds NaN or infinity.
        CalibrationError: the statistics cannot be read.
    """
    return [
        mix(checkpoint, scheme, make_plan, request, statistics) if request.decides(scheme, statistics) else scheme
        for scheme in schemes
    ]


def mix(
    checkpoint: Checkpoint,
    scheme: Scheme,
    make_plan: MakePlan,
    request: MixRequest,
    statistics: Statistics | None = None,
) -> Scheme:
    """The scheme with the best choice that the budget allows, by what is measured on a text, else by what the
    statistics say, else by the weights alone.

    Raises:
        QuantizationError: the budget is below the floor or above 8 bits, or a width does not fit the groups.
        CheckpointError: a tensor holds NaN or infinity.
        CalibrationError: the statistics cannot be read.
    """
    budget = request.budget or Budget(keeps_size=scheme.keeps_size)
    space = make_space(checkpoint.config, scheme, make_plan, budget.counted)
    limit = bytes_for(budget, space)
    damages, judged_by = _damages(checkpoint, space, request, statistics)
    return with_choices(scheme, space, damages, limit, Mixture(within=str(budget), judged_by=judged_by))


def _damages(
    checkpoint: Checkpoint, space: Space, request: MixRequest, statistics: Statistics | None
) -> tuple[Damages, JudgedBy]:
    # One that needs statistics loses less than this one, and in the same order of formats.
    needy = get_algorithm(request.algorithm).needs_statistics
    estimating = get_algorithm(DEFAULT_ALGORITHM if needy else request.algorithm)
    if request.text is not None:
        from lfm2_export.mixing.measured import measure  # imports torch

        return measure(checkpoint, space, estimating, request.text), JudgedBy.MEASUREMENT
    if statistics is None:
        return estimate_damages(checkpoint, space, estimating, WithoutData(checkpoint)), JudgedBy.WEIGHTS
    return estimate_damages(checkpoint, space, estimating, Informed(checkpoint, statistics)), JudgedBy.STATISTICS


def with_choices(scheme: Scheme, space: Space, damages: Damages, limit: int, mixture: Mixture) -> Scheme:
    """The scheme with the choice that does least damage in ``limit`` bytes, counted as the space counts them."""
    units = [
        Unit(
            name=shape.name,
            tensors=shape.tensors,
            options=tuple(
                Option(format=form, nbytes=space.nbytes(shape, form), damage=damage)
                for form, damage in damages[shape.name].items()
            ),
        )
        for shape in space.units
    ]
    chosen = choose(units, limit - space.fixed)
    choices = _by_tensor(units, chosen, f"mixed within {mixture}")
    return replace(scheme, sensitive_patterns=(), choices=choices, mixture=mixture)


def _by_tensor(units: Sequence[Unit], chosen: Mapping[str, Option], because: str) -> dict[str, FormatChoice]:
    return {tensor: FormatChoice(chosen[unit.name].format, because) for unit in units for tensor in unit.tensors}
