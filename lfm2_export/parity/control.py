"""Weights changed on purpose, so that every comparison proves that it can fail.

In: an eager model and a comparison that it takes part in. Out: a ``Control`` with the smallest change, of a few that
grow, that the comparison notices. The weight is put back in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lfm2_export.families import get_family
from lfm2_export.parity.figures import Control

if TYPE_CHECKING:
    from lfm2_export.models.loading import AnyNet

# Against a tolerance of rounding errors a hundredth of one row shows. KL divergence is quadratic and a quantized
# program's own noise hides more: there a whole norm is scaled.
ROW_STEPS = (0.01, 0.1, 1.0)
NORM_STEPS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """Which values are scaled: all of a parameter, or one ``row`` of it."""

    name: str
    row: int | None
    steps: tuple[float, ...]

    def describe(self, step: float) -> str:
        what = self.name if self.row is None else f"row {self.row} of {self.name}"
        return f"{what} off by {step:.0%}"

    @contextmanager
    def applied(self, model: AnyNet, step: float) -> Iterator[None]:
        parameter = model.get_parameter(self.name)
        values = parameter.data if self.row is None else parameter.data[self.row]
        before = values.clone()
        with torch.no_grad():
            values.mul_(1.0 + step)
        try:
            yield
        finally:
            with torch.no_grad():
                values.copy_(before)


def one_row(model: AnyNet) -> Perturbation:
    """A row in the middle of the middle layer's output projection."""
    config = model.config
    tensors = get_family(config.model_type).tensors(config).values()
    layer = config.num_hidden_layers // 2
    name = next(t.name for t in tensors if t.layer == layer and t.matrix in ("out_proj", "o_proj"))
    return Perturbation(name=name, row=config.hidden_size // 2, steps=ROW_STEPS)


def one_norm(model: AnyNet) -> Perturbation:
    """The middle layer's first norm; where another one follows the operator, that one, which would undo a scale."""
    config = model.config
    layer = config.num_hidden_layers // 2
    names = get_family(config.model_type).tensors(config)
    after, before = (f"model.layers.{layer}.{norm}.weight" for norm in ("post_operator_norm", "operator_norm"))
    return Perturbation(name=after if after in names else before, row=None, steps=NORM_STEPS)


def find_control(
    model: AnyNet,
    perturbation: Perturbation,
    measured: Callable[[], float],
    *,
    measure: str,
    tolerance: float,
) -> Control:
    """Grows the change until ``measured()`` exceeds the tolerance; the last one tried where it never does."""
    for step in perturbation.steps:
        with perturbation.applied(model, step):
            value = measured()
        control = Control(change=perturbation.describe(step), measure=measure, value=value, tolerance=tolerance)
        if control.noticed:
            break
    return control
