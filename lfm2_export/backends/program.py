"""What goes into a backend's export and what comes out of it.

In: an open checkpoint, a scheme, options, a folder. Out: files in that folder and ``ExportedProgram``, from which the
pipeline makes the manifest's entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lfm2_export.cache import CacheSpec
from lfm2_export.calibration.statistics import Statistics
from lfm2_export.checkpoint import Checkpoint
from lfm2_export.manifest import DECODER, DRAFTER, ENCODER, StoredTensor, TensorSpec
from lfm2_export.quant.schemes import Scheme

TRACING, WEIGHTS, LOWERING = "tracing", "weights", "tracing and lowering"


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """One program to make. ``file_name`` is the program's file; ``algorithm`` names a quantization algorithm;
    ``options`` are those of the backend's own settings that were given (``Backend.OPTIONS``); ``phase`` is told
    what begins, ``WEIGHTS`` before weights are read; ``progress`` then how many bytes of the checkpoint each step
    consumed. ``ledgers`` is the folder for the files' ledgers, ``*.ledger``, by which a killed export is continued;
    None for one that is not to be. ``statistics`` are those that the algorithm needs, None for one that needs none."""

    checkpoint: Checkpoint
    scheme: Scheme
    file_name: str
    folder: Path
    algorithm: str
    progress: Callable[[int], None]
    phase: Callable[[str], None] = lambda label: None
    options: Mapping[str, Any] = field(default_factory=dict)
    ledgers: Path | None = None
    statistics: Statistics | None = None

    @property
    def kind(self) -> str:
        """What the program will be."""
        config = self.checkpoint.config
        return ENCODER if config.encoder is not None else DECODER if config.drafter is None else DRAFTER

    def describe_kind(self) -> dict[str, Any]:
        """What the manifest's options say of an encoder, whose runner cannot ask the graph how many tokens it knows,
        and of a drafter: what it reads of which target."""
        config, target = self.checkpoint.config, self.checkpoint.target
        if config.drafter is not None and target is not None:
            tie = {"target": target.record.digest, "target_name": str(target.record)}
            return {"drafter": {**config.drafter.describe(), **tie}}
        return {} if self.kind == DECODER else {"vocab_size": config.vocab_size}

    def describe_algorithm(self) -> dict[str, Any]:
        """What the manifest's options say of it."""
        calibration = {} if self.statistics is None else {"calibration": self.statistics.record()}
        return {"algorithm": self.algorithm, **calibration}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What an export needs: bytes of disk for its files and bytes of memory at its peak. ``done_bytes`` of the
    checkpoint need not be read again: an export that was interrupted has done with them."""

    disk_bytes: int
    memory_bytes: int
    done_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class ExportedProgram:
    """What an export made. ``files`` are relative to the request's folder; the rest is as in ``manifest.Program``."""

    graphs: Mapping[str, str]
    files: tuple[str, ...]
    context_length: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cache: CacheSpec
    options: Mapping[str, Any]
    operators: Mapping[str, int]
    tensors: tuple[StoredTensor, ...]
    kind: str = DECODER
    own_cache: CacheSpec | None = None
