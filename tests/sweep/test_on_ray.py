"""Sweeps on a Ray of two workers: what they make, what is done again, and what a killed worker leaves.

One Ray for all of it, since its start takes seconds; the bundled checkpoints, one .pte among them.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from lfm2_export import Artifact
from lfm2_export.errors import ConfigError, Lfm2ExportError
from lfm2_export.progress import Progress
from lfm2_export.sweep import Sweep, SweepReport, page
from lfm2_export.sweep.jobs import program_files
from tests.checkpoints import tiny_config, write_random_checkpoint

ray = pytest.importorskip("ray", reason="the extra [sweep] is not installed")
from lfm2_export.sweep import on_ray  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")

PLAN = """\
output: out
checkpoints:
  - tiny-dense
  - tiny-moe
  - broken
backends: [onnx, executorch]
schemes: [q4, q8, 8da4w]
impossible: skip
settings: {algorithm: round, max_context: 512}
gates: {max_kl: 0.5}
cells:
  - {checkpoint: tiny-dense, scheme: q8, gates: {max_kl: 1e-9}}
  - {checkpoint: tiny-moe, scheme: q8, skip: true}
  - {checkpoint: tiny-moe, backend: executorch, skip: true}
  - {checkpoint: broken, backend: executorch, skip: true}
  - {checkpoint: broken, scheme: q8, skip: true}
quality: {max_tokens: 256}
threads: 1
"""
MADE = {"tiny-dense-onnx-q4", "tiny-dense-onnx-q8", "tiny-dense-executorch-8da4w", "tiny-moe-onnx-q4"}
SMALL = """\
output: out
checkpoints: [tiny-dense]
schemes: [q8, fp32]
settings: {algorithm: round}
quality: false
threads: 1
"""


@pytest.fixture(scope="module")
def workers() -> Iterator[on_ray.RayWorkers]:
    with on_ray.local(workers=2, threads=1) as found:
        yield found


@dataclass(frozen=True, kw_only=True)
class Swept:
    plan: Path
    report: SweepReport
    told: tuple[str, ...]


@pytest.fixture(scope="module")
def swept(workers: on_ray.RayWorkers, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """The whole plan, undisturbed. Leave it unchanged."""
    folder = tmp_path_factory.mktemp("sweep")
    write_random_checkpoint(folder / "broken", tiny_config("lfm2"), seed=0, dtype="F32")
    spoil(folder / "broken")
    (folder / "plan.yaml").write_text(PLAN)
    told: list[str] = []
    report = Sweep.open(folder / "plan.yaml").run(progress=Progress(told=told.append))
    return Swept(plan=folder / "plan.yaml", report=report, told=tuple(told))


def spoil(checkpoint: Path) -> None:
    """Makes some weights no numbers, which is found out when they are read."""
    path = next(checkpoint.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-400:] = np.full(100, np.nan, np.float32).tobytes()
    path.write_bytes(data)


def changed(swept: Swept, folder: Path, old: str, new: str) -> Sweep:
    """The plan with a change, in a copy of its folder with all that was made."""
    shutil.copytree(swept.plan.parent, folder, dirs_exist_ok=True)
    assert old in PLAN
    (folder / "plan.yaml").write_text(PLAN.replace(old, new))
    return Sweep.open(folder / "plan.yaml")


def verdicts(report: SweepReport) -> dict[str, str]:
    return {one.cell.name: one.verdict for one in report.outcomes if one.verdict != "skipped"}


def test_a_cell_that_fails_stops_no_other_and_a_gate_falls_short(swept: Swept) -> None:
    print(*swept.report.rows(), sep="\n")
    assert verdicts(swept.report) == {
        "tiny-dense-onnx-q4": "ok",
        "tiny-dense-onnx-q8": "FELL SHORT",
        "tiny-dense-executorch-8da4w": "ok",
        "tiny-moe-onnx-q4": "ok",
        "broken-onnx-q4": "failed",
    }
    assert not swept.report.passed
    (line,) = swept.told
    (broken,) = [one for one in swept.report.outcomes if one.verdict == "failed"]
    assert line == f"export broken-onnx-q4: {broken.reasons[0]}"
    assert "100 of 6144 values are not finite" in line
    assert not broken.cell.folder.exists()


def test_the_report_has_what_quality_measures(swept: Swept) -> None:
    found = {one.cell.name: one for one in swept.report.outcomes}
    for name in MADE:
        artifact, one = Artifact.open(found[name].cell.folder), found[name]
        assert one.nbytes == sum(e.bytes for p in artifact.programs for e in p.files.values())
        assert one.figures is not None
        assert 1e-6 < (one.kl or 0) < 0.5
    q4, q8 = (found[f"tiny-dense-onnx-{scheme}"] for scheme in ("q4", "q8"))
    assert (q4.kl or 0) > 2 * (q8.kl or 0)
    assert swept.report.frontier("tiny-dense")[-1] == "tiny-dense-onnx-q8"
    output = swept.plan.parent / "out"
    assert json.loads((output / "sweep.json").read_text())["failed"] == 1
    html = (output / "sweep.html").read_text()
    assert html == page.render(swept.report)
    assert html.count("<svg") == 2  # of two checkpoints there are figures
    for text in ("FELL SHORT", "values are not finite", "onnx-q4", "polyline"):
        assert text in html
    assert "http" not in html


def test_a_second_sweep_does_only_what_failed(swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [str(task) for task in Sweep.open(swept.plan).pending()] == ["export broken-onnx-q4"]
    shutil.copytree(swept.plan.parent, tmp_path, dirs_exist_ok=True)
    rest = "".join(line for line in PLAN.splitlines(keepends=True) if "broken" not in line)
    (tmp_path / "plan.yaml").write_text(rest)
    records = list((tmp_path / "out" / "records").iterdir())
    before = {path: path.stat().st_mtime_ns for path in records}
    monkeypatch.setattr(on_ray, "local", None)  # so that starting Ray would raise
    report = Sweep.open(tmp_path / "plan.yaml").run()
    assert set(verdicts(report)) == MADE
    assert {path: path.stat().st_mtime_ns for path in records} == before
    assert len(before) == 2 * len(MADE) + 1


def test_what_changed_is_done_again_and_nothing_else(swept: Swept, workers: on_ray.RayWorkers, tmp_path: Path) -> None:
    rule = "{checkpoint: tiny-dense, scheme: q8, "
    opened = changed(swept, tmp_path, rule, f"{rule}settings: {{group_size: 64}}, ")
    assert [str(task) for task in opened.pending()] == ["export tiny-dense-onnx-q8", "export broken-onnx-q4"]
    report = opened.run()
    for old, new in zip(swept.report.outcomes, report.outcomes, strict=True):
        assert (old.figures == new.figures) == (new.cell.name != "tiny-dense-onnx-q8")
    program = Artifact.open(tmp_path / "out" / "cells" / "tiny-dense-onnx-q8").program()
    assert program.options["formats"]["linear"]["group_size"] == 64

    # Other tokens: measured anew, not exported; another gate: nothing to do at all.
    words = {"export broken-onnx-q4", *(f"measure {name}" for name in MADE)}
    plan = (tmp_path / "plan.yaml").read_text()
    (tmp_path / "plan.yaml").write_text(plan.replace("256", "128"))
    assert {str(task) for task in Sweep.open(tmp_path / "plan.yaml").pending()} == words
    (tmp_path / "plan.yaml").write_text(plan.replace("0.5", "0.4"))
    assert [str(task) for task in Sweep.open(tmp_path / "plan.yaml").pending()] == ["export broken-onnx-q4"]

    # An artifact that was damaged or deleted is made again.
    data = next((tmp_path / "out" / "cells" / "tiny-dense-onnx-q8" / "onnx").glob("*_data"))
    stored = data.read_bytes()
    data.write_bytes(stored[:-1] + bytes([stored[-1] ^ 1]))
    shutil.rmtree(tmp_path / "out" / "cells" / "tiny-dense-onnx-q4")
    assert [str(task) for task in Sweep.open(tmp_path / "plan.yaml").pending()] == [
        "export tiny-dense-onnx-q4",
        "export tiny-dense-onnx-q8",
        "export broken-onnx-q4",
    ]


def until(found: Callable[[], Any], seconds: float = 600) -> Any:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if (value := found()) is not None:
            return value
        time.sleep(0.02)
    raise TimeoutError


def exporting(name: str) -> psutil.Process | None:
    """The worker that has begun to write a cell."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if f"export {name}" in " ".join(process.cmdline()):
                return process
    return None


