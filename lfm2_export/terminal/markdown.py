"""Markdown that is shown while it is written.

In: text in pieces of any size. Out: on a terminal, what is finished as it will stay (a paragraph, a list, a block of
code), and below it what is being written, drawn anew a few times a second. Nothing of the text is lost: line breaks
stay, HTML and markers of models are text.
"""

from __future__ import annotations

import re
import time
from typing import ClassVar

from markdown_it import MarkdownIt
from rich import markdown
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from lfm2_export.console import harmless

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_ITEM = re.compile(r" {0,3}([-*+]|\d{1,9}[.)])(\s|$)")
_BEGUN_ITEM = re.compile(r"\d{1,9}")
_EVERY_S = 0.08
# Of a long block of code a draft takes a while, which the model has to wait: a tenth of the time at most.
_REST = 9


class MarkdownStream:
    """One reply."""

    def __init__(self, console: Console):
        self._console = console
        self._text = ""
        self._live: Live | None = None
        self._next = 0.0  # when it may be drawn again
        self._needs_gap = False  # behind what has been printed

    def push(self, text: str) -> None:
        self._text += harmless(text)
        while end := finished(self._text):
            self._settle(self._text[:end])
            self._text = self._text[end:]
        if self._text.strip() and time.monotonic() > self._next:
            self._draw()

    def finish(self) -> None:
        """What was being written stays as it is, also where an answer was stopped."""
        text, self._text = self._text, ""
        self._settle(text)

    def _draw(self) -> None:
        began = time.monotonic()
        if self._live is None:
            self._begin_block()
            self._live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False)
            self._live.start()
        self._live.update(_Tail(_Markdown(_last_lines(self._text, self._console.height))), refresh=True)
        done = time.monotonic()
        self._next = done + max(_EVERY_S, _REST * (done - began))

    def _begin_block(self) -> None:
        if self._needs_gap:
            self._console.print()
        self._needs_gap = False

    def _settle(self, text: str) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if text.strip():
            self._begin_block()
            self._console.print(_Markdown(text))
            self._needs_gap = True


def finished(text: str) -> int:
    """Where the first block of ``text`` ends, 0 where what follows can still change it: at a blank line outside of
    code, behind which something else begins than a list's next item or what is indented under it."""
    fence, is_list, was_blank, at = "", False, False, 0
    for line in text.splitlines(keepends=True):
        starts_anew = at and was_blank and not fence and line.strip() and not line[0].isspace()
        if starts_anew and not (is_list and (_ITEM.match(line) or _BEGUN_ITEM.fullmatch(line))):
            return at
        if not line.endswith("\n"):
            return 0
        is_list = is_list or bool(_ITEM.match(line))
        fence = _fence(line, fence)
        was_blank = not line.strip()
        at += len(line)
    return 0


def _last_lines(text: str, count: int) -> str:
    """Of a long block of code, the lines that have room: to colour all of it takes long."""
    lines = text.lstrip("\n").splitlines(keepends=True)
    return "".join([lines[0], *lines[-count:]]) if len(lines) > count + 1 and _FENCE.match(lines[0]) else text


def _fence(line: str, fence: str) -> str:
    """The fence of the code that is open behind ``line``."""
    found = _FENCE.match(line)
    if found is None:
        return fence
    if not fence:
        return found[1]
    closes = found[1].startswith(fence) and not line[found.end() :].strip()
    return "" if closes else fence


class _Heading(markdown.Heading):
    """To the left, where the other text is."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "default"
        self.text.stylize("bold")
        yield self.text


class _Markdown(markdown.Markdown):
    elements: ClassVar[dict[str, type[markdown.MarkdownElement]]] = {
        **markdown.Markdown.elements,
        "heading_open": _Heading,
    }

    def __init__(self, text: str):
        # Links show where they lead; code has the terminal's own colours.
        super().__init__(text, code_theme="ansi_dark", justify="default", hyperlinks=False)
        parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
        self.parsed = parser.parse(text)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


class _Tail:
    """The last lines of something that may be taller than the terminal."""

    def __init__(self, whole: markdown.Markdown):
        self._whole = whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._whole, options.update(height=None), pad=False)
        for line in lines[-max(1, console.height - 2) :]:
            yield from line
            yield Segment.line()


def dim(text: str) -> Text:
    """Thinking, as it is shown."""
    return Text(harmless(text), style="dim")
