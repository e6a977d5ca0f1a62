"""Prompt lookup: proposes what followed the last few tokens when they stood in the text before.

Free, and right where an answer repeats its prompt or itself: summaries, edits, code, tool calls. (transformers'
``prompt_lookup_num_tokens``.)
"""

from __future__ import annotations

from collections.abc import Sequence

from lfm2_export.speculation.drafters import Draft

# Tokens in a row that have to stand there again: the longest that are looked for first.
SIZES = (5, 4, 3, 2)


class PromptLookup:
    """A Drafter that remembers where every run of ``SIZES`` tokens stood last."""

    name = "lookup"
    costs = False
    at_once = True

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}

    def propose(self, history: Sequence[int], most: int) -> Draft:
        self._follow(history)
        for size in SIZES:
            end = self._ends.get(tuple(self._tokens[-size:])) if size < len(self._tokens) else None
            if end is not None:
                return Draft(tokens=self._after(end, most), kind=f"{size} tokens again")
        return Draft()

    def _after(self, end: int, most: int) -> tuple[int, ...]:
        """What stands behind ``end``, going on into the proposal itself where the text ends."""
        text = [*self._tokens[end:]]
        distance = len(text)
        while len(text) < most:
            text.append(text[len(text) - distance])
        return tuple(text[:most])

    def _follow(self, history: Sequence[int]) -> None:
        held = len(self._tokens)
        if held > len(history) or self._tokens != list(history[:held]):
            self._tokens, self._ends, held = [], {}, 0
        for end in range(max(held, 1), len(history)):  # all but the run that ends the text
            for size in SIZES:
                if size <= end:
                    self._ends[tuple(history[end - size : end])] = end
        self._tokens.extend(history[held:])
