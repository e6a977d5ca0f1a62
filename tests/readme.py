"""The parts of README.md and of the pages in docs/ that the program itself knows: support tables, measured speeds.

In: the registries, the results. Out: Markdown between a begin and an end comment. ``python -m tests.readme`` writes
them; a test compares. Pages that are nothing else are made with the site (``documentation/``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.figures import Comparison, table
from benchmarks.programs import active_weights
from benchmarks.synthetic import REAL_SHAPES
from lfm2_export.support import DELEGATES, supported

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
SHAPES = ("350m", "1.2b", "8b-a1b")


def support() -> str:
    """The table of ``lfm2-export support``."""
    rows = [f"| `{r.family}` | {r.backend} | `{r.scheme}` | `{r.file}` | {r.runtimes} |" for r in supported()]
    return "\n".join(["| Family | Backend | Scheme | File | Opened in tests by |", "|---|---|---|---|---|", *rows])


def delegates() -> str:
    """The second table of ``lfm2-export support``."""
    rows = [f"| {d.name} | {d.dense} | {d.mixture} | {d.reason} |" for d in DELEGATES]
    return "\n".join(["| Delegate | Dense | Mixture of experts | Because |", "|---|---|---|---|", *rows])


def speed(folder: Path = RESULTS, shapes: Sequence[str] = SHAPES) -> str:
    """The tables of ``benchmarks/compare.py``'s last run."""
    parts = []
    for shape in shapes:
        found = Comparison.read(folder / f"{shape}.json")
        machine = f"{found.cpu}, {found.threads} threads, reading {found.read_gb_per_s:.0f} GB/s, {found.date[:10]}"
        rows = table(found, active_weights(REAL_SHAPES[shape])).splitlines()
        parts.append("\n".join([f"**{shape}** ({machine}):", "", *rows]))
    return "\n\n".join(parts)


def speed_avx2() -> str:
    """The same on a processor that has AVX2 alone."""
    return speed(RESULTS / "avx2", ("1.2b", "8b-a1b"))


def speed_summary() -> str:
    """Of these tables what a first look wants: llama.cpp, and q4 in groups of 64."""
    lines = ["| | system | load | prefill 512 | decode 128 |", "|---|---|---:|---:|---:|"]
    for shape in SHAPES:
        rows = table(Comparison.read(RESULTS / f"{shape}.json"), active_weights(REAL_SHAPES[shape])).splitlines()
        names, *cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
        shown = [names.index(name) for name in ("load", "prefill 512", "decode 128")]
        for system in SUMMARIZED:
            (row,) = (row for row in cells if row[0] == system)
            lines.append(" | ".join([f"| {shape}", system, *(row[column] for column in shown)]) + " |")
    return "\n".join(lines)


SUMMARIZED = ("llama.cpp Q4_0", "onnx q4 group 64")
PARTS: Mapping[str, Callable[[], str]] = {
    "support": support,
    "delegates": delegates,
    "speed": speed,
    "speed_avx2": speed_avx2,
    "speed_summary": speed_summary,
}


def pages() -> list[Path]:
    """Every file that may have such parts."""
    return [README, *sorted((ROOT / "docs").rglob("*.md"))]


def render(text: str) -> str:
    """A page with those of its parts made anew that are made here."""
    for name in PARTS.keys() & set(re.findall(r"<!-- (\w+):begin", text)):
        begin, end = rf"<!-- {name}:begin[^>]*-->\n", rf"(?:(?<=\n)|\n)<!-- {name}:end -->"
        made = f"{PARTS[name]()}\n<!-- {name}:end -->"
        text, count = re.subn(f"({begin}).*?{end}", lambda m, made=made: m[1] + made, text, flags=re.DOTALL)
        assert count == 1, f"a page has {count} parts named {name}"
    return text


if __name__ == "__main__":
    for page in pages():
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
