"""A whole sweep: the plan read and checked, what is missing done, the report written.

In: a plan's file, and which machines. Out: ``SweepReport``. What is wrong with a plan is said before anything starts or
is written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lfm2_export import interrupts, json_values, own_files, paths
from lfm2_export.errors import ConfigError, Lfm2ExportError
from lfm2_export.folders import TAG, Folder, UnexpectedKindError
from lfm2_export.leftovers import swept
from lfm2_export.lock import Lock
from lfm2_export.packages import explained
from lfm2_export.progress import Progress
from lfm2_export.resources import usable_cores
from lfm2_export.sweep import cells as all_cells
from lfm2_export.sweep import page, records, schedule
from lfm2_export.sweep.cells import Cell, make_cells
from lfm2_export.sweep.jobs import Job, make_jobs
from lfm2_export.sweep.plan import Plan, read_plan
from lfm2_export.sweep.report import SweepReport
from lfm2_export.sweep.schedule import Task, Workers, pending

JSON, PAGE = "sweep.json", "sweep.html"
_LOCK = f".{TAG}-sweep.lock"
# An export has work for so many threads most of its time.
_THREADS = 4


@explained
def sweep(
    plan: str | Path,
    *,
    address: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> SweepReport:
    """Makes and measures what a plan asks for and is not there yet; ``Sweep`` does it in steps.

    Args:
        plan: the YAML file.
        address: of a Ray cluster ("auto": the one of this machine), whose machines see the same folders; None: this
            machine alone, or the Ray that this process is connected to already.
        workers: how many cells at a time, of this machine; default: as its cores allow.
        progress: told what is done.

    Raises:
        ConfigError: the plan is wrong; nothing was started.
        Lfm2ExportError: the matching kind: a checkpoint cannot be opened; Ray cannot be used.
    """
    opened = Sweep.open(plan, address=address, workers=workers, progress=progress)
    return opened.run(address=address, progress=progress)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A plan that was checked. ``workers`` at a time with ``threads`` each, on this machine."""

    plan: Plan
    cells: tuple[Cell, ...]
    jobs: tuple[Job, ...]
    workers: int
    threads: int

    @classmethod
    def open(
        cls,
        plan: str | Path,
        *,
        address: str | None = None,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> Sweep:
        """Reads and checks a plan, and opens its checkpoints; raises as ``sweep``."""
        if workers is not None and not 1 <= workers <= 1024:
            raise ConfigError(f"--workers {workers}: give a number from 1 to 1024")
        if address is not None and workers is not None:
            raise ConfigError("--workers is for this machine; a cluster has its own, leave it or --address out")
        told = progress or Progress()
        read = read_plan(plan)
        cells = make_cells(read)
        _check_output(read)
        threads = read.threads or _threads(address, workers)
        with interrupts.lasting(), swept():
            jobs = make_jobs(read, cells, threads, told.phase)
        return cls(
            plan=read,
            cells=cells,
            jobs=jobs,
            workers=workers or max(1, usable_cores() // threads),
            threads=threads,
        )

    def pending(self) -> tuple[Task, ...]:
        """The first step of every cell that is not done."""
        return tuple(task for job in self.jobs if (task := pending(job)) is not None)

    def report(self) -> SweepReport:
        """As things are now."""
        return SweepReport.of(self.plan, self.cells, self.jobs)

    @explained
    def run(self, *, address: str | None = None, progress: Progress | None = None) -> SweepReport:
        """Does what is missing and writes the report, also where it is ended by a signal; raises as ``sweep``."""
        told = progress or Progress()
        with self._alone():
            told.phase("looking for what is done")
            if not self.pending():
                return self._written()
            told.phase("starting Ray" if address is None else f"connecting to Ray at {address}")
            with interrupts.lasting(), self._workers(address) as workers:
                return self._done_by(workers, told)

    def _done_by(self, workers: Workers, progress: Progress) -> SweepReport:
        tasks = self.pending()
        progress.start_steps("cells", len(tasks))
        try:
            schedule.run(
                tasks,
                workers,
                retries=self.plan.retries,
                told=progress.told,
                ended=lambda: progress.advance(1),
            )
        finally:
            found = self._written()
        return found

    def _workers(self, address: str | None) -> contextlib.AbstractContextManager[Workers]:
        from lfm2_export.sweep import on_ray

        if address is None:
            return on_ray.local(workers=self.workers, threads=self.threads)
        return on_ray.cluster(address)

    def _written(self) -> SweepReport:
        report = self.report()
        text = json_values.dump(report.to_json())
        own_files.write(self.plan.output / JSON, [text.encode()], Lfm2ExportError)
        page.write(report, self.plan.output / PAGE)
        return report

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """The output folder, made, with no other sweep in it."""
        output = self.plan.output
        with contextlib.ExitStack() as opened:
            try:
                for name in (all_cells.FOLDER, records.FOLDER):
                    (output / name).mkdir(parents=True, exist_ok=True)
                lock = Lock(opened.enter_context(Folder.open(output)), _LOCK)
                held = lock.acquire()
            except (OSError, UnexpectedKindError) as error:
                reason = getattr(error, "strerror", None) or error
                raise ConfigError(
                    f"{paths.shown(output)}: cannot be written to ({reason}); give another output"
                ) from error
            if not held:
                raise ConfigError(
                    f"{paths.shown(output)}: another sweep is writing to it; wait for it, or give another output"
                )
            opened.callback(lock.release)
            yield


def _threads(address: str | None, workers: int | None) -> int:
    """Of a cell, where the plan does not say: a share of this machine; of a cluster's machines nothing is known."""
    if address is not None:
        return _THREADS
    cores = usable_cores()
    return max(1, cores // workers) if workers is not None else min(_THREADS, cores)


def _check_output(plan: Plan) -> None:
    """Refuses a folder that holds something else than a sweep."""
    if not paths.is_folder(plan.output, ConfigError):
        return
    names = set(paths.names(plan.output, ConfigError, most=paths.MOST_NAMES))
    if names and not {all_cells.FOLDER, records.FOLDER} <= names:
        raise plan.error(
            f"output {paths.shown(plan.output)} holds something else ({min(names)}, ...); give a new folder's name",
            line=plan.lines["output"],
        )
