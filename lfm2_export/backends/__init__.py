"""One folder per backend: how a model is lowered to it, and the runner that executes the result.

A backend (here: a module) offers what ``Backend`` lists; it is imported when it is asked for, and imports its runtime
only where that is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lfm2_export.errors import ExportError
from lfm2_export.messages import shown
from lfm2_export.registry import Registry
from lfm2_export.spelling import did_you_mean

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from lfm2_export.artifact_writer import ArtifactWriter
    from lfm2_export.backends.base import Runner, RunnerOptions
    from lfm2_export.backends.drafter import DraftRunner
    from lfm2_export.backends.encoder import EncoderRunner
    from lfm2_export.backends.profile import Profile
    from lfm2_export.backends.program import Estimate, ExportedProgram, ExportRequest
    from lfm2_export.backends.weights.plan import WeightPlan
    from lfm2_export.checkpoint import Checkpoint
    from lfm2_export.config import ModelConfig
    from lfm2_export.manifest import Program
    from lfm2_export.models.loading import WeightSource
    from lfm2_export.quant.schemes import Scheme


@dataclass(frozen=True, kw_only=True)
class ExportOption:
    """A setting of ``export`` that belongs to one backend: a keyword of the Python function, ``--name`` on the command
    line. ``kind`` is its type, ``choices`` all that it may be; ``metavar`` (None: the choices) and ``help`` are for the
    help text."""

    kind: type[int] | type[str]
    help: str
    metavar: str | None = None
    choices: tuple[int | str, ...] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class FullPrecision:
    """Logits [T, V] of each row without quantized activations; ``exact``: only rounding in float32 is left."""

    logits: tuple[np.ndarray, ...]
    exact: bool


class Backend(Protocol):
    """What a backend offers.

    ``SCHEMES``: those that it lowers, with the name of the program's file; ``DEFAULT_SCHEME``: the one that is made
    where none is asked for. ``DRAFTER_SCHEMES``: those of drafters. ``OPTIONS``: settings of its own for ``export``, by
    their keyword. ``TESTED_WITH``: the runtimes that a model card says open a scheme's program; under "family
    scheme" where a family's are others. A test looks for each in what the tests showed (``lfm2_export.tested``).
    ``KL_TOLERANCE``: how far (mean KL divergence) int8 activations may take a quantized program from the eager model
    with the same weights.
    """

    SCHEMES: Mapping[str, str]
    DEFAULT_SCHEME: str
    DRAFTER_SCHEMES: tuple[str, ...]
    OPTIONS: Mapping[str, ExportOption]
    TESTED_WITH: Mapping[str, str]
    KL_TOLERANCE: float

    def make_plan(self, config: ModelConfig, scheme: Scheme, options: Mapping[str, int | str]) -> WeightPlan:
        """How every weight is stored, under the settings of ``OPTIONS`` that were given; called for schemes whose
        widths can be mixed (``Scheme.can_mix``)."""

    def estimate(self, request: ExportRequest) -> Estimate:
        """What the export will need; refuses what cannot be lowered, before any work."""

    def export_program(self, request: ExportRequest) -> ExportedProgram:
        """Writes the program's files below ``request.folder``."""

    def how_to_run(self, programs: Sequence[Program], family: str) -> str:
        """Markdown for the model card: how these programs, all of this backend, are run."""

    def runtime_files(self, checkpoint: Checkpoint, writer: ArtifactWriter) -> None:
        """Writes the files by which other runtimes find the backend's programs in the artifact."""

    def load_runner(self, folder: Path, program: Program, options: RunnerOptions | None = None) -> Runner:
        """A runner on one program of an artifact."""

    def load_encoder(self, folder: Path, program: Program, options: RunnerOptions | None = None) -> EncoderRunner:
        """A runner on one program of an artifact of an encoder."""

    def load_drafter(self, folder: Path, program: Program, options: RunnerOptions | None = None) -> DraftRunner:
        """A runner on one program of an artifact of a drafter."""

    def runnable_graphs(self, program: Program) -> dict[str, Program]:
        """Every graph of a program that runs here, by its file, as a program of its own."""

    def profile_program(
        self, folder: Path, program: Program, prompt: Sequence[int], options: RunnerOptions | None = None
    ) -> Profile:
        """What a prefill of ``prompt`` and a decode step after it spend, by operator; loads the program anew."""

    def stored_weights(self, folder: Path, program: Program, config: ModelConfig) -> WeightSource:
        """What the program computes with, read back from its files: float32 values under the published names."""

    def score_at_full_precision(
        self, folder: Path, program: Program, rows: Sequence[np.ndarray], *, threads: int | None = None
    ) -> FullPrecision | None:
        """Logits of every position with kernels that leave activations alone; None where there is no such choice."""


def tested_with(table: Mapping[str, str], family: str, scheme: str) -> str:
    """The runtimes that a ``TESTED_WITH`` names for a family's scheme, in words."""
    return table.get(f"{family} {scheme}") or table.get(scheme, "lfm2-export")


def option_flag(name: str) -> str:
    """An option's name on the command line."""
    return f"--{name.replace('_', '-')}"


BACKENDS: Registry[Backend] = Registry(
    {
        "onnx": "lfm2_export.backends.onnx",
        "executorch": "lfm2_export.backends.executorch",
    }
)


def get_backend(name: str) -> Backend:
    """A backend's module.

    Raises:
        ExportError: there is no such backend; the message lists those that there are.
    """
    if name not in BACKENDS:
        raise ExportError(
            f"backend {shown(name)} is unknown{did_you_mean(name, BACKENDS)}; known backends: {', '.join(BACKENDS)}"
        )
    return BACKENDS[name]
