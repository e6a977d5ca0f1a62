"""What a chat does without prompt_toolkit, and what is completed with it."""

from __future__ import annotations

import sys

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from lfm2_export.terminal.application import edited_lines
from lfm2_export.terminal.commands import command_names
from lfm2_export.terminal.editor import _Commands
from lfm2_export.terminal.lines import PlainLines


def test_without_prompt_toolkit_lines_are_plain_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "lfm2_export.terminal.editor")
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    plain = PlainLines(lambda: "", is_terminal=True)
    assert edited_lines(plain, keeps_history=False) is plain
    assert "pip install prompt_toolkit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "names"),
    [("/un", ["/undo"]), ("/load", ["/load", "/load-state"]), ("/load a", []), ("un", []), ("//un", [])],
)
def test_commands_are_completed(text: str, names: list[str]) -> None:
    found = _Commands(command_names()).get_completions(Document(text), CompleteEvent())
    assert [completion.text for completion in found] == names


@pytest.mark.parametrize(("line", "cut"), [("a" * 4095, True), ("a" * 4000 + "\n", False)])
def test_a_line_that_a_terminal_has_cut_is_told(capsys: pytest.CaptureFixture[str], line: str, cut: bool) -> None:
    lines = PlainLines(iter([line, ""]).__next__, is_terminal=True)
    assert lines.read() == line.strip()
    assert ("this terminal cuts lines at 4095 bytes" in capsys.readouterr().err) == cut
    assert lines.read() is None
