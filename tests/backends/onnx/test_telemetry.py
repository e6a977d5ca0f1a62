"""onnxruntime's telemetry is off unless the user has decided otherwise: no file of it is found after a run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

VARIABLE = "ORT_DISABLE_TELEMETRY"
RUN = ("-m", "lfm2_export.cli", "run", "DIR", "--kernels", "stock", "--prompt", "a", "--max-new-tokens", "2")
LOAD = ("-c", "import sys, lfm2_export; lfm2_export.load_runner(sys.argv[1], kernels='stock').prefill([[1]])", "DIR")
MODEL = (
    "-c",
    "import sys; from lfm2_export import ExportedModelForCausalLM as Model;"
    "Model.from_pretrained(sys.argv[1], scheme='fp32').runner.prefill([[1]])",
    "DIR",
)


def left_by(command: tuple[str, ...], folder: Path, place: Path, **variables: str) -> list[str]:
    """The files that a process makes in its user's home, cache and folder for temporary files, without our own."""
    homes = {name: place / name for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "TMPDIR")}
    for home in homes.values():
        home.mkdir()
    # And nothing else: where CI is set, for instance, onnxruntime collects nothing, whatever it is told.
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment = {**kept, **{name: str(home) for name, home in homes.items()}, **variables}
    arguments = [str(folder) if argument == "DIR" else argument for argument in command]
    subprocess.run([sys.executable, *arguments], env=environment, check=True, capture_output=True, timeout=120)
    found = (path.relative_to(place) for path in place.rglob("*") if not path.is_dir())
    return sorted(str(path) for path in found if "lfm2-export" not in path.parts)


@pytest.mark.parametrize("command", [RUN, LOAD, MODEL], ids=["run", "load_runner", "transformers"])
def test_nothing_is_left_after_a_run(command: tuple[str, ...], artifact: Callable[[str], Path], tmp_path: Path) -> None:
    assert left_by(command, artifact("tiny-moe"), tmp_path) == []


def test_a_user_who_wants_it_has_it(artifact: Callable[[str], Path], tmp_path: Path) -> None:
    """And the control of the test above: this is what it would find."""
    found = left_by(RUN, artifact("tiny-moe"), tmp_path, **{VARIABLE: "0"})
    print(found)
    if not found and not sys.platform.startswith("linux"):
        pytest.skip("this build of onnxruntime has no telemetry, or keeps it elsewhere")
    assert any(name.endswith("deviceid") for name in found)


IMPORTED = """
import os, onnxruntime
told = []
onnxruntime.disable_telemetry_events = lambda: told.append(True)
import lfm2_export.backends.onnx
print(len(told), os.environ["ORT_DISABLE_TELEMETRY"])
"""


@pytest.mark.parametrize(("given", "told"), [(None, "1 1"), ("0", "0 0"), ("1", "0 1")])
def test_an_onnxruntime_that_is_there_already_is_told(given: str | None, told: str, tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment = {**kept, "XDG_CACHE_HOME": str(tmp_path), **({} if given is None else {VARIABLE: given})}
    done = subprocess.run([sys.executable, "-c", IMPORTED], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == told
