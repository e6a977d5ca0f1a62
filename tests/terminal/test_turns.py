"""One turn: replies, calls with consent, Ctrl-C, a full context, thinking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from lfm2_export.constraints import Grammars
from lfm2_export.forced_calls import forced_calls
from lfm2_export.terminal.view import Thinking
from tests.hash_runner import TOKENIZER
from tests.terminal.conftest import END, Talk, adding, call_of


def roles(talked: Any) -> list[str]:
    return [message["role"] for message in talked.chat.messages]


@pytest.mark.parametrize(
    ("answers", "ran", "told"),
    [(("y",), 1, "5"), (("yes",), 1, "5"), (("n",), 0, "refused"), (("",), 0, "refused"), ((), 0, "refused")],
)
def test_a_call_runs_with_consent_alone(conversation: Talk, answers: tuple[str, ...], ran: int, told: str) -> None:
    made = list[Mapping[str, Any]]()
    talked = conversation(f"Wait. {call_of('add(a=2, b=3)')}", "So it is.", toolbox=adding(made))
    talked.say("what is it?", answers=answers)
    assert talked.text == "Wait. |So it is.|"
    assert talked.lines.asked == ["add(a=2, b=3)\nrun it? [y]es, [n]o, [a]lways add: "]
    assert len(made) == ran
    assert roles(talked) == ["user", "assistant", "tool", "assistant"]
    assert told in talked.chat.messages[2]["content"]
    assert talked.chat.messages[1]["content"] == f"Wait. {call_of('add(a=2, b=3)')}", "as the model wrote it"


def test_always_asks_no_more_for_this_tool(conversation: Talk) -> None:
    calls = call_of("add(a=1, b=1), add(a=2, b=2), look_up(name='x')")
    talked = conversation(calls, "Good.", call_of("add(a=3, b=3)"), "Fine.", toolbox=adding())
    talked.say("one", "two", answers=("always", "a thing"))
    assert [question.partition("\n")[0] for question in talked.lines.asked] == ["add(a=1, b=1)", "look_up(name='x')"]
    assert [m["content"] for m in talked.chat.messages if m["role"] == "tool"] == ["2", "4", "a thing", "6"]
    assert talked.text == "|Good.||Fine.|"


def test_a_result_that_a_person_types_may_be_refused(conversation: Talk) -> None:
    talked = conversation(call_of("look_up(name='x')"), "Pity.", toolbox=adding())
    talked.say("one", answers=("  ",))
    assert talked.chat.messages[2] == {"role": "tool", "name": "look_up", "content": "The user refused this call."}


@pytest.mark.parametrize(
    ("number", "told"), [(13, "Error: ValueError: unlucky"), (130, "Error: the user stopped this call.")]
)
def test_a_tool_that_fails_tells_the_model(conversation: Talk, number: int, told: str) -> None:
    talked = conversation(call_of(f"add(a={number}, b=3)"), "Pity.", toolbox=adding())
    talked.say("one", answers=("y",))
    assert talked.chat.messages[2]["content"] == told
    assert talked.text.endswith("Pity.|")


@pytest.mark.parametrize("bad", ["add(a='two', b=3)", "none()", "add(a=", "add(a=1)"])
def test_a_malformed_call_is_text_and_the_conversation_goes_on(conversation: Talk, bad: str) -> None:
    talked = conversation(call_of(bad), "Yes.", toolbox=adding()).say("one", "two")
    assert talked.text == f"{call_of(bad)}|Yes.|"
    assert roles(talked) == ["user", "assistant"] * 2
    assert talked.lines.asked == []


def test_a_model_that_calls_for_ever_is_stopped(conversation: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    talked = conversation(*[call_of("add(a=1, b=1)")] * 40, toolbox=adding())
    talked.say("one", answers=("a",))
    assert roles(talked).count("assistant") == 16
    assert "16 rounds of calls" in capsys.readouterr().err


def test_a_forced_call_is_made_once_a_turn(conversation: Talk) -> None:
    grammars, toolbox = Grammars(TOKENIZER, TOKENIZER.vocab_size, (END,)), adding()

    def forced(prompt: str) -> Any:
        return forced_calls(grammars, TOKENIZER, toolbox.tools, prompt, name="add")

    first = conversation(call_of("add(a=2, b=3)"), "I will not.", toolbox=toolbox, forced=forced)
    first.say("one", answers=("y",))
    assert first.text == "|I will not.|", "its answer to the result is free"
    unwilling = conversation("No.", "No.", toolbox=toolbox, forced=forced, new_tokens=60)
    unwilling.say("one", answers=())
    assert "No." not in unwilling.text.split("|")[0]
    assert unwilling.chat.messages[1]["content"].startswith("<|tool_call_start|>[add(")


def test_ctrl_c_keeps_what_was_written(
    conversation: Talk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talked = conversation("one two three four five", "next")
    decode = talked.runner.decode
    steps = iter(range(100))

    def interrupted(tokens: Any) -> Any:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return decode(tokens)

    monkeypatch.setattr(talked.runner, "decode", interrupted)
    talked.say("go", "on")
    cut, rest, _ = talked.text.split("|")
    assert cut
    assert "one two three four five".startswith(cut)
    assert (talked.chat.messages[1], rest) == ({"role": "assistant", "content": cut}, "next")
    assert "stopped; what was written so far stays" in capsys.readouterr().err


def test_a_full_context_is_told_and_the_oldest_turns_may_go(
    conversation: Talk, capsys: pytest.CaptureFixture[str]
) -> None:
    talked = conversation(*["word word word"] * 9, context=76, system="Brief.", new_tokens=12)
    talked.say("one", "two", "three")
    assert talked.lines.asked == []
    before = len(talked.chat.messages)
    talked.say("a longer one this time", answers=("n",))
    assert len(talked.lines.asked) == 1
    assert len(talked.chat.messages) == before, "as it was"
    assert "no room" in (err := capsys.readouterr().err)
    assert "tokens do not fit the context limit of 76" in err
    talked.say("a longer one this time", answers=("y",))
    assert [m["content"] for m in talked.chat.messages if m["role"] == "user"] == [
        "two",
        "three",
        "a longer one this time",
    ]
    assert talked.chat.system == talked.chat.messages[0]["content"] == "Brief."
    assert f"oldest turns dropped: 1; {talked.chat.prefilled_tokens} tokens prefilled" in capsys.readouterr().err
    assert talked.chat.prefilled_tokens > 20
    talked.say("word " * 90, answers=("y",))
    assert "do not fit the context of 76 alone" in capsys.readouterr().err


def test_a_retry_that_finds_no_room_takes_its_message_along_once(
    conversation: Talk, capsys: pytest.CaptureFixture[str]
) -> None:
    talked = conversation(*["word word word"] * 9, context=76, new_tokens=12).say("one", "two", "three")
    before = talked.chat.messages
    talked.chat.system = "word " * 24
    talked.say("/retry", answers=("n",))
    assert talked.chat.messages[1:] == before, "as it was"
    talked.say("/retry", answers=("y",))
    assert [m["content"] for m in talked.chat.messages if m["role"] == "user"] == ["two", "three"]


def test_nobody_is_asked_through_a_pipe(conversation: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    talked = conversation("word", context=20, interactive=False).say("word " * 30)
    assert talked.lines.asked == []
    assert "do not fit the context limit of 20" in capsys.readouterr().err


def test_a_cut_answer_is_told(conversation: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    conversation("word " * 30, new_tokens=5).say("go")
    assert "cut at 5 new tokens; /set max_new_tokens N allows more" in capsys.readouterr().err
    conversation("word " * 30, context=24).say("go")
    assert "cut: the context of 24 tokens is full" in capsys.readouterr().err
    conversation("word").say("go")
    err = capsys.readouterr().err
    assert "cut" not in err
    assert "per s, " in err
    assert "; context 1" in err


def test_thinking_is_told_apart(conversation: Talk) -> None:
    talked = conversation("<think>\nHm.</think>\n\nYes.").say("go")
    said = "".join(text for kind, text in talked.written.events if kind == "said")
    thought = "".join(text for kind, text in talked.written.events if kind == "thought")
    assert (thought, said) == ("Hm.", "Yes.")
    assert talked.chat.messages[1]["content"] == "<think>\nHm.</think>\n\nYes.", "the template decides what is kept"


def test_thinking_is_switched_off_where_the_template_can(
    conversation: Talk, capsys: pytest.CaptureFixture[str]
) -> None:
    able = conversation("a", templates=("{{ enable_thinking }}",))
    able.session.set_thinking(Thinking.OFF)
    assert able.chat.variables == {"enable_thinking": False}
    assert capsys.readouterr().err == ""
    able.session.set_thinking(Thinking.SHOW)
    assert able.chat.variables == {}
    unable = conversation("a", templates=("{{ messages }}",))
    unable.session.set_thinking(Thinking.OFF)
    assert unable.chat.variables == {}
    assert "is hidden, not switched off" in capsys.readouterr().err
