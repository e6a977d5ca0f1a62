"""What the README says of commands and support is what the program says; its Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.readme import README, render


def test_generated_parts_are_current() -> None:
    text = README.read_text(encoding="utf-8")
    assert render(text) == text, "run `python -m tests.readme`"


def test_no_placeholder_is_left() -> None:
    assert "@@" not in README.read_text(encoding="utf-8")


def _python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_python_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Word for word, one after the other in an empty folder, as a reader would."""
    monkeypatch.chdir(tmp_path)
    blocks = _python_blocks()
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "<|im_start|>assistant" in capsys.readouterr().out
