"""The way through the three hops: what is loaded when, and what is let go before the next thing is.

In: the arguments of ``measure_parity``. Out: a ``ParityReport``; recorded in the artifact by ``record``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lfm2_export import model_card, paths
from lfm2_export.artifact import Artifact
from lfm2_export.backends import get_backend
from lfm2_export.backends.base import RunnerOptions
from lfm2_export.backends.eager import EagerRunner
from lfm2_export.checkpoint import Checkpoint, CheckpointRequest
from lfm2_export.errors import ArtifactError
from lfm2_export.hub_artifacts import name_of, open_programs
from lfm2_export.manifest import CARD, MANIFEST, CheckpointRecord, Program
from lfm2_export.messages import listed
from lfm2_export.models.loading import load_model
from lfm2_export.packages import recorded_versions
from lfm2_export.parity import encoder
from lfm2_export.parity.divergence import Divergence, compare
from lfm2_export.parity.figures import Hop
from lfm2_export.parity.lowering import FEW_WINDOWS, Subject, measure_lowering, score
from lfm2_export.parity.model import measure_model
from lfm2_export.parity.quantization import measure_quantization
from lfm2_export.parity.report import ParityReport, ProgramParity
from lfm2_export.parity.sample import Sample, read_sample
from lfm2_export.parity.storage import ComparedWeights
from lfm2_export.resources import check_memory

logger = logging.getLogger(__name__)

# torch, transformers and a runtime, beside the weights.
_MEMORY_BASE = 512 << 20


@dataclass(frozen=True, kw_only=True)
class ParityRequest:
    """What ``measure_parity`` was asked for, beside the artifact and its checkpoint. ``schemes`` None: all."""

    backend: str | None
    schemes: tuple[str, ...] | None
    text: str | Path | None
    max_tokens: int
    threads: int | None
    progress: Callable[[str], None]


def measure(path: str | Path, source: CheckpointRequest, request: ParityRequest) -> ParityReport:
    """As ``measure_parity`` says."""
    opened = source.open()
    artifact = open_programs(path, backend=request.backend, schemes=request.schemes, offline=source.offline)
    check_origin(artifact, opened)
    programs = _choose(artifact, request.backend, request.schemes)
    artifact.verify(*programs)
    for program in programs:
        if lost := sorted(set(program.graphs.values()) - set(artifact.present(program).graphs.values())):
            logger.warning("%s: %s is missing and not compared", paths.shown(artifact.path), listed(lost))
    programs = tuple(artifact.present(program) for program in programs)
    context_length = min(program.context_length for program in programs)
    sample = read_sample(opened, request.text, max_tokens=request.max_tokens, context_length=context_length)
    check_memory(_memory_needed(opened, programs, sample), purpose="parity")
    if opened.config.encoder is not None:
        model, measured = encoder.measure(artifact.path, programs, opened, sample, request.threads, request.progress)
    else:
        model, measured = _measure_decoder(artifact, programs, opened, sample, request)
    return ParityReport(
        artifact=name_of(path, artifact.path),
        checkpoint=str(artifact.manifest.checkpoint),
        text=f"{sample.tokens} tokens of {sample.description}",
        model=model,
        programs=measured,
        versions=recorded_versions(),
    )


def _measure_decoder(
    artifact: Artifact, programs: Iterable[Program], checkpoint: Checkpoint, sample: Sample, request: ParityRequest
) -> tuple[Hop, tuple[ProgramParity, ...]]:
    request.progress("model: transformers and ours")
    model, reference = _measure_model(checkpoint, sample)
    measured = []
    for program in programs:
        request.progress(f"{program}: lowering and quantization")
        measured.append(_measure_program(artifact, program, checkpoint, sample, reference, request.threads))
    return model, tuple(measured)


def record(path: Path, source: CheckpointRequest, report: ParityReport) -> None:
    """As ``record_parity`` says."""
    opened = source.open()
    artifact = Artifact.open(path, verify=False)
    check_origin(artifact, opened)
    _record(artifact, report, opened)


def check_origin(artifact: Artifact, checkpoint: Checkpoint) -> None:
    """Refuses a checkpoint that the artifact was not made of.

    Raises:
        ArtifactError: config or weights differ.
    """
    made_of, given = artifact.manifest.checkpoint, CheckpointRecord.of(checkpoint)
    if made_of.is_same_as(given):
        return
    what = "another config" if made_of.config_sha256 != given.config_sha256 else "other weights"
    raise ArtifactError(
        f"{artifact.path}: was made of {made_of}, and {checkpoint.name} has {what} (the sha256 differs); "
        "give the checkpoint that it was made of, or export again"
    )


def _choose(artifact: Artifact, backend: str | None, schemes: tuple[str, ...] | None) -> tuple[Program, ...]:
    if schemes is not None:
        return tuple(artifact.program(backend, scheme) for scheme in dict.fromkeys(schemes))
    artifact.program(backend)  # raises where there is none
    return artifact.select(backend)


def _memory_needed(checkpoint: Checkpoint, programs: Iterable[Program], sample: Sample) -> int:
    """Bytes: our model and either transformers' or a program, and logits of the whole text."""
    fp32 = 4 * checkpoint.parameter_count
    largest = max(sum(entry.bytes for entry in program.files.values()) for program in programs)
    return _MEMORY_BASE + fp32 + max(fp32, largest) + 4 * sample.tokens * checkpoint.config.vocab_size


