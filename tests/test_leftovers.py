"""An export leaves nothing in the folder for temporary files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lfm2_export.leftovers import swept
from tests.checkpoints import tiny_config, write_random_checkpoint


def test_an_export_leaves_no_folder_of_torchs(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", tiny_config("lfm2"), seed=1)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    kept = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    command = [
        sys.executable,
        "-m",
        "lfm2_export.cli",
        "export",
        checkpoint,
        "--scheme",
        "fp32",
        "-o",
        tmp_path / "out",
    ]
    done = subprocess.run(command, env={**kept, "TMPDIR": str(temporary)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(temporary.iterdir()) == []


def test_what_torch_really_keeps_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime import cache_dir_utils

    folder = tmp_path / "torchinductor_somebody"
    monkeypatch.setattr(cache_dir_utils, "default_cache_dir", lambda: str(folder))
    with swept():
        folder.mkdir()
    assert not folder.exists()
    with swept():
        folder.mkdir()
        (folder / "compiled").write_text("kernel")
    assert (folder / "compiled").read_text() == "kernel"
