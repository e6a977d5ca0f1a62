"""The ExecuTorch backend: one .pte file for ExecuTorch's LLM runners, XNNPACK for the linear layers.

Exporting and running both import torch and executorch, on first use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lfm2_export import paths
from lfm2_export.backends import ExportOption
from lfm2_export.errors import ArtifactError
from lfm2_export.heads import SENTENCE, TOKENS
from lfm2_export.manifest import DECODER

if TYPE_CHECKING:
    import numpy as np

    from lfm2_export.artifact_writer import ArtifactWriter
    from lfm2_export.backends.base import RunnerOptions
    from lfm2_export.backends.drafter import DraftRunner
    from lfm2_export.backends.executorch.encoder import ExecutorchEncoder
    from lfm2_export.backends.executorch.runner import ExecutorchRunner
    from lfm2_export.backends.executorch.stored import StoredWeights
    from lfm2_export.backends.profile import Profile
    from lfm2_export.backends.program import Estimate, ExportedProgram, ExportRequest
    from lfm2_export.backends.weights.plan import WeightPlan
    from lfm2_export.checkpoint import Checkpoint
    from lfm2_export.config import ModelConfig
    from lfm2_export.manifest import Program
    from lfm2_export.quant.schemes import Scheme

SCHEMES = {"fp32": "model_fp32.pte", "8da4w": "model_8da4w.pte"}
DEFAULT_SCHEME = "8da4w"
DRAFTER_SCHEMES: tuple[str, ...] = ()
OPTIONS = {
    "max_context": ExportOption(
        kind=int, metavar="N", help="positions that a .pte program's buffers hold (default: 4096)"
    ),
    "moe_op": ExportOption(
        kind=str,
        choices=("stock", "lfm2", "both"),
        help="how a .pte runs quantized experts: ExecuTorch's operator (default), ours, or a file for each",
    ),
    "embedding_bits": ExportOption(
        kind=int, metavar="N", choices=(4, 8), help="bits of a .pte's quantized token table: 8 (default) or 4"
    ),
}
TESTED_WITH = dict.fromkeys(SCHEMES, "lfm2-export, ExecuTorch's TextLLMRunner")
TESTED_WITH |= dict.fromkeys((f"lfm2_bidirectional {scheme}" for scheme in SCHEMES), "lfm2-export")
# Activations are int8, one scale a token, at every linear layer.
KL_TOLERANCE = 2e-3

_HOW_TO_RUN = """## Run the .pte

```sh
pip install "lfm2-export[executorch]"
lfm2-export run . --backend executorch --prompt "What is C. elegans?"
```
"""


_HOW_TO_EMBED = """## Run the .pte

```sh
pip install "lfm2-export[executorch]"
{command}
```

`forward` takes `input_ids` and `attention_mask`, int64 [1, tokens], and returns what the ONNX graphs do.
"""
_EMBED = 'lfm2-export embed . --backend executorch --text "What is C. elegans?" --query'
_LOAD = "python -c 'import lfm2_export; print(lfm2_export.load_encoder(\".\").run([[1, 2, 3]]))'"


def how_to_run(programs: Sequence[Program], family: str) -> str:
    """The card's section on .pte programs."""
    first = programs[0]
    if first.kind == DECODER:
        return _HOW_TO_RUN
    has_vectors = {SENTENCE, TOKENS} & {output.name for output in first.outputs}
    return _HOW_TO_EMBED.format(command=_EMBED if has_vectors else _LOAD)


def make_plan(config: ModelConfig, scheme: Scheme, options: Mapping[str, int | str]) -> WeightPlan:
    """How every weight of a checkpoint is stored under a scheme: in the first file, where two are asked for, and in
    formats that both take."""
    from lfm2_export.backends.executorch import export

    return export.plan_to_mix(config, scheme, options)


def estimate(request: ExportRequest) -> Estimate:
    """Disk and memory that an export will need; refuses what does not fit the operators."""
    from lfm2_export.backends.executorch import export

    return export.estimate(request)


def export_program(request: ExportRequest) -> ExportedProgram:
    """Writes one scheme's .pte, or its two where both ways of running experts were asked for."""
    from lfm2_export.backends.executorch import export

    return export.export_program(request)


def runtime_files(checkpoint: Checkpoint, writer: ArtifactWriter) -> None:
    """The checkpoint's config, unless the artifact has one that other runtimes' settings were added to."""
    if writer.existing is None or "config.json" not in writer.existing.files:
        writer.write_json("config.json", checkpoint.raw_config)


def load_runner(folder: Path, program: Program, options: RunnerOptions | None = None) -> ExecutorchRunner:
    """A runner on the program's file that is fastest here, or the one that ``options`` ask for."""
    from lfm2_export.backends.executorch.runner import ExecutorchRunner

    return ExecutorchRunner.from_program(folder, program, options)


def load_encoder(folder: Path, program: Program, options: RunnerOptions | None = None) -> ExecutorchEncoder:
    """A runner on an encoder's file."""
    from lfm2_export.backends.executorch.encoder import ExecutorchEncoder

    return ExecutorchEncoder(folder, program, options)


def load_drafter(folder: Path, program: Program, options: RunnerOptions | None = None) -> DraftRunner:
    """There is none: a .pte gives no residual streams for it to read.

    Raises:
        ArtifactError: always.
    """
    raise ArtifactError(f"{paths.shown(folder)}: {program} is a drafter, which only onnx has; export it there")


def runnable_graphs(program: Program) -> dict[str, Program]:
    """Every file of the program, as a program of its own."""
    from dataclasses import replace

    from lfm2_export.manifest import MODEL

    return {name: replace(program, graphs={MODEL: name}) for name in program.graphs.values()}


def profile_program(
    folder: Path, program: Program, prompt: Sequence[int], options: RunnerOptions | None = None
) -> Profile:
    """A prefill and a decode step by operator, from ExecuTorch's event tracer."""
    from lfm2_export.backends.executorch import profile

    return profile.profile_program(folder, program, prompt, options)


def stored_weights(folder: Path, program: Program, config: ModelConfig) -> StoredWeights:
    """The weights that the program computes with, read back out of its file."""
    from lfm2_export.backends.executorch.stored import open_stored

    return open_stored(folder, program, config)


def score_at_full_precision(
    folder: Path, program: Program, rows: Sequence[np.ndarray], *, threads: int | None = None
) -> None:
    """There is no such choice: XNNPACK's int4 kernels take int8 activations only."""
