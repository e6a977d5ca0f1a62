"""The report as one HTML page: no script, no link to anything outside, readable in light and dark.

In: a ``ParityReport``. Out: HTML, by ``templates/parity.html``. Text that comes from files (names, notes) is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm2_export.manifest import DECODER
from lfm2_export.packages import OURS
from lfm2_export.parity.figures import (
    COSINE,
    COSINE_DISTANCE,
    KL,
    MAX_ABS,
    OK,
    PERPLEXITY,
    SHORT,
    TOP1,
    VECTOR_ERROR,
    Hop,
    shown,
)
from lfm2_export.parity.report import ParityReport, ProgramParity
from lfm2_export.templating import Table, fill_in, write_page

_WORST_TENSORS = 12
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 160, 60, 24


def write(report: ParityReport, path: str | Path) -> None:
    """Writes the page; raises as ``write_page``."""
    write_page(render(report), path)


def render(report: ParityReport) -> str:
    """The whole page."""
    return fill_in(
        "parity.html",
        {
            "title": f"Parity of {report.artifact} with {report.checkpoint}",
            "passed": report.passed,
            "text": report.text,
            "failures": report.failures(),
            "summary": _summary(report),
            "model": _hop(report.model),
            "programs": [_program(program) for program in report.programs],
            "versions": Table.of(("package", "version"), sorted(report.versions.items())),
            "ours": report.versions.get(OURS, "unknown"),
        },
    )


def _summary(report: ParityReport) -> Table:
    if report.is_encoder:
        return _encoder_summary(report)
    head = ("program", "lowering error", "lowering KL", "quantization KL", "same top token", "perplexity", "verdict")
    rows = [
        (
            str(measured.program),
            _error(measured.lowering),
            shown(KL, measured.lowering.summary["kl"]),
            shown(KL, measured.quantization.summary["kl"]),
            shown(TOP1, measured.quantization.summary["top1_agreement"]),
            shown(PERPLEXITY, measured.quantization.summary["perplexity"]),
            OK if measured.passed else SHORT,
        )
        for measured in report.programs
    ]
    return Table.of(head, rows)


def _encoder_summary(report: ParityReport) -> Table:
    head = ("program", "lowering error", "lowering 1 - cosine", "mean cosine", "least cosine", "verdict")
    rows = [
        (
            str(measured.program),
            shown(VECTOR_ERROR, measured.lowering.summary["max_abs_error"]),
            shown(COSINE_DISTANCE, measured.lowering.summary["cosine_distance"]),
            shown(COSINE, measured.quantization.summary["cosine"]),
            shown(COSINE, measured.quantization.summary["least_cosine"]),
            OK if measured.passed else SHORT,
        )
        for measured in report.programs
    ]
    return Table.of(head, rows)


def _error(lowering: Hop) -> str:
    """Where activations are not quantized."""
    error = lowering.summary.get("max_abs_error")
    return "" if error is None else shown(MAX_ABS, error)


def _program(measured: ProgramParity) -> dict[str, Any]:
    return {
        "name": str(measured.program),
        "lowering": _hop(measured.lowering),
        "quantization": _hop(measured.quantization),
        "is_decoder": measured.program.kind == DECODER,
        "curve": Curve.of(measured.quantization.curve),
        "worst": _worst_tensors(measured),
    }


def _hop(hop: Hop) -> dict[str, Any]:
    table = Table.of(("compared", "figure", "tolerance", "verdict"), hop.rows(details=True))
    return {"title": hop.title, "notes": hop.notes, "table": table}


def _worst_tensors(measured: ProgramParity) -> Table | None:
    """The weights that storing changed most, from the manifest."""
    found = [tensor for tensor in measured.program.tensors if tensor.error]
    worst = sorted(found, key=lambda tensor: -(tensor.error or 0.0))[:_WORST_TENSORS]
    if not worst:
        return None
    rows = [
        (tensor.name, str(list(tensor.shape)), tensor.dtype, tensor.granularity or "", f"{tensor.error:.2e}")
        for tensor in worst
    ]
    head = ("weights with the largest relative error", "shape", "stored as", "granularity", "error")
    return Table.of(head, rows)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A curve from zero up as SVG's numbers: its points, the area below it, what its top stands for."""

    points: str
    area: str
    top: str
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _LEFT
    base: int = _HEIGHT - _BOTTOM

    @classmethod
    def of(cls, values: Sequence[float]) -> Curve | None:
        """None without values."""
        if not values:
            return None
        top = max(max(values), 1e-12)
        step = (_WIDTH - _LEFT) / max(1, len(values) - 1)
        base = _HEIGHT - _BOTTOM
        points = " ".join(
            f"{_LEFT + index * step:.1f},{base - value / top * (base - 10):.1f}" for index, value in enumerate(values)
        )
        area = f"{_LEFT},{base} {points} {_LEFT + (len(values) - 1) * step:.1f},{base}"
        return cls(points=points, area=area, top=f"{top:.1e}")
