"""Which step comes when, with workers that only say how it ended. No Ray, nothing is exported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lfm2_export.errors import CheckpointError, QuantizationError
from lfm2_export.sweep import records, schedule
from lfm2_export.sweep.jobs import Job
from lfm2_export.sweep.records import ExportRecord, Figures, QualityRecord
from lfm2_export.sweep.report import FAILED, FELL_SHORT, MISSING, OK, Outcome, SweepReport
from lfm2_export.sweep.run import Sweep
from lfm2_export.sweep.schedule import Ended, Step, Task
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.encoder_checkpoints import write_encoder

PLAN = """\
output: out
checkpoints: [tiny-dense]
schemes: [q4, q8, fp32]
gates: {max_kl: 0.01, min_top1: 0.9}
cells:
  - {scheme: fp32, gates: {max_bytes: 10MB}}
retries: 2
"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    folder = tmp_path_factory.mktemp("schedule")
    (folder / "plan.yaml").write_text(PLAN)
    found = Sweep.open(folder / "plan.yaml", workers=1)
    assert not found.plan.output.exists()
    return found


@pytest.fixture
def jobs(opened: Sweep, tmp_path: Path) -> list[Job]:
    return [replace(job, records=tmp_path) for job in opened.jobs]


class Scripted:
    """Ends each task as ``ends`` says, as a worker would have written it, first come first served."""

    def __init__(self, ends: Callable[[Task], Ended], refusal: str | None = None):
        self.done: list[str] = []
        self._ends, self._refusal, self._waiting = ends, refusal, list[Task]()

    def refusal(self, task: Task) -> str | None:
        return self._refusal if self._refusal and task.job.cell.scheme == "q8" else None

    def start(self, task: Task) -> None:
        self._waiting.append(task)

    def wait(self) -> Ended:
        task = self._waiting.pop(0)
        self.done.append(f"{task} {task.job.attempt}")
        found = self._ends(task)
        if not found.lost:
            write(task, found.error)
        return found


def write(task: Task, error: str | None, *, kl: float | None = 0.001, top1: float = 0.95, nbytes: int = 1000) -> None:
    job = task.job
    if task.step is Step.EXPORT:
        made = ExportRecord(cell=job.cell.name, key=job.export_key, error=error, nbytes=nbytes)
        records.write(job.export_record, made)
        return
    figures = Figures(
        text="a text",
        kl=kl,
        kl_error=None,
        kl_p99=0.1,
        top1_agreement=top1,
        perplexity=9.0,
        reference_perplexity=8.0,
        file_bits=5.0,
        step_bits=5.0,
    )
    quality = QualityRecord(cell=job.cell.name, key=job.quality_key, error=error, figures=None if error else figures)
    records.write(job.quality_record, quality)


def run(jobs: list[Job], workers: Scripted) -> tuple[list[str], int]:
    told: list[str] = []
    ended: list[None] = []
    tasks = [task for job in jobs if (task := schedule.pending(job)) is not None]
    schedule.run(tasks, workers, retries=2, told=told.append, ended=lambda: ended.append(None))
    return told, len(ended)


def outcomes(jobs: list[Job]) -> dict[str, Outcome]:
    return {job.cell.scheme: Outcome.of(job.cell, job) for job in jobs}


def test_a_cell_is_measured_after_it_is_exported_and_one_that_fails_stops_no_other(jobs: list[Job]) -> None:
    workers = Scripted(lambda task: Ended(task=task, error="a tensor is damaged" if str(task).endswith("q8") else None))
    told, ended = run(jobs, workers)
    assert told == ["export tiny-dense-onnx-q8: a tensor is damaged"]
    assert workers.done == [
        "export tiny-dense-onnx-q4 1",
        "export tiny-dense-onnx-q8 1",
        "export tiny-dense-onnx-fp32 1",
        "measure tiny-dense-onnx-q4 1",
        "measure tiny-dense-onnx-fp32 1",
    ]
    found = outcomes(jobs)
    assert [found[scheme].verdict for scheme in ("q4", "q8", "fp32")] == [OK, FAILED, OK]
    assert found["q8"].reasons == ("a tensor is damaged",)
    assert ended == 3


