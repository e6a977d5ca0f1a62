"""How transformers has to be given a checkpoint, so that it computes what the weights were made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """``raw``: config.json's contents with what had to be changed; ``note``: what that is, for reports."""

    raw: Mapping[str, Any]
    note: str
