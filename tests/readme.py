"""The parts of README.md that the program itself knows: commands with their options, support tables, measured speeds.

In: the argument parser, the registries, the results. Out: Markdown between a begin and an end comment. ``python -m
tests.readme`` writes them; a test compares.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from pathlib import Path

from benchmarks.figures import Comparison, table
from benchmarks.programs import active_weights
from benchmarks.synthetic import REAL_SHAPES
from lfm2_export.commands.parser import build_parser
from lfm2_export.support import DELEGATES, supported

README = Path(__file__).parent.parent / "README.md"
RESULTS = README.parent / "benchmarks" / "results"


def commands() -> str:
    """Every verb with what it takes, as in a manual's synopsis."""
    whole = build_parser()
    verbs = next(a for a in whole._actions if isinstance(a, argparse._SubParsersAction))
    everywhere = [option for action in whole._actions for option in action.option_strings]
    lines = [line for name, parser in verbs.choices.items() for line in _synopsis(name, parser, everywhere)]
    shown = " ".join(_word(a) for a in whole._actions if a.option_strings and "--help" not in a.option_strings)
    return "\n".join(["```", f"lfm2-export {shown} COMMAND ...", *lines, "```"])


def _synopsis(name: str, parser: argparse.ArgumentParser, everywhere: list[str]) -> list[str]:
    """Without the options that every verb takes."""
    own = [action for action in parser._actions if not set(action.option_strings) & set(everywhere)]
    words = [f"lfm2-export\0{name}", *map(_word, own)]
    lines = textwrap.wrap(" ".join(words), 112, subsequent_indent="    ", break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def _word(action: argparse.Action) -> str:
    if not action.option_strings:
        return str(action.metavar)
    value = "" if action.nargs == 0 else f"\0{action.metavar or action.dest.upper()}"
    word = action.option_strings[0] + value
    return word if action.required else f"[{word}]"


def support() -> str:
    """The table of ``lfm2-export support``."""
    rows = [f"| `{r.family}` | {r.backend} | `{r.scheme}` | `{r.file}` | {r.runtimes} |" for r in supported()]
    return "\n".join(["| Family | Backend | Scheme | File | Opened in tests by |", "|---|---|---|---|---|", *rows])


def delegates() -> str:
    """The second table of ``lfm2-export support``."""
    rows = [f"| {d.name} | {d.dense} | {d.mixture} | {d.reason} |" for d in DELEGATES]
    return "\n".join(["| Delegate | Dense | Mixture of experts | Because |", "|---|---|---|---|", *rows])


def speed() -> str:
    """The tables of ``benchmarks/compare.py``'s last run."""
    parts = []
    for shape in ("350m", "1.2b", "8b-a1b"):
        found = Comparison.read(RESULTS / f"{shape}.json")
        machine = f"{found.cpu}, {found.threads} threads, reading {found.read_gb_per_s:.0f} GB/s, {found.date[:10]}"
        rows = table(found, active_weights(REAL_SHAPES[shape])).splitlines()
        parts.append("\n".join([f"**{shape}** ({machine}):", "", *rows]))
    return "\n\n".join(parts)


def render(text: str) -> str:
    """The README with its generated parts made anew."""
    for name, part in (
        ("help", commands()),
        ("support", support()),
        ("delegates", delegates()),
        ("speed", speed()),
    ):
        begin, end = rf"<!-- {name}:begin[^>]*-->\n", rf"\n<!-- {name}:end -->"
        text, count = re.subn(f"({begin}).*?({end})", lambda m, part=part: m[1] + part + m[2], text, flags=re.DOTALL)
        assert count == 1, f"README.md has {count} parts named {name}"
    return text


if __name__ == "__main__":
    README.write_text(render(README.read_text(encoding="utf-8")), encoding="utf-8")
