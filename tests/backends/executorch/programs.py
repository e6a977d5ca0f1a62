"""Small .pte programs for tests, made once per test process."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lfm2_export.backends.eager import EagerRunner
from lfm2_export.backends.executorch import SCHEMES, export
from lfm2_export.backends.executorch.plan import PtePlan
from lfm2_export.backends.executorch.runner import ExecutorchRunner
from lfm2_export.backends.executorch.spill import Spill
from lfm2_export.backends.executorch.stored import StoredWeights
from lfm2_export.backends.executorch.stream import PteStream
from lfm2_export.backends.executorch.weights import ProgramWeights
from lfm2_export.backends.program import ExportedProgram, ExportRequest
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.models.loading import load_model
from lfm2_export.quant.schemes import get_scheme
from tests.checkpoints import tiny_config, write_random_checkpoint

MAX_CONTEXT = 96
LAYERS = ("conv", "full_attention", "conv")


@dataclass(frozen=True, kw_only=True)
class Made:
    """A program and what it was made of."""

    checkpoint: Checkpoint
    folder: Path
    exported: ExportedProgram

    @property
    def path(self) -> Path:
        return self.folder / self.exported.files[0]

    def runner(self, path: Path | None = None, *, context: int = MAX_CONTEXT) -> ExecutorchRunner:
        return ExecutorchRunner(path or self.path, cache=self.exported.cache, context_length=context)

    def eager(self, path: Path | None = None, *, context: int = MAX_CONTEXT) -> EagerRunner:
        """The eager model with the weights that the file holds."""
        path = path or self.path
        places = self.exported.options["weights"][path.name]
        return EagerRunner(load_model(StoredWeights(path, places, self.checkpoint.config)), context_length=context)


@cache
def scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="lfm2-export-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def plain() -> Made:
    """The program that most tests of the runner look at: dense, fp32."""
    return make(checkpoint_of("lfm2"), "fp32")


def checkpoint_of(model_type: str, *, layer_types: tuple[str, ...] = LAYERS, **overrides: Any) -> Checkpoint:
    """A random checkpoint of few layers."""
    folder = Path(tempfile.mkdtemp(dir=scratch()))
    raw = tiny_config(model_type, num_hidden_layers=len(layer_types), layer_types=list(layer_types), **overrides)
    return open_checkpoint(write_random_checkpoint(folder, raw, seed=7, dtype="F32"))


def request(checkpoint: Checkpoint, scheme: str, **options: Any) -> ExportRequest:
    folder = Path(tempfile.mkdtemp(dir=scratch()))
    return ExportRequest(
        checkpoint=checkpoint,
        scheme=get_scheme(scheme),
        file_name=SCHEMES[scheme],
        folder=folder,
        algorithm="round",
        progress=lambda nbytes: None,
        options={"max_context": MAX_CONTEXT, **options},
    )


def stored(checkpoint: Checkpoint, plan: PtePlan) -> ProgramWeights:
    """The checkpoint's weights as a program stores them, without an export."""
    root = Path(tempfile.mkdtemp(dir=scratch()))
    stream = PteStream(plan, "round", name="model.pte", root=root, ledger=None)
    stream.write(checkpoint, lambda nbytes: None)
    return ProgramWeights(plan, stream.places, Spill(stream.paths))


def make(checkpoint: Checkpoint, scheme: str, **options: Any) -> Made:
    asked = request(checkpoint, scheme, **options)
    export.estimate(asked)
    return Made(checkpoint=checkpoint, folder=asked.folder, exported=export.export_program(asked))


def prompt(made: Made, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, made.checkpoint.config.vocab_size, length)


def max_error(expected: np.ndarray, found: np.ndarray) -> float:
    return float(np.abs(expected - found).max())


def divergence(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL divergence of each row of logits."""
    log_p, log_q = (_log_softmax(logits.astype(np.float64)) for logits in (expected, found))
    found_rows: np.ndarray = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return found_rows


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
