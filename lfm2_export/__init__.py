"""lfm2-export: LiquidAI's LFM2 and LFM2-MoE checkpoints as quantized programs for on-device runtimes, proven and run.

Public names are loaded when they are first used: importing this package imports neither torch nor a runtime. A name
whose module needs a package of an extra that is not installed says so when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOME = {
    "export": "lfm2_export.pipeline",
    "inspect": "lfm2_export.inspection",
    "load_drafter": "lfm2_export.drafters",
    "load_encoder": "lfm2_export.encoders",
    "load_runner": "lfm2_export.runners",
    "open_checkpoint": "lfm2_export.checkpoint",
    "Artifact": "lfm2_export.artifact",
    "Encoder": "lfm2_export.encoders",
    "ExportedModelForCausalLM": "lfm2_export.transformers_api",
    "ArtifactError": "lfm2_export.errors",
    "CalibrationError": "lfm2_export.errors",
    "CheckpointError": "lfm2_export.errors",
    "ConfigError": "lfm2_export.errors",
    "ContextLimitError": "lfm2_export.errors",
    "ExportError": "lfm2_export.errors",
    "GenerationError": "lfm2_export.errors",
    "Lfm2ExportError": "lfm2_export.errors",
    "MissingPackageError": "lfm2_export.errors",
    "QuantizationError": "lfm2_export.errors",
    "ResourceError": "lfm2_export.errors",
    "RunnerError": "lfm2_export.errors",
    "Runner": "lfm2_export.backends.base",
    "Progress": "lfm2_export.progress",
    "Completion": "lfm2_export.generation",
    "TokenEvent": "lfm2_export.generation",
    "BackendName": "lfm2_export.choices",
    "SchemeName": "lfm2_export.choices",
    "AlgorithmName": "lfm2_export.choices",
    "BudgetName": "lfm2_export.choices",
    "KernelsName": "lfm2_export.choices",
    "KvCacheName": "lfm2_export.choices",
    "GenerationConfig": "lfm2_export.generation_config",
    "Tokenizer": "lfm2_export.text",
    "Chat": "lfm2_export.chat",
    "complete": "lfm2_export.generation",
    "generate": "lfm2_export.generation",
    "max_sim": "lfm2_export.encoders",
    "measure_parity": "lfm2_export.parity",
    "measure_quality": "lfm2_export.quality",
    "ParityReport": "lfm2_export.parity",
    "QualityReport": "lfm2_export.quality",
}

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from lfm2_export.artifact import Artifact as Artifact
    from lfm2_export.backends.base import Runner as Runner
    from lfm2_export.chat import Chat as Chat
    from lfm2_export.checkpoint import open_checkpoint as open_checkpoint
    from lfm2_export.choices import AlgorithmName as AlgorithmName
    from lfm2_export.choices import BackendName as BackendName
    from lfm2_export.choices import BudgetName as BudgetName
    from lfm2_export.choices import KernelsName as KernelsName
    from lfm2_export.choices import KvCacheName as KvCacheName
    from lfm2_export.choices import SchemeName as SchemeName
    from lfm2_export.drafters import load_drafter as load_drafter
    from lfm2_export.encoders import Encoder as Encoder
    from lfm2_export.encoders import load_encoder as load_encoder
    from lfm2_export.encoders import max_sim as max_sim
    from lfm2_export.errors import ArtifactError as ArtifactError
    from lfm2_export.errors import CalibrationError as CalibrationError
    from lfm2_export.errors import CheckpointError as CheckpointError
    from lfm2_export.errors import ConfigError as ConfigError
    from lfm2_export.errors import ContextLimitError as ContextLimitError
    from lfm2_export.errors import ExportError as ExportError
    from lfm2_export.errors import GenerationError as GenerationError
    from lfm2_export.errors import Lfm2ExportError as Lfm2ExportError
    from lfm2_export.errors import MissingPackageError as MissingPackageError
    from lfm2_export.errors import QuantizationError as QuantizationError
    from lfm2_export.errors import ResourceError as ResourceError
    from lfm2_export.errors import RunnerError as RunnerError
    from lfm2_export.generation import Completion as Completion
    from lfm2_export.generation import TokenEvent as TokenEvent
    from lfm2_export.generation import complete as complete
    from lfm2_export.generation import generate as generate
    from lfm2_export.generation_config import GenerationConfig as GenerationConfig
    from lfm2_export.inspection import inspect as inspect
    from lfm2_export.parity import ParityReport as ParityReport
    from lfm2_export.parity import measure_parity as measure_parity
    from lfm2_export.pipeline import export as export
    from lfm2_export.progress import Progress as Progress
    from lfm2_export.quality import QualityReport as QualityReport
    from lfm2_export.quality import measure_quality as measure_quality
    from lfm2_export.runners import load_runner as load_runner
    from lfm2_export.text import Tokenizer as Tokenizer
    from lfm2_export.transformers_api import ExportedModelForCausalLM as ExportedModelForCausalLM


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        from lfm2_export.packages import Absent, missing

        if (lacking := missing(error, f"lfm2_export.{name}")) is None:
            raise
        return Absent(f"lfm2_export.{name}", lacking)


def __dir__() -> list[str]:
    return list(__all__)
