"""A person at a terminal: keys, pasted text, Ctrl-C, drawn Markdown, history."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.terminal.terminal import Terminal

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are Unix's")

PASTED = "first\x1b[31m line\nsecond " + "y" * 6000
TOOLS = '''
def add(a: float, b: float) -> float:
    """Adds."""
    return a + b
'''
CALL = "<|tool_call_start|>[add(a=2, b=3)]<|tool_call_end|>"


def lines_of(path: Path) -> list[str]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_typing_pasting_stopping_and_leaving(tmp_path: Path) -> None:
    script = {"replies": ["# Head\n\nSome *text* <b>as</b> it is.", "word " * 60, "Last."], "pause": 0.02}
    saved = tmp_path / "talk.json"
    with Terminal(script, home=tmp_path) as terminal:
        terminal.wait("> ")
        terminal.type("hallo\x1b[D\x1b[D\x1b[D\x1b[D\x7f\x1b[C")  # the cursor goes left, deletes an h, goes right
        terminal.type("\x01h\x05 \\\rtwo\x1b\rthree\r")
        answer = terminal.wait("context ")
        terminal.wait("> ")
        assert "Head" in answer
        assert "Some text <b>as</b> it is." in answer
        assert "per s" in answer
        terminal.type(f"\x1b[200~{PASTED}\x1b[201~")
        terminal.wait("y" * 50)
        terminal.type("\r")
        terminal.wait("word word word")
        terminal.type("\x03")
        terminal.wait("stopped; what was written so far stays")
        terminal.wait("> ")
        terminal.type("half a line\x03")
        terminal.wait("Ctrl-C once more, or Ctrl-D, leaves")
        terminal.wait("> ")
        terminal.type("//slash\r")
        terminal.wait("Last.")
        terminal.wait("context ")
        terminal.wait("> ")
        terminal.type(f"/save {saved}\r")
        terminal.wait("6 messages saved")
        terminal.wait("> ")
        terminal.type("\x03")
        terminal.wait("leaves")
        terminal.wait("> ")
        terminal.type("\x03")
        terminal.wait("leave the conversation? [y/N]")
        terminal.type("n\r")
        terminal.wait("> ")
        terminal.type("\x03")
        terminal.wait("leaves")
        terminal.wait("> ")
        terminal.type("\x03")
        terminal.wait("leave the conversation?")
        terminal.type("y\r")
        assert terminal.ended() == 0
        drawn = terminal.drawn()
    messages = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    said = [message["content"] for message in messages]
    assert said[0] == "hallo \ntwo\nthree"
    assert said[2] == PASTED.replace("\x1b[31m", ""), "whole, and without its colour"
    assert said[3].startswith("word word word")
    assert len(said[3]) < len("word " * 60)
    assert said[4:] == ["/slash", "Last."]
    assert b"\x1b[?25h" in drawn[drawn.rindex(b"\x1b[?25l") :], "the cursor is shown again"
    history = tmp_path / "lfm2-export" / "chat_history"
    assert lines_of(history)[:2] == [said[0], said[2]]
    with Terminal(script, "--no-history", "--no-markdown", home=tmp_path) as terminal:
        terminal.wait("> ")
        terminal.type("not kept\r")
        assert "# Head" in terminal.wait("context ")
        terminal.wait("> ")
        terminal.type("\x04")
        assert terminal.ended() == 0
    assert "not kept" not in lines_of(history)


def test_tools_and_hidden_thinking(tmp_path: Path) -> None:
    (tools := tmp_path / "tools.py").write_text(TOOLS, encoding="utf-8")
    script = {"replies": [f"<think>Secret.</think>{CALL}", "So 5."], "pause": 0.01}
    with Terminal(script, "--tools", str(tools), "--thinking", "hide", home=tmp_path) as terminal:
        terminal.wait("> ")
        terminal.type("2 + 3?\r")
        shown = terminal.wait("run it? [y]es, [n]o, [a]lways add: ")
        assert "add(a=2, b=3)" in shown
        assert "thought for" in shown
        terminal.type("y\r")
        assert "add: 5" in (shown + terminal.wait("So 5."))
        terminal.wait("context ")
        terminal.wait("> ")
        terminal.type("\x04")
        assert terminal.ended() == 0
        assert b"Secret" not in terminal.drawn()


def test_a_terminal_that_cannot_move_its_cursor_has_plain_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal({"replies": ["*Yes*.", "No."]}, home=tmp_path)
    terminal._environment["TERM"] = "dumb"
    with terminal:
        terminal.wait("> ")
        terminal.type("go\x1b[D\r")
        assert "*Yes*." in terminal.wait("context ")
        terminal.wait("> ")
        terminal.type("/undo\r")
        terminal.wait("forgotten: 'go'")
        terminal.wait("> ")
        terminal.type("\x04")
        assert terminal.ended() == 0
