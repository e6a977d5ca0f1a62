"""What the commands of a chat work on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lfm2_export import console
from lfm2_export.chat import Chat
from lfm2_export.terminal.lines import Lines
from lfm2_export.terminal.turns import Turns
from lfm2_export.terminal.view import Thinking

# By which chat templates are asked for no thinking.
_SWITCH = "enable_thinking"
_ASKS = re.compile(rf"\b{_SWITCH}\b")


@dataclass(kw_only=True)
class Session:
    """``program`` as it is shown; ``templates``: Jinja sources of the artifact."""

    chat: Chat
    turns: Turns
    lines: Lines
    program: str
    templates: Sequence[str]

    def set_thinking(self, thinking: Thinking) -> None:
        """Says so where the template cannot switch it off."""
        self.turns.thinking = thinking
        can = any(_ASKS.search(template) for template in self.templates)
        if thinking is Thinking.OFF and not can:
            console.note(f"this chat template has no {_SWITCH}: what the model thinks is hidden, not switched off")
        rest = {name: value for name, value in self.chat.variables.items() if name != _SWITCH}
        self.chat.variables = {**rest, _SWITCH: False} if thinking is Thinking.OFF and can else rest
