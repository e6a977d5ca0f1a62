"""Which step of which cell is next, until there is none: exports, then comparisons, each again where a worker died.

In: jobs, and ``Workers`` that do their steps. Out: the records on disk; and what a person is told meanwhile. Steps that
an earlier sweep has done are not done again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from lfm2_export.sweep import records
from lfm2_export.sweep.jobs import Job
from lfm2_export.sweep.records import ExportRecord, QualityRecord


class Step(StrEnum):
    """Of a cell."""

    EXPORT = "export"
    MEASURE = "measure"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One step of a job."""

    step: Step
    job: Job

    @property
    def memory(self) -> int:
        return self.job.export_memory if self.step is Step.EXPORT else self.job.quality_memory

    def __str__(self) -> str:
        return f"{self.step} {self.job.cell.name}"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a task ended: with an ``error`` in one line, None where there was none; ``lost``: its worker died, and
    another may do it."""

    task: Task
    error: str | None = None
    lost: bool = False


class Workers(Protocol):
    """Whoever does tasks."""

    def refusal(self, task: Task) -> str | None:
        """Why no machine can do it; None where one can."""

    def start(self, task: Task) -> None:
        """Takes it on."""

    def wait(self) -> Ended:
        """Waits for one of those that were started."""


def pending(job: Job) -> Task | None:
    """The first step of a job that is not done."""
    if not job.is_exported():
        return Task(step=Step.EXPORT, job=job)
    return None if job.is_measured() else Task(step=Step.MEASURE, job=job)


def run(
    tasks: Iterable[Task],
    workers: Workers,
    *,
    retries: int,
    told: Callable[[str], None],
    ended: Callable[[], None],
) -> None:
    """Does the tasks and those that follow from them. ``told`` hears of what went wrong, ``ended`` is called for each
    cell that needs nothing more."""
    running = sum(_begun(task, workers, told, ended) for task in tasks)
    while running:
        done = workers.wait()
        running -= 1
        task = done.task
        if done.lost and task.job.attempt <= retries:
            again = replace(task, job=replace(task.job, attempt=task.job.attempt + 1))
            told(f"{task}: {done.error}; begun again ({again.job.attempt} of {retries + 1})")
            running += _begun(again, workers, told, ended)
        elif done.error is not None:
            if done.lost:
                _give_up(task, f"{done.error}, {task.job.attempt} times")
            told(f"{task}: {done.error}")
            ended()
        elif task.step is Step.EXPORT and not task.job.is_measured():
            running += _begun(Task(step=Step.MEASURE, job=replace(task.job, attempt=1)), workers, told, ended)
        else:
            ended()


def _begun(task: Task, workers: Workers, told: Callable[[str], None], ended: Callable[[], None]) -> bool:
    """Whether a worker has it now; what none can do has failed."""
    if (reason := workers.refusal(task)) is None:
        workers.start(task)
        return True
    _give_up(task, reason)
    told(f"{task}: {reason}")
    ended()
    return False


def _give_up(task: Task, error: str) -> None:
    """A record in the place of the worker's."""
    job = task.job
    if task.step is Step.EXPORT:
        found = ExportRecord(cell=job.cell.name, key=job.export_key, error=error, attempt=job.attempt)
        records.write(job.export_record, found)
    else:
        quality = QualityRecord(cell=job.cell.name, key=job.quality_key, error=error, attempt=job.attempt)
        records.write(job.quality_record, quality)
