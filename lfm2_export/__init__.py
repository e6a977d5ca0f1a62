"""lfm2-export: LiquidAI's LFM2 and LFM2-MoE checkpoints as quantized programs for on-device runtimes, proven and run.

Public names are loaded when they are first used: importing this package imports neither torch nor a runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "export": "lfm2_export.pipeline",
    "load_drafter": "lfm2_export.drafters",
    "load_encoder": "lfm2_export.encoders",
    "load_runner": "lfm2_export.runners",
    "open_checkpoint": "lfm2_export.checkpoint",
    "Artifact": "lfm2_export.artifact",
    "Encoder": "lfm2_export.encoders",
    "ExportedModelForCausalLM": "lfm2_export.transformers_api",
    "Lfm2ExportError": "lfm2_export.errors",
    "GenerationConfig": "lfm2_export.generation_config",
    "Tokenizer": "lfm2_export.text",
    "Chat": "lfm2_export.chat",
    "complete": "lfm2_export.generation",
    "generate": "lfm2_export.generation",
    "max_sim": "lfm2_export.encoders",
    "measure_parity": "lfm2_export.parity",
}

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from lfm2_export.artifact import Artifact as Artifact
    from lfm2_export.chat import Chat as Chat
    from lfm2_export.checkpoint import open_checkpoint as open_checkpoint
    from lfm2_export.drafters import load_drafter as load_drafter
    from lfm2_export.encoders import Encoder as Encoder
    from lfm2_export.encoders import load_encoder as load_encoder
    from lfm2_export.encoders import max_sim as max_sim
    from lfm2_export.errors import Lfm2ExportError as Lfm2ExportError
    from lfm2_export.generation import complete as complete
    from lfm2_export.generation import generate as generate
    from lfm2_export.generation_config import GenerationConfig as GenerationConfig
    from lfm2_export.parity import measure_parity as measure_parity
    from lfm2_export.pipeline import export as export
    from lfm2_export.runners import load_runner as load_runner
    from lfm2_export.text import Tokenizer as Tokenizer
    from lfm2_export.transformers_api import ExportedModelForCausalLM as ExportedModelForCausalLM


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