def test_a_step_whose_worker_died_is_begun_again_so_often_and_no_oftener(jobs: list[Job]) -> None:
    deaths = {"export tiny-dense-onnx-q4": 2, "measure tiny-dense-onnx-q8": 99}
    workers = Scripted(
        lambda task: (
            Ended(task=task, error="its worker died", lost=True)
            if task.job.attempt <= deaths.get(str(task), 0)
            else Ended(task=task)
        )
    )
    told, ended = run(jobs, workers)
    print("\n".join(told))
    assert workers.done.count("export tiny-dense-onnx-q4 3") == 1
    assert [line for line in workers.done if "measure tiny-dense-onnx-q8" in line] == [
        f"measure tiny-dense-onnx-q8 {attempt}" for attempt in (1, 2, 3)
    ]
    found = outcomes(jobs)
    assert [found[scheme].verdict for scheme in ("q4", "q8", "fp32")] == [OK, FAILED, OK]
    assert found["q8"].reasons == ("its worker died, 3 times",)
    assert ended == 3


def test_what_no_machine_can_do_is_not_waited_for(jobs: list[Job]) -> None:
    told, ended = run(jobs, Scripted(lambda task: Ended(task=task), refusal="needs 9 TB"))
    assert told == ["export tiny-dense-onnx-q8: needs 9 TB"]
    assert outcomes(jobs)["q8"].reasons == ("needs 9 TB",)
    assert ended == 3


def test_gates_hold_each_cell_and_a_figure_that_is_no_number_passes_none(jobs: list[Job], opened: Sweep) -> None:
    given = {"q4": {"kl": 0.02, "top1": 0.85}, "q8": {"kl": None}, "fp32": {"nbytes": 11_000_000}}
    for job in jobs:
        figures = dict(given[job.cell.scheme])
        write(Task(step=Step.EXPORT, job=job), None, nbytes=int(figures.pop("nbytes", 1000) or 0))
        assert outcomes(jobs)[job.cell.scheme].verdict == MISSING
        write(Task(step=Step.MEASURE, job=job), None, **figures)  # type: ignore[arg-type]
    found = outcomes(jobs)
    assert {one.verdict for one in found.values()} == {FELL_SHORT}
    assert found["q4"].reasons == ("KL 2.00e-02 is above 0.01", "the same top token 85.00% is below 90.00%")
    assert found["q8"].reasons == ("KL not finite is above 0.01",)
    assert found["fp32"].reasons == ("11,000,000 bytes are more than 10,000,000",)
    for job in jobs:  # the control: the same with figures that do
        write(Task(step=Step.EXPORT, job=job), None)
        write(Task(step=Step.MEASURE, job=job), None)
    report = SweepReport.of(opened.plan, opened.cells, jobs)
    assert report.passed
    assert report.summary() == "3 ok"


def test_a_damaged_record_counts_for_none(jobs: list[Job]) -> None:
    write(Task(step=Step.EXPORT, job=jobs[0]), "failed")
    assert jobs[0].exported() is not None
    jobs[0].export_record.write_text(jobs[0].export_record.read_text().replace('"nbytes"', '"bytes"'))
    assert jobs[0].exported() is None
    assert str(schedule.pending(jobs[0])) == "export tiny-dense-onnx-q4"


def test_an_encoder_is_exported_and_not_measured_and_gates_on_figures_refuse_it(tmp_path: Path) -> None:
    write_encoder(tmp_path / "encoder", "embedding")
    plan = tmp_path / "plan.yaml"
    plan.write_text("output: out\ncheckpoints: [encoder]\nschemes: [fp32]\n")
    (job,) = Sweep.open(plan, workers=1).jobs
    assert not job.measured
    assert job.is_measured()
    plan.write_text(plan.read_text() + "gates: {max_kl: 1}\n")
    with pytest.raises(CheckpointError, match=r"plan\.yaml:2: encoder-onnx-fp32: gates on max_kl .* is an encoder"):
        Sweep.open(plan, workers=1)


def test_what_only_an_open_checkpoint_shows_is_refused_before_anything_starts(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "odd", tiny_config("lfm2", hidden_size=96, head_dim=24), seed=0, dtype="F32")
    plan = tmp_path / "plan.yaml"
    plan.write_text("output: out\ncheckpoints: [odd]\nschemes: [q8]\nsettings: {group_size: 128}\n")
    with pytest.raises(QuantizationError, match=r"plan\.yaml:2: odd-onnx-q8: .*group_size"):
        Sweep.open(plan)
    assert not (tmp_path / "out").exists()
