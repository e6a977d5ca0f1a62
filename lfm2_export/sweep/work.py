"""What a worker does with a job: the export, and the comparison with the checkpoint. Knows nothing of who calls it.

In: a ``Job``. Out: a record, which is also written beside the artifacts. A job that fails is a record that says why in
one line; only what ends the process (a signal) ends without one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from lfm2_export import memory
from lfm2_export.artifact import Artifact
from lfm2_export.errors import ArtifactError, Lfm2ExportError
from lfm2_export.messages import one_line
from lfm2_export.mixups import is_artifact
from lfm2_export.packages import recorded_versions
from lfm2_export.pipeline import export
from lfm2_export.quality import measure_quality
from lfm2_export.resources import at_most_cores
from lfm2_export.sweep import records
from lfm2_export.sweep.jobs import Job, program_files
from lfm2_export.sweep.records import ExportRecord, Figures, QualityRecord

logger = logging.getLogger(__name__)
Made = TypeVar("Made")
_MOST_NOTES = 16


def export_cell(job: Job) -> ExportRecord:
    """Exports the cell into its folder."""
    started = time.monotonic()
    with _bounded(job), _noted() as notes:
        artifact, error = _tried(lambda: _exported(job))
    program = None if artifact is None else artifact.program()
    record = ExportRecord(
        cell=job.cell.name,
        key=job.export_key,
        error=error,
        files={} if artifact is None else program_files(artifact),
        nbytes=0 if program is None else sum(entry.bytes for entry in program.files.values()),
        seconds=time.monotonic() - started,
        notes=tuple(notes[:_MOST_NOTES]),
        attempt=job.attempt,
    )
    records.write(job.export_record, record)
    return record


def measure_cell(job: Job) -> QualityRecord:
    """Compares the cell's artifact with its checkpoint in fp32."""
    started = time.monotonic()
    with _bounded(job):
        figures, error = _tried(lambda: _figures(job))
    record = QualityRecord(
        cell=job.cell.name,
        key=job.quality_key,
        error=error,
        figures=figures,
        seconds=time.monotonic() - started,
        attempt=job.attempt,
    )
    records.write(job.quality_record, record)
    return record


def _tried(work: Callable[[], Made]) -> tuple[Made | None, str | None]:
    """What was made, or why not, in one line."""
    try:
        return work(), None
    except Lfm2ExportError as error:
        return None, str(error)
    except Exception as error:
        if memory.ran_out(error):
            return None, "the machine ran out of memory; use a larger one, or fewer workers"
        logger.exception("a cell failed")
        return None, one_line(f"internal error ({type(error).__name__}: {error}); this is a bug: report it")


def _exported(job: Job) -> Artifact:
    _check_versions(job)
    _remove_others(job)
    asked = job.cell.export_settings()
    artifact = export(
        job.source.name,
        backend=job.cell.backend,  # type: ignore[arg-type]
        scheme=job.cell.scheme,  # type: ignore[arg-type]
        output=asked.output,
        group_size=asked.group_size,
        exclude=asked.exclude,
        algorithm=asked.algorithm,  # type: ignore[arg-type]
        calibrate=asked.calibrate,
        statistics=asked.statistics,
        target_bits=asked.target_bits,
        target_size=asked.target_size,
        budget=asked.budget,  # type: ignore[arg-type]
        measure=asked.measure,
        requantize_table=asked.requantize_table,
        config_from=job.source.config_from,
        lora=job.source.lora,
        revision=job.source.revision,
        offline=job.source.offline,
        **asked.options,  # type: ignore[arg-type]
    )
    if artifact.manifest.checkpoint.digest != job.digest:
        raise ArtifactError(
            f"{job.cell.name}: the checkpoint is another one on this machine, or changed meanwhile; sweep again"
        )
    return artifact


def _figures(job: Job) -> Figures:
    report = measure_quality(
        [job.cell.folder],
        job.source.name,
        text=job.text,
        max_tokens=job.max_tokens,
        revision=job.source.revision,
        offline=job.source.offline,
        config_from=job.source.config_from,
        lora=job.source.lora,
        threads=min(job.threads, os.cpu_count() or job.threads),
    )
    (found,) = report.models
    return Figures(
        text=report.text,
        kl=found.kl,
        kl_error=found.kl_error,
        kl_p99=found.kl_p99,
        top1_agreement=found.top1_agreement,
        perplexity=found.perplexity,
        reference_perplexity=report.perplexity,
        file_bits=found.size.file_bits,
        step_bits=found.size.step_bits,
        same_experts=found.mean_same_experts,
    )


def _check_versions(job: Job) -> None:
    """A machine with other packages would make something else under the same key."""
    here = recorded_versions()
    for name in sorted({*here, *job.versions}):
        if here.get(name) != job.versions.get(name):
            raise Lfm2ExportError(
                f"{name} is {here.get(name, 'not installed')} on the worker's machine and "
                f"{job.versions.get(name, 'not installed')} where the sweep was started; install the same on both"
            )


def _remove_others(job: Job) -> None:
    """The artifact of a checkpoint that has changed since: an export adds only to those of the same one."""
    if not is_artifact(job.cell.folder):
        return
    there = Artifact.open(job.cell.folder, verify=False)
    if there.manifest.checkpoint.digest == job.digest:
        return
    if edited := [*there.edited(), *sorted(there.manifest.adopted)]:
        raise ArtifactError(
            f"{job.cell.folder}: is of the checkpoint as it was, and {edited[0]} in it was edited; move the folder away"
        )
    shutil.rmtree(job.cell.folder)


@contextlib.contextmanager
def _bounded(job: Job) -> Iterator[None]:
    """Several cells share a machine: none takes more threads than it was given."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    try:
        with at_most_cores(job.threads):
            yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _noted() -> Iterator[list[str]]:
    """The package's warnings, which nobody sees where a worker prints them."""
    notes: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notes.append(one_line(record.getMessage()))

    handler, ours = Handler(level=logging.WARNING), logging.getLogger("lfm2_export")
    ours.addHandler(handler)
    try:
        yield notes
    finally:
        ours.removeHandler(handler)
