"""The state machine that tells apart what a reply says.

In: its text, piece by piece, with markers. Out: events. A block of calls is held back until its end marker; where it
is malformed, no call of a known tool, or not ended, it is text with its markers. Thinking is what stands between
``<think>`` and ``</think>`` at the very beginning; where the prompt has opened it, the reply begins inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lfm2_export.replies.calls import parse_calls
from lfm2_export.replies.events import Called, Event, Said, Thought, ToolCall
from lfm2_export.replies.markers import held_back
from lfm2_export.replies.tools import Tools

THINK, END_THINK = "<think>", "</think>"
# Of a block, in characters: far above what a model writes, and what a client may make it hold back.
_LONGEST_BLOCK = 65_536


@dataclass(frozen=True, kw_only=True)
class Markers:
    """What a block of calls begins and ends with."""

    start: str
    end: str


LFM2 = Markers(start="<|tool_call_start|>", end="<|tool_call_end|>")
BLOCKS = (LFM2, Markers(start="<tool_call>", end="</tool_call>"))

_Mode = Literal["start", "before thought", "thought", "before said", "said", "block"]


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends inside of thinking, so that the reply begins there."""
    return prompt.rstrip().endswith(THINK)


class ReplyParser:
    """One reply.

    Args:
        tools: what may be called; None: blocks of calls are text like any other.
        thinking: the prompt has opened it (``opens_thinking``).
        parallel: a reply may have more than one call; else a second one is text.
    """

    def __init__(self, *, tools: Tools | None = None, thinking: bool = False, parallel: bool = True):
        self._tools = tools
        self._parallel = parallel
        self._starts = [block.start for block in BLOCKS] if tools is not None else []
        self._mode: _Mode = "before thought" if thinking else "start"
        self._block = LFM2
        self._held = ""
        self.called = False

    def push(self, text: str) -> list[Event]:
        """What is certain with ``text``."""
        self._held += text
        return list(self._events(final=False))

    def finish(self) -> list[Event]:
        """What was held back, at the end of the reply."""
        return list(self._events(final=True))

    def _events(self, *, final: bool) -> Iterator[Event]:
        steps = {
            "start": self._start,
            "before thought": self._skip_space,
            "thought": self._think,
            "before said": self._skip_space,
            "said": self._say,
            "block": self._call,
        }
        goes_on = True
        while goes_on and self._held:
            mode, held = self._mode, self._held
            if (event := steps[mode](final)) is not None:
                yield event
            goes_on = (mode, held) != (self._mode, self._held)

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken

    def _start(self, final: bool) -> Event | None:
        text = self._held.lstrip()
        if text.startswith(THINK):
            self._held, self._mode = text.removeprefix(THINK), "before thought"
        elif final or not THINK.startswith(text):
            self._mode = "said"
        return None

    def _skip_space(self, final: bool) -> Event | None:
        """Line breaks between a marker and the text belong to the template."""
        self._held = self._held.lstrip()
        if self._held:
            self._mode = "thought" if self._mode == "before thought" else "said"
        return None

    def _think(self, final: bool) -> Event | None:
        end = self._held.find(END_THINK)
        if end < 0:
            text = self._take(len(self._held) - (0 if final else held_back(self._held, (END_THINK,))))
        else:
            text = self._take(end)
            self._take(len(END_THINK))
            self._mode = "before said"
        return Thought(text=text) if text else None

    def _say(self, final: bool) -> Event | None:
        found = [(at, block) for block in BLOCKS if self._starts and (at := self._held.find(block.start)) >= 0]
        if found:
            at, self._block = min(found, key=lambda one: one[0])
            text, self._mode = self._take(at), "block"
        else:
            text = self._take(len(self._held) - (0 if final else held_back(self._held, self._starts)))
        return Said(text=text) if text else None

    def _call(self, final: bool) -> Event | None:
        start, end = len(self._block.start), self._held.find(self._block.end, len(self._block.start))
        if end < 0 and len(self._held) <= start + _LONGEST_BLOCK + len(self._block.end) and not final:
            return None
        self._mode = "said"
        if end > start + _LONGEST_BLOCK or (end < 0 and not final):
            return Said(text=self._take(start))
        whole = self._take(len(self._held) if end < 0 else end + len(self._block.end))
        calls = self._accepted(whole[start:] if end < 0 else whole[start:end])
        if calls is None:
            return Said(text=whole)
        self.called = True
        return Called(calls=calls)

    def _accepted(self, text: str) -> tuple[ToolCall, ...] | None:
        assert self._tools is not None
        raw = parse_calls(text)
        if raw is None or (not self._parallel and (self.called or len(raw) > 1)):
            return None
        return self._tools.accept_all(raw)