def _measure_model(checkpoint: Checkpoint, sample: Sample) -> tuple[Hop, list[np.ndarray]]:
    """Hop 1, and the checkpoint's logits of every window for hop 3."""
    model = load_model(checkpoint)
    hop = measure_model(model, checkpoint, sample)
    eager = EagerRunner(model)
    return hop, [score(eager, window) for window in sample.windows]


def _measure_program(
    artifact: Artifact,
    program: Program,
    checkpoint: Checkpoint,
    sample: Sample,
    reference: list[np.ndarray],
    threads: int | None,
) -> ProgramParity:
    backend = get_backend(program.backend)
    weights = ComparedWeights(backend.stored_weights(artifact.path, program, checkpoint.config), checkpoint)
    model = load_model(weights)
    subject = Subject(
        eager=EagerRunner(model),
        model=model,
        runner=backend.load_runner(artifact.path, program, RunnerOptions(threads=threads)),
        backend=backend,
        folder=artifact.path,
        program=program,
        threads=threads,
    )
    text = _score_text(subject, sample, reference)

    def perturbed_kl() -> float:
        windows = zip(reference, sample.windows[:FEW_WINDOWS], strict=False)
        return Divergence.joined(compare(logits, score(subject.eager, window)) for logits, window in windows).mean_kl

    return ProgramParity(
        program=program,
        lowering=measure_lowering(subject, sample, text.lowering, text.scored),
        quantization=measure_quantization(program, model, sample, text.quantization, weights, perturbed_kl),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Text:
    """Both comparisons over the whole text, and the program's logits of its first windows."""

    lowering: Divergence
    quantization: Divergence
    scored: list[np.ndarray]


def _score_text(subject: Subject, sample: Sample, reference: list[np.ndarray]) -> _Text:
    lowering: list[Divergence] = []
    quantization: list[Divergence] = []
    scored: list[np.ndarray] = []
    for window, original in zip(sample.windows, reference, strict=True):
        logits = score(subject.runner, window)
        lowering.append(compare(score(subject.eager, window), logits))
        quantization.append(compare(original, logits, window.targets))
        if len(scored) < FEW_WINDOWS:
            scored.append(logits)
    return _Text(lowering=Divergence.joined(lowering), quantization=Divergence.joined(quantization), scored=scored)


def _record(artifact: Artifact, report: ParityReport, checkpoint: Checkpoint) -> None:
    """Writes the figures into the manifest, and into the model card unless somebody has edited it."""
    owns_card = artifact.owns_card
    updated = artifact.update(parity=report.records())
    if owns_card:
        updated.update(readme=model_card.render(updated.manifest.checkpoint, updated.programs, checkpoint))
    else:
        card = paths.shown(artifact.path / CARD)
        logger.warning("%s: is not as the export wrote it and stays so; the figures are in %s alone", card, MANIFEST)
