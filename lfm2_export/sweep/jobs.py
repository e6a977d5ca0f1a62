"""From cells to jobs: what each needs of a machine, and all that its outcome follows from.

In: ``Cell``s. Out: a ``Job`` for each that is made, which holds only plain values, so that it can be sent to another
machine. Every checkpoint is opened and hashed here, so that one that cannot be used is refused before anything starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from lfm2_export.artifact import Artifact
from lfm2_export.checkpoint import Checkpoint, CheckpointRequest
from lfm2_export.errors import ArtifactError, Lfm2ExportError
from lfm2_export.hashing import sha256_file, sha256_files
from lfm2_export.manifest import CheckpointRecord
from lfm2_export.packages import recorded_versions
from lfm2_export.resources import at_most_cores
from lfm2_export.sweep import records
from lfm2_export.sweep.cells import Cell
from lfm2_export.sweep.plan import FILES, Plan
from lfm2_export.sweep.records import ExportRecord, QualityRecord

# Of what a key is made; raised where a later version counts something else.
_KEYS = 1
Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A cell on its way to a worker. ``digest`` is the checkpoint's, ``versions`` are those that made the key.
    ``export_memory`` and ``quality_memory`` in bytes. ``measured``: whether its quality is."""

    cell: Cell
    source: CheckpointRequest
    records: Path
    export_key: str
    quality_key: str
    digest: str
    versions: Mapping[str, str]
    measured: bool
    text: Path | None
    max_tokens: int
    threads: int
    export_memory: int
    quality_memory: int
    attempt: int = 1

    @property
    def export_record(self) -> Path:
        return self.records / f"{self.cell.name}.export.json"

    @property
    def quality_record(self) -> Path:
        return self.records / f"{self.cell.name}.quality.json"

    def exported(self) -> ExportRecord | None:
        """What is known of the same export, failed or not."""
        found = records.read(self.export_record, ExportRecord)
        return found if found is not None and found.key == self.export_key else None

    def quality(self) -> QualityRecord | None:
        """What is known of the same measurement, failed or not."""
        found = records.read(self.quality_record, QualityRecord)
        return found if found is not None and found.key == self.quality_key else None

    def is_exported(self) -> bool:
        """Whether the artifact is there, made of the same things, and whole."""
        record = self.exported()
        if record is None or record.error is not None:
            return False
        try:
            artifact = Artifact.open(self.cell.folder)
        except ArtifactError:
            return False
        return program_files(artifact) == record.files

    def is_measured(self) -> bool:
        """Whether there is nothing to measure any more."""
        record = self.quality()
        return not self.measured or (record is not None and record.error is None)


def program_files(artifact: Artifact) -> dict[str, str]:
    """SHA-256 of every program's files, by name."""
    return {name: entry.sha256 for program in artifact.programs for name, entry in program.files.items()}


def make_jobs(plan: Plan, cells: Iterable[Cell], threads: int, progress: Callable[[str], None]) -> tuple[Job, ...]:
    """A job for each cell that is made, in their order.

    Raises:
        Lfm2ExportError: the matching kind, with the plan's line: a checkpoint cannot be opened, or does not fit what is
            asked of it.
    """
    opened: dict[str, _Opened] = {}
    jobs = []
    for cell in cells:
        if cell.skipped:
            continue
        name = cell.checkpoint.name
        if name not in opened:
            progress(f"opening and hashing {name}")
            opened[name] = _blaming(plan, cell, partial(_Opened.of, cell.checkpoint.request))
        jobs.append(_blaming(plan, cell, partial(_job, plan, cell, opened[name], threads)))
    return tuple(jobs)


def _blaming(plan: Plan, cell: Cell, make: Callable[[], Made]) -> Made:
    """Errors of the library, with the plan's line before them."""
    try:
        return make()
    except Lfm2ExportError as error:
        place = f"{plan.path}:{cell.checkpoint.line}: {cell.name}"
        raise type(error)(f"{place}: {error}", details=error.details) from error


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A checkpoint, and the request by which every machine opens the very same one."""

    checkpoint: Checkpoint
    request: CheckpointRequest
    digest: str
    companions: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, request: CheckpointRequest) -> _Opened:
        checkpoint = request.open()
        hashes = sha256_files(checkpoint.files(), remembered=True)
        return cls(
            checkpoint=checkpoint,
            request=replace(request, revision=checkpoint.revision or request.revision),
            digest=CheckpointRecord.of(checkpoint).digest,
            companions=tuple(sorted((path.name, digest) for path, digest in hashes.items())),
        )


def _job(plan: Plan, cell: Cell, opened: _Opened, threads: int) -> Job:
    from lfm2_export.pipeline import estimate_export

    checkpoint, versions = opened.checkpoint, recorded_versions()
    with at_most_cores(threads):
        needs = estimate_export(cell.export_settings(), checkpoint)
    is_decoder = checkpoint.config.encoder is None and checkpoint.config.drafter is None
    if cell.gates.need_figures and not is_decoder:
        checkpoint.check_decoder("gates on max_kl and min_top1")
    measured = plan.measure and is_decoder
    files = {name: sha256_file(Path(value)) for name, value in cell.settings.items() if _is_file(name, value)}
    made_of = [_KEYS, opened.digest, opened.companions, cell.backend, cell.scheme, {**cell.settings, **files}, versions]
    export_key = _digest(made_of)
    text = None if plan.text is None else sha256_file(plan.text)
    return Job(
        cell=cell,
        source=opened.request,
        records=plan.output / records.FOLDER,
        export_key=export_key,
        quality_key=_digest([export_key, text, plan.max_tokens]),
        digest=opened.digest,
        versions=versions,
        measured=measured,
        text=plan.text,
        max_tokens=plan.max_tokens,
        threads=threads,
        export_memory=needs.memory_bytes,
        quality_memory=_quality_memory(checkpoint, plan.max_tokens, needs.disk_bytes) if measured else 0,
    )


def _is_file(name: str, value: object) -> bool:
    return name in FILES and Path(str(value)).is_absolute()


def _quality_memory(checkpoint: Checkpoint, max_tokens: int, largest: int) -> int:
    from lfm2_export.quality.measure import memory_needed

    return memory_needed(checkpoint, max_tokens, largest)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
