"""The code blocks of a page, and which of them run.

A block of shell commands (``sh``) or Python runs as a reader would paste it, unless the line before it says why it
cannot: ``<!-- not run: needs a phone -->``. ``text`` is what a program printed. Blocks of other languages run where a
test says so by name, or carry such a line; a language that nobody runs may not pass in silence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# What `tests/documentation/test_blocks.py` runs by itself on every page.
RUN = ("sh", "python")
OUTPUT = "text"

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[^`\n]*)\n(?P<text>.*?)^(?P=indent)``` *$", re.MULTILINE | re.DOTALL
)
_NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^>]+?) -->\n\s*\Z")


@dataclass(frozen=True, kw_only=True)
class Block:
    """``line`` is the code's first, counted from 1; ``not_run`` why it does not run, None where it may."""

    line: int
    language: str
    text: str
    not_run: str | None = None


def blocks(page: str) -> list[Block]:
    """Every fenced block of a page's text, in order."""
    found = []
    for match in _FENCE.finditer(page):
        said = _NOT_RUN.search(page[: match.start()])
        found.append(
            Block(
                line=page.count("\n", 0, match.start("text")) + 1,
                language=match["language"].strip(),
                text=re.sub(f"^{match['indent']}", "", match["text"], flags=re.MULTILINE),
                not_run=said["reason"] if said else None,
            )
        )
    return found


def with_reasons_shown(page: str) -> str:
    """A page whose readers see what does not run here, and why."""
    shown = r"\1Not run by the tests: \2.\n\1{ .not-run }\n\n"
    return re.sub(r"^( *)<!-- not run: ([^>]+?) -->\n(?= *```\w)", shown, page, flags=re.MULTILINE)
