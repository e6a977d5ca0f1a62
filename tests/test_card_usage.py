"""What an artifact's model card says of how to run it, pasted in the artifact's folder."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lfm2_export.manifest import CARD
from tests.conftest import Exported

MODULES = Path(__file__).parents[1] / "examples" / "transformers_js" / "node_modules"


def blocks(folder: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (folder / CARD).read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(folder: Path) -> list[list[str]]:
    """Those of this program, each as its words; a card installs first."""
    lines = [line for block in blocks(folder, "sh") for line in block.splitlines()]
    assert [line for line in lines if line.startswith("pip install")]
    return [shlex.split(line) for line in lines if not line.startswith("pip install")]


def pasted(folder: Path, command: Sequence[str]) -> str:
    """What it prints, in the folder."""
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    print(shlex.join(command)[:60], "→", ended.stdout[:80])
    return ended.stdout


def run_commands(folder: Path) -> None:
    found = commands(folder)
    assert found
    for program, *words in found:
        before = {"lfm2-export": [sys.executable, "-m", "lfm2_export.cli"], "python": [sys.executable]}[program]
        assert pasted(folder, [*before, *words]).strip()


def test_commands_of_a_decoders_card(artifact: Callable[[str], Path]) -> None:
    run_commands(artifact("tiny-dense"))


def test_commands_of_a_pte_card(pte_artifact: Callable[[str, str], Path]) -> None:
    run_commands(pte_artifact("tiny-dense", "8da4w"))


@pytest.mark.parametrize("kind", ["embedding"])
def test_commands_of_an_encoders_card(encoder: Callable[..., Exported], kind: str) -> None:
    run_commands(encoder(kind, ["fp32"]).artifact)


def test_python_of_a_decoders_card(artifact: Callable[[str], Path]) -> None:
    if importlib.util.find_spec("onnxruntime_genai") is None:
        pytest.skip("onnxruntime-genai is not installed")
    (block,) = blocks(artifact("tiny-dense"), "python")
    assert pasted(artifact("tiny-dense"), [sys.executable, "-c", block]).strip()


def test_javascript_of_a_decoders_card(artifact: Callable[[str], Path], tmp_path: Path) -> None:
    if shutil.which("node") is None or not (MODULES / "@huggingface" / "transformers").is_dir():
        pytest.skip("Transformers.js is not installed: cd examples/transformers_js && npm ci")
    (block,) = blocks(artifact("tiny-dense"), "js")
    folder = tmp_path / "artifact"
    folder.mkdir()
    for name in os.listdir(artifact("tiny-dense")):
        (folder / name).symlink_to(artifact("tiny-dense") / name)
    (folder / "node_modules").symlink_to(MODULES)
    (folder / "pasted.mjs").write_text(block)
    assert pasted(folder, ["node", "pasted.mjs"]).strip()
