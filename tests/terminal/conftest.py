"""Chats without a terminal: what is typed and answered is a list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from lfm2_export.chat import Chat
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.terminal.application import talk
from lfm2_export.terminal.session import Session
from lfm2_export.terminal.toolbox import Toolbox
from lfm2_export.terminal.turns import Turns
from tests.hash_runner import TOKENIZER
from tests.server.script_runner import ScriptRunner

END = TOKENIZER.token_id("<|im_end|>")


class ListedLines:
    """Lines and answers; ``asked`` are the questions."""

    def __init__(self, lines: tuple[str, ...], answers: tuple[str, ...], interactive: bool):
        self._lines, self._answers, self.interactive = iter(lines), iter(answers), interactive
        self.asked: list[str] = []

    def read(self) -> str | None:
        return next(self._lines, None)

    def ask(self, question: str) -> str | None:
        self.asked.append(question)
        return next(self._answers, None)


class Written:
    """A view that keeps what it is shown; one for all replies."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def thought(self, text: str) -> None:
        self.events.append(("thought", text))

    def said(self, text: str) -> None:
        self.events.append(("said", text))

    def finish(self) -> None:
        self.events.append(("end", ""))

    @property
    def text(self) -> str:
        return "".join("|" if kind == "end" else text for kind, text in self.events)


class Talked:
    """A session, and what came of it."""

    def __init__(self, session: Session, lines: ListedLines, written: Written, runner: ScriptRunner):
        self.session, self.lines, self.written, self.runner = session, lines, written, runner
        self.chat = session.chat

    @property
    def text(self) -> str:
        return self.written.text

    def say(self, *lines: str, answers: tuple[str, ...] = ()) -> Talked:
        self.lines._lines, self.lines._answers = iter(lines), iter(answers)
        talk(self.session)
        return self


Talk = Callable[..., Talked]


@pytest.fixture
def conversation() -> Talk:
    """``conversation(replies, ...)``: say something to it with ``say``."""

    def made(
        *replies: str,
        toolbox: Toolbox | None = None,
        context: int = 10_000,
        system: str | None = None,
        interactive: bool = True,
        forced: Any = None,
        new_tokens: int = 200,
        templates: tuple[str, ...] = (),
    ) -> Talked:
        runner = ScriptRunner(list(replies))
        runner.context_length = context
        config = GenerationConfig(stop_token_ids=(END,), max_new_tokens=new_tokens)
        tools = None if toolbox is None else toolbox.described
        chat = Chat(runner, TOKENIZER, config, system=system, tools=tools)
        lines, written = ListedLines((), (), interactive), Written()
        turns = Turns(chat=chat, lines=lines, views=lambda thinking: written, toolbox=toolbox, forced=forced)
        session = Session(chat=chat, turns=turns, lines=lines, program="onnx q4", templates=templates)
        return Talked(session, lines, written, runner)

    return made


def call_of(text: str) -> str:
    return f"<|tool_call_start|>[{text}]<|tool_call_end|>"


def adding(results: list[Mapping[str, Any]] | None = None) -> Toolbox:
    """add(a, b) runs, look_up(name) is answered by a person."""

    def add(a: float, b: float) -> float:
        if results is not None:
            results.append({"a": a, "b": b})
        if a == 13:
            raise ValueError("unlucky")
        if a == 130:
            raise KeyboardInterrupt
        return a + b

    number = {"type": "number"}
    schema = {"type": "object", "properties": {"a": number, "b": number}, "required": ["a", "b"]}
    look = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    described = [
        {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": schema}},
        {"type": "function", "function": {"name": "look_up", "parameters": look}},
    ]
    return Toolbox(described=described, functions={"add": add})
