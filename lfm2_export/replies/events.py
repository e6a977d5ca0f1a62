"""What a reply is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """One call of a tool, checked against what the tool takes; ``arguments`` are JSON values by name."""

    name: str
    arguments: Mapping[str, Any]

    @property
    def arguments_json(self) -> str:
        return json.dumps(self.arguments, ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True, kw_only=True)
class Said:
    """Text for the reader, never empty."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Thought:
    """Text that the model thought before it answered, never empty."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Called:
    """The calls of one block, in order."""

    calls: tuple[ToolCall, ...]


Event = Said | Thought | Called
