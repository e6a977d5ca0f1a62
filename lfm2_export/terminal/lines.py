"""Where lines come from: a terminal with line editing (``editor.py``), or any standard input, line by line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lfm2_export import console, interrupts, streams
from lfm2_export.terminal.typed import cleaned

# What a terminal hands over of a line that it edits itself; the rest is lost.
_TERMINAL_LIMIT = 4095


class Lines(Protocol):
    """``interactive``: a person is asked, who can answer."""

    interactive: bool

    def read(self) -> str | None:
        """The next message or command; None at the end."""

    def ask(self, question: str) -> str | None:
        """The answer to a question; None where there is none, or Ctrl-C."""


class PlainLines:
    """A line is a message, as it is; what a person types is cleaned.

    Args:
        read_line: the next line with its end; "" where there is none.
        is_terminal: a person types them.
    """

    def __init__(self, read_line: Callable[[], str], *, is_terminal: bool):
        self._read_line = read_line
        self.interactive = is_terminal

    def read(self) -> str | None:
        if self.interactive:
            console.stream("> ")
        return self._line()

    def ask(self, question: str) -> str | None:
        streams.tell(console.harmless(question))
        answer = self._line()
        if not self.interactive:
            streams.tell("\n")
        return answer

    def _line(self) -> str | None:
        try:
            line = self._read_line()
        except KeyboardInterrupt:
            interrupts.forget()
            return None
        if not line:
            return None
        if self.interactive:
            if len(line.encode("utf-8", "surrogateescape")) >= _TERMINAL_LIMIT:
                console.note(f"this terminal cuts lines at {_TERMINAL_LIMIT} bytes; send the rest, or pipe a file")
            line = cleaned(line)
        return line.removesuffix("\n")
