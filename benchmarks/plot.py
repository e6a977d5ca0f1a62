"""Draws a comparison: prefill, decode and resident memory of every system, side by side.

In: a ``Comparison``. Out: a PNG. Over each decode bar stands what the read bandwidth would allow at that system's bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.figures import EXECUTORCH, LLAMA_CPP, ONNX, Comparison, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {LLAMA_CPP: "#8a8f98", ONNX: "#2a6fdb", EXECUTORCH: "#d9762b"}
_SHADES = (1.0, 0.75, 0.5, 0.3)  # of one system's rows, in their order


def draw(found: Comparison, active_weights: float, path: Path) -> Path:
    """Writes the PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 1.9 + 0.42 * len(found.rows)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, sharey=True)
    limits = [found.read_gb_per_s * 8e9 / (row.bits_per_weight * active_weights) for row in found.rows]
    _bars(axes[0], found.rows, [row.decode_tps for row in found.rows], "decode 128, tokens/s", limits)
    _bars(axes[1], found.rows, [row.prefill_tps for row in found.rows], "prefill 512, tokens/s")
    _bars(axes[2], found.rows, [row.resident_bytes / 1e9 for row in found.rows], "peak resident memory, GB")
    axes[0].set_yticks(range(len(found.rows)), [f"{r.system}\n{_short(r)}" for r in found.rows])
    axes[0].invert_yaxis()
    figure.suptitle(f"LFM2 {found.shape}: random weights, {found.threads} threads, {found.cpu}", x=0.01, ha="left")
    note = f"{found.date[:10]} · read bandwidth {found.read_gb_per_s:.1f} GB/s (black line: decoding at that rate)"
    figure.supxlabel(note, x=0.01, ha="left", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    return path


def _bars(
    axis: Axes, rows: tuple[Row, ...], values: list[float], title: str, limits: list[float] | None = None
) -> None:
    places = range(len(rows))
    axis.barh(places, values, color=[_colour(rows, index) for index in places], height=0.7)
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    reach = max([*values, *(limits or [])])
    axis.set_xlim(0, reach * 1.14)
    for place, value in zip(places, values, strict=True):
        line = limits[place] if limits else 0.0
        start = line if value < line < value + 0.12 * reach else value  # the number would stand on the line
        text = f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
        axis.text(start + reach * 0.012, place, text, va="center", fontsize=9)
    for place, limit in zip(places, limits or [], strict=False):
        axis.plot([limit, limit], [place - 0.35, place + 0.35], color="black", linewidth=1.5)


def _colour(rows: tuple[Row, ...], index: int) -> tuple[float, float, float, float]:
    from matplotlib.colors import to_rgba

    before = sum(row.system == rows[index].system for row in rows[:index])
    return to_rgba(_COLOURS[rows[index].system], _SHADES[min(before, len(_SHADES) - 1)])


def _short(row: Row) -> str:
    return f"{row.name}, {row.bits_per_weight:.2f} bits"
