"""The comparison as one HTML page: KL against bytes with the frontier, the table, and of each model's layers where its
errors lie and how often its router chooses the same experts.

In: a ``QualityReport``. Out: HTML, by ``templates/quality.html``: no script, no link to anything outside. Names are
escaped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfm2_export.quality.plot import LEFT, Point, scatter
from lfm2_export.quality.report import Quality, QualityReport
from lfm2_export.templating import Table, fill_in, write_page

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
            "frontier": _scatter(report),
            "models": Table.of(report.columns, report.rows()),
            "plots": [
                plot for model in report.models for plot in (_errors(model), _experts(model)) if plot is not None
            ],
        },
    )


def _scatter(report: QualityReport) -> dict[str, Any]:
    """KL, on a logarithmic axis, against bits a weight of the file."""
    best = {model.name for model in report.frontier()}
    points = [
        Point(
            name=model.name,
            x=model.size.file_bits,
            kl=model.kl,
            title=f"{model.name}: KL {model.kl:.2e}, {model.size.file_bits:.2f} bits",
            is_best=model.name in best,
        )
        for model in report.models
    ]
    return scatter(points, across="bits a weight, file", least=0.5, label=str)


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
        {**_bar(LEFT + layer * width, width, part), "layer": layer, "title": f"layer {layer}: {words}"}
        for layer, (part, words) in sorted(layers.items())
    ]
    return {"title": title, "note": note, "left": LEFT, "largest": largest, "bars": bars}


def _bar(x: float, width: float, part: float) -> dict[str, str]:
    height = 110 * part
    return {
        "x": f"{x:.1f}",
        "y": f"{130 - height:.1f}",
        "width": f"{0.8 * width:.1f}",
        "height": f"{height:.1f}",
        "middle": f"{x + 0.4 * width:.1f}",
    }
