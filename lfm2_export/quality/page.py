"""The comparison as one HTML page: KL against bytes with the frontier, the table, and of each model's layers where its
errors lie and how often its router chooses the same experts.

In: a ``QualityReport``. Out: HTML, by ``templates/quality.html``: no script, no link to anything outside. Names are
escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm2_export.quality.report import Quality, QualityReport
from lfm2_export.templating import Table, fill_in, write_page

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM, _TOP = 720, 380, 64, 150, 40, 12
_LAYER = re.compile(r"layers\.(\d+)\.")


def write(report: QualityReport, path: str | Path) -> None:
    """Writes the page; raises as ``write_page``."""
    write_page(render(report), path)


def render(report: QualityReport) -> str:
    """The whole page."""
    return fill_in(
        "quality.html",
        {
            "title": f"Quantized models of {report.checkpoint}",
            "perplexity": f"{report.perplexity:.3f}",
            "text": report.text,
            "scatter": _scatter(report),
            "models": Table.of(report.columns, report.rows()),
            "plots": [
                plot for model in report.models for plot in (_errors(model), _experts(model)) if plot is not None
            ],
        },
    )


@dataclass(frozen=True, kw_only=True)
class _Axes:
    """From bits a weight and the decimal logarithm of a divergence to a place in the picture."""

    columns: tuple[float, float]
    rows: tuple[float, float]

    def x(self, bits: float) -> float:
        across = (bits - self.columns[0]) / (self.columns[1] - self.columns[0])
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT)

    def y(self, power: float) -> float:
        down = (self.rows[1] - power) / (self.rows[1] - self.rows[0])
        return _TOP + down * (_HEIGHT - _TOP - _BOTTOM)


def _scatter(report: QualityReport) -> dict[str, Any]:
    """KL, on a logarithmic axis, against bits a weight of the file."""
    places = [(model.size.file_bits, math.log10(max(model.kl, 1e-12))) for model in report.models]
    axes = _Axes(
        columns=_range([bits for bits, _ in places], least=0.5), rows=_range([power for _, power in places], least=0.5)
    )
    points = [(axes.x(bits), axes.y(power)) for bits, power in places]
    best = {model.name for model in report.frontier()}
    frontier = sorted(point for model, point in zip(report.models, points, strict=True) if model.name in best)
    bottom = axes.y(axes.rows[0])
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": f"{axes.x(axes.columns[0]):.1f}",
        "label_left": f"{axes.x(axes.columns[0]) - 6:.1f}",
        "right": _WIDTH - _RIGHT,
        "top": _TOP,
        "bottom": f"{bottom:.1f}",
        "middle": (_LEFT + _WIDTH - _RIGHT) / 2,
        "columns": [
            {"x": f"{axes.x(bits):.1f}", "y": f"{bottom + 16:.1f}", "label": bits} for bits in _whole(axes.columns)
        ],
        "rows": [
            {"y": f"{axes.y(power):.1f}", "label_y": f"{axes.y(power) + 4:.1f}", "label": f"1e{power}"}
            for power in _whole(axes.rows)
        ],
        "frontier": " ".join(f"{x:.1f},{y:.1f}" for x, y in frontier),
        "points": [_point(model, *point) for model, point in zip(report.models, points, strict=True)],
    }


def _range(values: Sequence[float], *, least: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = max(least, high - low) * 0.1
    return low - room, high + room


def _whole(ends: tuple[float, float]) -> range:
    return range(math.ceil(ends[0]), math.floor(ends[1]) + 1)


def _point(model: Quality, x: float, y: float) -> dict[str, str]:
    return {
        "x": f"{x:.1f}",
        "y": f"{y:.1f}",
        "title": f"{model.name}: KL {model.kl:.2e}, {model.size.file_bits:.2f} bits",
        "label_x": f"{x + 8:.1f}",
        "label_y": f"{y + 4:.1f}",
        "label": model.name[:24],
    }


def _errors(model: Quality) -> dict[str, Any] | None:
    """The greatest relative error of a stored tensor in each layer, as bars; None where there is none."""
    by_layer: dict[int, tuple[float, str]] = {}
    for name, error in model.errors.items():
        if found := _LAYER.search(name):
            layer = int(found[1])
            by_layer[layer] = max(by_layer.get(layer, (0.0, "")), (error, name))
    if not by_layer:
        return None
    largest = max(error for error, _ in by_layer.values())
    return _by_layer(
        f"{model.name}: worst tensor of each layer",
        "Root mean square error of the stored weights over that of the weights.",
        f"{largest:.1e}",
        {layer: (error / largest, f"{error:.1e}, {name}") for layer, (error, name) in by_layer.items()},
    )


def _experts(model: Quality) -> dict[str, Any] | None:
    """The share of tokens that each layer's router sends to the same experts, as bars; None for a dense model."""
    if not model.same_experts:
        return None
    return _by_layer(
        f"{model.name}: tokens that go to the same experts",
        "With the stored weights, in fp32, against the checkpoint's: what int8 activations change is not in it.",
        "100%",
        {layer: (share, f"{share:.2%}") for layer, share in model.same_experts.items()},
    )


def _by_layer(title: str, note: str, largest: str, layers: Mapping[int, tuple[float, str]]) -> dict[str, Any]:
    """A plot with a bar a layer: its height between 0 and 1, and what it stands for."""
    width = min(40.0, 640 / (max(layers) + 1))
    bars = [
        {**_bar(_LEFT + layer * width, width, part), "layer": layer, "title": f"layer {layer}: {words}"}
        for layer, (part, words) in sorted(layers.items())
    ]
    return {"title": title, "note": note, "left": _LEFT, "largest": largest, "bars": bars}


def _bar(x: float, width: float, part: float) -> dict[str, str]:
    height = 110 * part
    return {
        "x": f"{x:.1f}",
        "y": f"{130 - height:.1f}",
        "width": f"{0.8 * width:.1f}",
        "height": f"{height:.1f}",
        "middle": f"{x + 0.4 * width:.1f}",
    }
