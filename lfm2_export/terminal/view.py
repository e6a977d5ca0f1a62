"""How a reply is shown: rich on a terminal, as it is elsewhere.

In: what a reply is made of, as it comes. Out: text on standard output. A view is for one reply.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from typing import Protocol

from rich.console import Console
from rich.status import Status

from lfm2_export import console
from lfm2_export.terminal.markdown import MarkdownStream, dim


class Thinking(StrEnum):
    """What is done with a model's thinking."""

    SHOW = "show"
    HIDE = "hide"
    OFF = "off"  # the template is asked for none; what comes nevertheless is hidden


class View(Protocol):
    def thought(self, text: str) -> None: ...

    def said(self, text: str) -> None: ...

    def finish(self) -> None:
        """At its end, wherever that is."""


class PlainView:
    """The text as it is, with the markers of its thinking."""

    def __init__(self, thinking: Thinking):
        self._shows = thinking is Thinking.SHOW
        self._is_thinking = False

    def thought(self, text: str) -> None:
        if self._shows:
            console.stream(text if self._is_thinking else f"<think>\n{text}")
            self._is_thinking = True

    def said(self, text: str) -> None:
        self._end_thinking()
        console.stream(text)

    def _end_thinking(self) -> None:
        if self._is_thinking:
            console.stream("</think>\n\n")
        self._is_thinking = False

    def finish(self) -> None:
        self._end_thinking()
        console.stream("\n")


class TerminalView:
    """Markdown; thinking dim, or a line in its place."""

    def __init__(self, thinking: Thinking):
        self._shows = thinking is Thinking.SHOW
        self._console = Console(highlight=False)
        self._said = MarkdownStream(self._console)
        self._status: Status | None = None
        self._began: float | None = None

    def thought(self, text: str) -> None:
        if self._began is None:
            self._began = time.monotonic()
            if not self._shows:
                self._status = self._console.status("thinking…")
                self._status.start()
        if self._shows:
            self._console.print(dim(text), end="", soft_wrap=True)

    def _end_thinking(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
        if self._began is not None:
            seconds, self._began = time.monotonic() - self._began, None
            self._console.print(dim("\n" if self._shows else f"thought for {seconds:.1f} s"))

    def said(self, text: str) -> None:
        self._end_thinking()
        self._said.push(text)

    def finish(self) -> None:
        self._end_thinking()
        self._said.finish()


Views = Callable[[Thinking], View]
