"""The comparison as one HTML page: KL against bytes with the frontier, the table, and where each model's errors lie.

In: a ``QualityReport``. Out: HTML in the parity report's style: no script, no link to anything outside. Names are
escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from lfm2_export.parity.page import document, html_table, write_document
from lfm2_export.quality.report import Quality, QualityReport
from lfm2_export.resources import human_bytes

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM, _TOP = 720, 380, 64, 150, 40, 12
_LAYER = re.compile(r"layers\.(\d+)\.")
HEAD = (
    "model",
    "kind",
    "KL",
    "± of the mean",
    "KL, 99 %",
    "same top token",
    "perplexity",
    "size",
    "bits",
    "bits, step",
)


def write(report: QualityReport, path: str | Path) -> None:
    """Writes the page.

    Raises:
        ResourceError: the disk is full.
        Lfm2ExportError: the file cannot be written.
    """
    write_document(render(report), path)


def render(report: QualityReport) -> str:
    """The whole page."""
    title = f"Quantized models of {report.checkpoint}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p class=soft>KL divergence from the checkpoint in fp32 (perplexity {report.perplexity:.3f}), "
        f"{escape(report.text)}.</p>",
        f"<div class=scroll>{plot(report)}</div>",
        "<p class=soft>The line joins the models that no other one beats in both.</p>",
        html_table(HEAD, [row(model) for model in report.models]),
        *(_errors(model) for model in report.models if model.errors),
    ]
    return document(title, body)


def row(model: Quality) -> tuple[str, ...]:
    """The figures of a model as the table shows them."""
    return (
        model.name,
        model.kind,
        f"{model.kl:.2e}",
        f"{model.kl_error:.1e}",
        f"{model.kl_p99:.2e}",
        f"{model.top1_agreement:.2%}",
        f"{model.perplexity:.3f}",
        human_bytes(model.size.file_bytes),
        f"{model.size.file_bits:.2f}",
        f"{model.size.step_bits:.2f}",
    )


def plot(report: QualityReport) -> str:
    """KL, on a logarithmic axis, against bits a weight of the file."""
    points = [(model, model.size.file_bits, math.log10(max(model.kl, 1e-12))) for model in report.models]
    columns = _range([bits for _, bits, _ in points], least=0.5)
    rows = _range([kl for _, _, kl in points], least=0.5)

    def place(bits: float, kl: float) -> tuple[float, float]:
        across = (bits - columns[0]) / (columns[1] - columns[0])
        down = (rows[1] - kl) / (rows[1] - rows[0])
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _TOP + down * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_axes(columns, rows, place)]
    best = {model.name for model in report.frontier()}
    line = sorted(place(bits, kl) for model, bits, kl in points if model.name in best)
    parts.append(f'<polyline class=curve points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in line)}"/>')
    for model, bits, kl in points:
        x, y = place(bits, kl)
        parts.append(
            f"<circle cx={x:.1f} cy={y:.1f} r=4 fill=var(--plot)><title>{escape(model.name)}: KL {model.kl:.2e}, "
            f'{bits:.2f} bits</title></circle><text x="{x + 8:.1f}" y="{y + 4:.1f}">{escape(model.name[:24])}</text>'
        )
    label = "KL divergence against bits a weight"
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img aria-label="{label}">{"".join(parts)}</svg>'


def _range(values: Sequence[float], *, least: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = max(least, high - low) * 0.1
    return low - room, high + room


def _axes(columns: tuple[float, float], rows: tuple[float, float], place: object) -> str:
    assert callable(place)
    parts = []
    for bits in range(math.ceil(columns[0]), math.floor(columns[1]) + 1):
        x, y = place(bits, rows[0])
        parts.append(f'<line class=axis x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor=middle>{bits}</text>')
    for power in range(math.ceil(rows[0]), math.floor(rows[1]) + 1):
        x, y = place(columns[0], power)
        parts.append(f'<line class=axis x1="{x:.1f}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor=end>1e{power}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{_HEIGHT - 6}" text-anchor=middle>bits a weight, file</text>')
    return "".join(parts)


def _errors(model: Quality) -> str:
    """The greatest relative error of a stored tensor in each layer, as bars."""
    by_layer: dict[int, tuple[float, str]] = {}
    for name, error in model.errors.items():
        if found := _LAYER.search(name):
            layer = int(found[1])
            by_layer[layer] = max(by_layer.get(layer, (0.0, "")), (error, name))
    if not by_layer:
        return ""
    largest = max(error for error, _ in by_layer.values())
    width = min(40.0, 640 / (max(by_layer) + 1))
    bars = [
        _bar(_LEFT + layer * width, width, error / largest, str(layer), f"layer {layer}: {error:.1e}, {name}")
        for layer, (error, name) in sorted(by_layer.items())
    ]
    scale = f'<text x="{_LEFT - 6}" y="24" text-anchor=end>{largest:.1e}</text>'
    return (
        f"<h2>{escape(model.name)}: worst tensor of each layer</h2><p class=soft>Root mean square error of the stored "
        f'weights over that of the weights.</p><div class=scroll><svg viewBox="0 0 720 156" role=img '
        f'aria-label="error by layer">{scale}{"".join(bars)}</svg></div>'
    )


def _bar(x: float, width: float, part: float, label: str, title: str) -> str:
    height = 110 * part
    return (
        f'<rect x="{x:.1f}" y="{130 - height:.1f}" width="{0.8 * width:.1f}" height="{height:.1f}" fill=var(--plot)>'
        f"<title>{escape(title)}</title></rect>"
        f'<text x="{x + 0.4 * width:.1f}" y="146" text-anchor=middle>{label}</text>'
    )
