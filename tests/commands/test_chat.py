"""``chat`` on an artifact, line by line: what is saved is gone on from; options that make no sense."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lfm2_export import cli

Say = Callable[..., tuple[int, str, str]]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], artifact: Callable[[str], Path]) -> Say:
    """``say(text, *arguments)``: exit code, stdout, stderr."""

    def run(text: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
        common = (
            "--scheme",
            "q4",
            "--kernels",
            "stock",
            "--threads",
            "1",
            "--max-new-tokens",
            "5",
            "--temperature",
            "0",
        )
        code = cli.main(["chat", str(artifact("tiny-dense")), *common, *arguments])
        return code, *capsys.readouterr()

    return run


def test_a_conversation_is_left_and_gone_on_with(say: Say, tmp_path: Path) -> None:
    path = str(tmp_path / "a.state")
    _, whole, _ = say("One\nTwo\nThree\n", "--system", "Be brief.")
    code, first, err = say("One\nTwo\n", "--system", "Be brief.", "--save-state", path)
    assert (code, whole.startswith(first)) == (0, True)
    assert "tokens is saved" in err
    code, rest, err = say("Three\n/tokens\n", "--load-state", path)
    assert (code, first + rest) == (0, whole)
    prefilled = int(err.split("the last turn prefilled ")[1].split(",")[0])
    assert 0 < prefilled < 16
    code, out, err = say("", "--load-state", path, "--scheme", "fp32")
    assert (code, out) == (2, "")
    assert "is a state of onnx/q4@" in err
    assert len(err.splitlines()) == 1


def test_a_system_message_alone_is_saved_without_a_conversation(say: Say, tmp_path: Path) -> None:
    path = str(tmp_path / "a.state")
    assert say("", "--system", "Be brief.", "--save-state", path)[:2] == (0, "")
    _, whole, _ = say("One\n", "--system", "Be brief.")
    assert say("One\n", "--load-state", path)[1] == whole


def test_a_tool_is_called_through_a_pipe_with_its_consent_on_the_next_line(say: Say, tmp_path: Path) -> None:
    (tools := tmp_path / "tools.json").write_text(json.dumps(TOOLS), encoding="utf-8")
    options = ("--tools", str(tools), "--tool-choice", "f", "--max-new-tokens", "12")
    code, out, err = say("Go\nthe result\n/save talk.json\n".replace("talk", str(tmp_path / "talk")), *options)
    messages = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert code == 0
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["content"] == "<|tool_call_start|>[f()]<|tool_call_end|>"
    assert messages[2]["content"] == "the result"
    assert "its result (an empty line refuses the call)" in err
    assert messages[3]["content"] in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--tools", "none.json"), "none.json: no such file; pass --tools FILE.json or --tools module.py"),
        (("--tool-choice", "required"), "--tool-choice 'required': there is no tool to choose; give --tools"),
        (("--tools", "tools.json", "--tool-choice", "g"), "--tool-choice 'g': is neither required nor one of f"),
        (("--load-state", "none"), "none: no such file; make it with --save-state none"),
        (("--load-state", "a", "--system", "b"), "--load-state: has the system message that it was saved with"),
        (("--save-state", "tools.json"), "tools.json: is there already and no saved state"),
        (("--save-state", "no/such"), "no/such: there is no folder"),
        (("--thinking", "maybe"), "--thinking"),
        (("--tools", ""), "--tools"),
    ],
)
def test_options_that_make_no_sense_are_one_line(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tools.json").write_text(json.dumps(TOOLS), encoding="utf-8")
    code, out, err = say("Hello\n", *arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert len(err.splitlines()) == 1
    assert [path.name for path in Path().iterdir()] == ["tools.json"]
