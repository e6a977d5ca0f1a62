"""A call as a model wrote it, before it is compared with the tools that there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RawCall:
    """``as_text``: the form has text only, so a number is the text of one."""

    name: str
    arguments: Mapping[str, Any]
    as_text: bool = False