def test_a_killed_worker_changes_nothing_of_the_result(
    swept: Swept, workers: on_ray.RayWorkers, tmp_path: Path
) -> None:
    (tmp_path / "plan.yaml").write_text(SMALL)
    told: list[str] = []
    opened = Sweep.open(tmp_path / "plan.yaml")
    unfinished = tmp_path / "out" / "cells" / ".tiny-dense-onnx-q8.lfm2-export.partial"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(opened.run, progress=Progress(told=told.append))
        until(lambda: unfinished if unfinished.exists() else None)
        until(lambda: exporting("tiny-dense-onnx-q8")).send_signal(signal.SIGKILL)
        report = running.result(timeout=600)
    print(told)
    assert told == [
        "export tiny-dense-onnx-q8: its worker died (WorkerCrashedError); begun again (2 of 3)",
    ]
    assert verdicts(report) == {"tiny-dense-onnx-q8": "ok", "tiny-dense-onnx-fp32": "ok"}
    assert [one.attempts for one in report.outcomes] == [2, 1]
    there = swept.plan.parent / "out" / "cells"
    again = program_files(Artifact.open(tmp_path / "out" / "cells" / "tiny-dense-onnx-q8"))
    assert again == program_files(Artifact.open(there / "tiny-dense-onnx-q8"))
    assert again != program_files(Artifact.open(there / "tiny-dense-onnx-q4"))
    left = [path.name for path in (tmp_path / "out" / "cells").iterdir()]
    assert sorted(left) == ["tiny-dense-onnx-fp32", "tiny-dense-onnx-q8"]


def test_ray_listens_to_this_machine_alone(workers: on_ray.RayWorkers) -> None:
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_a_cluster_that_is_not_there_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(SMALL)
    with pytest.raises(ConfigError, match="Ray's client is not used"), on_ray.cluster("ray://127.0.0.1:1"):
        pass
    with pytest.raises(Lfm2ExportError, match="--workers is for this machine"):
        Sweep.open(tmp_path / "plan.yaml", address="auto", workers=2)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(SMALL)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("")
    with pytest.raises(ConfigError, match=r"plan\.yaml:1: output .* holds something else \(diary\.txt"):
        Sweep.open(tmp_path / "plan.yaml")
