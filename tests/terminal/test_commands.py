"""What each command does, and lines that are no command."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from lfm2_export.terminal.commands import COMMANDS, is_command, message_of
from lfm2_export.terminal.view import Thinking
from tests.terminal.conftest import Talk, adding


def users(talked: object) -> list[str]:
    return [m["content"] for m in talked.chat.messages if m["role"] == "user"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("line", "said"),
    [("//etc/passwd", "/etc/passwd"), (" /etc", "/etc"), ("a /b", "a /b"), ("///", "//"), (" a ", "a"), ("/x", None)],
)
def test_a_text_that_begins_with_a_slash_can_be_sent(conversation: Talk, line: str, said: str | None) -> None:
    assert is_command(line) == (said is None)
    if said is not None:
        assert message_of(line) == said
        assert users(conversation("yes").say(line)) == [said]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/undoo", "/undoo: is no command; did you mean /undo? /help lists them, and //undoo sends it as text"),
        ("/xyzzy", "/xyzzy: is no command; /help lists them, and //xyzzy sends it as text"),
        ("/etc/passwd", "is no command"),
        ("/set tempature 1", "/set 'tempature': is no setting; did you mean temperature?"),
        ("/set zzz 1", "is no setting; there are "),
        ("/set temperature warm", "/set temperature 'warm': give a number"),
        ("/set top_p 7", "top_p"),
        ("/set thinking maybe", "/set thinking 'maybe': give one of show, hide, off"),
        ("/undo", "there is no user message yet"),
        ("/retry", "there is no message yet that could be answered again"),
        ("/save", "/save: names no file"),
        ("/save-state", "/save-state: names no file"),
        ("/load none.json", "none.json: no such file"),
        ("/load-state none", "none: no such file; make it with --save-state"),
        ("/save ~nobody-here/x.json", "/save '~nobody-here/x.json': there is no such home folder; give a whole path"),
        ("/load ~nobody-here/x.json", "there is no such home folder"),
        ("/save-state ~nobody-here/x", "there is no such home folder"),
        ("/load-state ~nobody-here/x", "there is no such home folder"),
        ("/save ~\0/x", "there is no such home folder"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_conversation_goes_on(
    conversation: Talk,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    talked = conversation("yes").say(line, "go")
    assert told in capsys.readouterr().err
    assert talked.text == "yes|"


def test_help_lists_every_command(conversation: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    conversation().say("/help")
    err = capsys.readouterr().err
    for command in COMMANDS:
        assert command.usage in err
        assert command.help in err
    names = [name for command in COMMANDS for name in command.names]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["/exit", "/quit", "/bye"])
def test_leaving(conversation: Talk, name: str) -> None:
    assert conversation("yes", "no").say("go", name, "more").text == "yes|"


def test_undo_retry_and_reset(conversation: Talk) -> None:
    talked = conversation("a", "b", system="Brief.").say("one", "two", "/undo")
    assert users(talked) == ["one"]
    talked.say("/retry")
    assert (users(talked), talked.chat.prefilled_tokens) == (["one"], 0)
    talked.say("/reset")
    assert [m["role"] for m in talked.chat.messages] == ["system"]


def test_retry_begins_the_whole_turn_again(conversation: Talk) -> None:
    call = "<|tool_call_start|>[look_up(name='x')]<|tool_call_end|>"
    talked = conversation(call, "Yes.", toolbox=adding())
    talked.say("one", "/again", answers=("A", "B"))
    assert [m["content"] for m in talked.chat.messages] == ["one", call, "B", "Yes."]


def test_settings(conversation: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    talked = conversation().say("/set max-new-tokens 7", "/set seed 3", "/set repetition_penalty 1.1")
    config = talked.chat.config
    assert (config.max_new_tokens, config.seed, config.repetition_penalty, config.greedy) == (7, 3, 1.1, True)
    talked.say("/set temperature 0.5", "/set thinking hide", "/set")
    assert (talked.chat.config.temperature, talked.chat.config.greedy) == (0.5, False)
    assert talked.session.turns.thinking is Thinking.HIDE
    err = capsys.readouterr().err
    assert "temperature 0.5" in err
    assert "thinking hide; sampling" in err


def test_the_system_message(conversation: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    talked = conversation("a", "b").say("/system", "one", "/system Be brief.", "two", "/system")
    assert [m["role"] for m in talked.chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    err = capsys.readouterr().err
    assert "there is no system message" in err
    assert "Be brief." in err
    talked.say('/system ""')
    assert talked.chat.system is None
    assert talked.chat.messages[0]["role"] == "user"


def test_tokens_and_tools(conversation: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    talked = conversation("a", toolbox=adding()).say("one", "/tokens", "/tools")
    err = capsys.readouterr().err
    assert f"the conversation has {talked.chat.count()} tokens of 10000" in err
    assert talked.chat.count() - talked.chat.held_tokens == 2, "the end of the reply's message"
    assert "add: Adds." in err
    conversation().say("/tools")
    assert "there are no tools" in capsys.readouterr().err


def test_save_and_load(conversation: Talk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my talk.json"
    talked = conversation("a", "b", system="Brief.").say("one", f"/save {path}", "two", f"/save {path}")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert (saved["format"], saved["program"]) == ("lfm2-export chat", "onnx q4")
    other = conversation("x", "y", "c").say(f"/load {path}", "three")
    assert other.chat.messages[:-2] == talked.chat.messages == saved["messages"]
    assert (other.chat.system, other.text) == ("Brief.", "c|")
    assert "5 messages loaded" in capsys.readouterr().err
    (notes := tmp_path / "notes.json").write_text('{"mine": 1}', encoding="utf-8")
    talked.say(f"/save {notes}", f"/load {notes}")
    err = capsys.readouterr().err
    assert "is there already and no saved conversation" in err
    assert "holds no messages" in err
    assert notes.read_text(encoding="utf-8") == '{"mine": 1}'


def test_openai_messages_with_calls_are_loaded(conversation: Talk, tmp_path: Path) -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "one"}]},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    (path := tmp_path / "a.json").write_text(json.dumps(messages), encoding="utf-8")
    talked = conversation("x", "y").say(f"/load {path}", "two")
    assert talked.chat.messages[1]["content"] == "<|tool_call_start|>[f(a=1)]<|tool_call_end|>"
    assert talked.text == "y|"
    for wrong in ([{"role": "robot", "content": "a"}], ["a"], [{"role": "user", "content": 5}]):
        path.write_text(json.dumps(wrong), encoding="utf-8")
        before = talked.chat.messages
        talked.say(f"/load {path}")
        assert talked.chat.messages == before
