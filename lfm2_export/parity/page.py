"""The report as one HTML page: no script, no link to anything outside, readable in light and dark.

In: a ``ParityReport``. Out: HTML. Text that comes from files (names, notes) is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from lfm2_export.errors import Lfm2ExportError, ResourceError
from lfm2_export.packages import OURS
from lfm2_export.parity.figures import KL, MAX_ABS, OK, PERPLEXITY, SHORT, TOP1, Hop, shown
from lfm2_export.parity.report import ParityReport, ProgramParity
from lfm2_export.resources import is_disk_full

_WORST_TENSORS = 12
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 160, 60, 24

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1d21; --soft: #5d6570; --line: #d9dde3; --page: #fbfbfa; --card: #fff;
  --good: #1a7f4b; --bad: #c0322b; --plot: #2f6fb2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #9aa3ad; --line: #363c43; --page: #16181b;
  --card: #1d2024; --good: #5bc98c; --bad: #f0837b; --plot: #7db4ea; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; } p { margin: .25rem 0; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.scroll { margin: .5rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .75rem; border-top: 1px solid var(--line); vertical-align: top; }
thead th { border-top: 0; color: var(--soft); font-weight: 600; font-size: .85rem; }
th.number, td.number { text-align: right; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); }
.verdict { white-space: nowrap; font-weight: 600; }
svg { display: block; width: 100%; height: auto; padding: .75rem; } svg text { fill: var(--soft); font-size: 11px; }
svg .axis { stroke: var(--line); } svg .curve { fill: none; stroke: var(--plot); stroke-width: 1.5; }
svg .area { fill: var(--plot); opacity: .15; }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
"""


def write(report: ParityReport, path: str | Path) -> None:
    """Writes the page.

    Raises:
        ResourceError: the disk is full.
        Lfm2ExportError: the file cannot be written.
    """
    write_document(render(report), path)


def write_document(page: str, path: str | Path) -> None:
    """Writes a page; raises as ``write``."""
    try:
        # Names may hold bytes that are no text; they are shown as escapes.
        Path(path).write_bytes(page.encode("utf-8", "backslashreplace"))
    except OSError as error:
        kind = ResourceError if is_disk_full(error) else Lfm2ExportError
        raise kind(f"{path}: the report cannot be written ({error.strerror}); give another file") from error


def render(report: ParityReport) -> str:
    """The whole page."""
    title = f"Parity of {report.artifact} with {report.checkpoint}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{_verdict(report.passed)} <span class=soft>Measured on {escape(report.text)}.</span></p>",
        _failures(report.failures()),
        f"<h2>Summary</h2>{_summary(report)}",
        "<h2>Hop 1: model</h2>",
        _hop(report.model),
        *(_program(program) for program in report.programs),
        f"<h2>Versions</h2>{html_table(('package', 'version'), sorted(report.versions.items()))}",
        f"<p class=soft>Written by lfm2-export {escape(report.versions.get(OURS, 'unknown'))}.</p>",
    ]
    return document(title, filter(None, body))


def document(title: str, body: Iterable[str]) -> str:
    """A page in our style around parts of HTML; the title is escaped here."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body><main>\n{chr(10).join(body)}\n</main></body></html>\n"
    )


def _verdict(passed: bool) -> str:
    word, kind = ("passed", "good") if passed else ("fell short", "bad")
    return f'<span class="verdict {kind}">{word}</span>'


def _failures(lines: Sequence[str]) -> str:
    return f"<ul class=bad>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _summary(report: ParityReport) -> str:
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
    return html_table(head, rows)


def _error(lowering: Hop) -> str:
    """Where activations are not quantized."""
    error = lowering.summary.get("max_abs_error")
    return "" if error is None else shown(MAX_ABS, error)


def _program(measured: ProgramParity) -> str:
    curve = measured.quantization.curve
    parts = [
        f"<h2>{escape(str(measured.program))}</h2>",
        "<h3>Hop 2: lowering</h3>",
        _hop(measured.lowering),
        "<h3>Hop 3: quantization</h3>",
        _hop(measured.quantization),
        "<p class=soft>KL divergence from the checkpoint by position in a window of text (nats)</p>",
        f"<div class=scroll>{curve_svg(curve)}</div>",
        _worst_tensors(measured),
    ]
    return "\n".join(parts)


def _hop(hop: Hop) -> str:
    notes = "".join(f"<p class=soft>{escape(note)}</p>" for note in hop.notes)
    rows = hop.rows(details=True)
    return f"<p>{escape(hop.title)}</p>{notes}{html_table(('compared', 'figure', 'tolerance', 'verdict'), rows)}"


def _worst_tensors(measured: ProgramParity) -> str:
    """The weights that storing changed most, from the manifest."""
    found = [tensor for tensor in measured.program.tensors if tensor.error]
    worst = sorted(found, key=lambda tensor: -(tensor.error or 0.0))[:_WORST_TENSORS]
    if not worst:
        return ""
    rows = [
        (tensor.name, str(list(tensor.shape)), tensor.dtype, tensor.granularity or "", f"{tensor.error:.2e}")
        for tensor in worst
    ]
    head = ("weights with the largest relative error", "shape", "stored as", "granularity", "error")
    return html_table(head, rows)


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column is a name; others whose cells are all numbers stand to the right."""
    found = [tuple(row) for row in rows]
    numeric = [index > 0 and all(_is_number(row[index]) for row in found) for index in range(len(head))]
    cells = "".join(_cell("th", name, number) for name, number in zip(head, numeric, strict=True))
    lines = "\n".join(
        f"<tr>{''.join(_cell('td', text, number) for text, number in zip(row, numeric, strict=True))}</tr>"
        for row in found
    )
    return f"<div class=scroll><table><thead><tr>{cells}</tr></thead><tbody>\n{lines}\n</tbody></table></div>"


def _is_number(text: str) -> bool:
    return not text or text[0].isdigit() or text.startswith(("≤", "≥", ">", "not finite"))


def _cell(tag: str, text: str, number: bool) -> str:
    kind = {OK: "verdict good", SHORT: "verdict bad"}.get(text) or ("number" if number else "")
    return f'<{tag} class="{kind}">{escape(text)}</{tag}>' if kind else f"<{tag}>{escape(text)}</{tag}>"


def curve_svg(values: Sequence[float]) -> str:
    """A curve from zero up, as inline SVG; without values, a line of text."""
    if not values:
        return "<p class=soft>no positions were measured</p>"
    top = max(max(values), 1e-12)
    step = (_WIDTH - _LEFT) / max(1, len(values) - 1)
    base = _HEIGHT - _BOTTOM
    points = [
        f"{_LEFT + index * step:.1f},{base - value / top * (base - 10):.1f}" for index, value in enumerate(values)
    ]
    area = f"{_LEFT},{base} {' '.join(points)} {_LEFT + (len(values) - 1) * step:.1f},{base}"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="KL divergence by position">'
        f'<line class="axis" x1="{_LEFT}" y1="{base}" x2="{_WIDTH}" y2="{base}"/>'
        f'<line class="axis" x1="{_LEFT}" y1="10" x2="{_LEFT}" y2="{base}"/>'
        f'<text x="{_LEFT - 6}" y="14" text-anchor="end">{top:.1e}</text>'
        f'<text x="{_LEFT - 6}" y="{base}" text-anchor="end">0</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 8}">start</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT - 8}" text-anchor="end">end of the window</text>'
        f'<polygon class="area" points="{area}"/><polyline class="curve" points="{" ".join(points)}"/></svg>'
    )
