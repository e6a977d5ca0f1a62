"""One turn: a message, the reply as it comes, calls of tools with consent for each, their results, the next reply.

In: what the user says. Out: a reply on the screen and the turn in the conversation. Ctrl-C ends a reply: while it is
written, what was written stays; before, the conversation is as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from lfm2_export import console, interrupts
from lfm2_export.chat import Chat, Constrain
from lfm2_export.chat_template import Message
from lfm2_export.errors import ContextLimitError, GenerationError
from lfm2_export.replies import Called, Event, ReplyParser, Said, Thought, ToolCall, opens_thinking
from lfm2_export.terminal.lines import Lines
from lfm2_export.terminal.toolbox import Toolbox
from lfm2_export.terminal.view import Thinking, View, Views

# Of one turn; a model may call for ever.
_MOST_ROUNDS = 16
_REFUSED = "The user refused this call."

Reply = Callable[[], Iterator[str]]


@dataclass(kw_only=True)
class Turns:
    """``views`` makes the view of each reply; ``forced`` says what the first reply of a turn must be."""

    chat: Chat
    lines: Lines
    views: Views
    thinking: Thinking = Thinking.SHOW
    toolbox: Toolbox | None = None
    forced: Constrain | None = None
    _always: set[str] = field(default_factory=set)

    def send(self, content: str) -> None:
        """Raises: Lfm2ExportError, with the conversation as it was."""
        self._answer(content, lambda: self.chat.send(content, constrain=self.forced))

    def retry(self) -> None:
        """Another answer to what the user said last."""
        before = self.chat.messages
        if all(message["role"] != "user" for message in before):
            raise GenerationError("there is no message yet that could be answered again; say something")
        content = self.chat.undo()
        undone = self.chat.messages
        try:
            self.send(content)
        finally:
            if self.chat.messages == undone:  # it was refused, or stopped before it began
                self.chat.load(before)

    def _answer(self, content: str, begin: Reply) -> None:
        new: str | Sequence[Message] = content
        for _ in range(_MOST_ROUNDS):
            calls = self._reply(new, begin)
            if not calls:
                return
            new = results = [self._result(call) for call in calls]
            begin = partial(self.chat.send, results)
        console.note(f"{_MOST_ROUNDS} rounds of calls; what came last is not answered: say what to do")

    def _reply(self, new: str | Sequence[Message], begin: Reply) -> list[ToolCall]:
        """One reply; the calls that it ends with, none where it was stopped."""
        shown = _Shown(self.views(self.thinking))
        calls, started = list[ToolCall](), time.perf_counter()
        try:
            pieces = self._begin(new, begin)
        except KeyboardInterrupt:
            interrupts.forget()
            shown.view.finish()
            return []
        prefilled = time.perf_counter()
        parser = self._parser()
        try:
            for piece in pieces:
                calls += shown.take(parser.push(piece))
        except KeyboardInterrupt:
            interrupts.forget()
            pieces.close()  # type: ignore[attr-defined]
            shown.take(parser.finish())
            self._finish(shown.view, stopped=True)
            return []
        except BaseException:
            shown.view.finish()
            raise
        calls += shown.take(parser.finish())
        self._finish(shown.view, stopped=False)
        self._tell(prefilled - started, time.perf_counter() - prefilled)
        return calls

    def _finish(self, view: View, *, stopped: bool) -> None:
        view.finish()
        if stopped and self.lines.interactive:
            console.note("stopped; what was written so far stays in the conversation")

    def _parser(self) -> ReplyParser:
        tools = None if self.toolbox is None else self.toolbox.tools
        return ReplyParser(tools=tools, thinking=opens_thinking(self.chat.prompt))

    def _begin(self, new: str | Sequence[Message], begin: Reply) -> Iterator[str]:
        """Prefills; where the context is full, the user may drop the oldest turns."""
        try:
            return begin()
        except ContextLimitError:
            if not self.lines.interactive:
                raise
            console.note(
                f"the context of {self.chat.context_length} tokens has no room for this beside the conversation"
            )
            answer = self.lines.ask("drop the oldest turns, and prefill the rest again? [y/N] ")
            if answer is None or answer.strip().lower() not in ("y", "yes"):
                raise
        room = min(self.chat.config.max_new_tokens, max(1, self.chat.context_length // 4))
        count = self.chat.drop_oldest(new, room=room)
        pieces = self.chat.send(new, constrain=self.forced if isinstance(new, str) else None)
        console.note(f"oldest turns dropped: {count}; {self.chat.prefilled_tokens} tokens prefilled")
        return pieces

    def _tell(self, prefill_s: float, decode_s: float) -> None:
        chat = self.chat
        if chat.finish_reason == "length":
            console.note(f"cut at {chat.config.max_new_tokens} new tokens; /set max_new_tokens N allows more")
        if chat.finish_reason == "context":
            console.note(
                f"cut: the context of {chat.context_length} tokens is full; /undo, or the next message drops turns"
            )
        if self.lines.interactive:
            rate = chat.reply_tokens / max(decode_s, 1e-9)
            held, most = chat.held_tokens, chat.context_length
            console.note(
                f"{chat.reply_tokens} tokens at {rate:.1f} per s, {chat.prefilled_tokens} of the prompt in "
                f"{prefill_s:.2f} s; context {held} of {most} ({100 * held / most:.0f} %)"
            )

    def _result(self, call: ToolCall) -> Message:
        content = self._outcome(call)
        console.note(f"{call.name}: {content}")
        return {"role": "tool", "name": call.name, "content": content}

    def _outcome(self, call: ToolCall) -> str:
        """What the model is told."""
        assert self.toolbox is not None
        written = console.harmless(_written(call))
        if call.name not in self.toolbox.functions:
            answer = self.lines.ask(f"{written}\nits result (an empty line refuses the call): ")
            return answer if answer and answer.strip() else _REFUSED
        if call.name not in self._always:
            answer = self.lines.ask(f"{written}\nrun it? [y]es, [n]o, [a]lways {call.name}: ")
            word = (answer or "").strip().lower()
            if word in ("a", "always"):
                self._always.add(call.name)
            elif word not in ("y", "yes"):
                return _REFUSED
        else:
            console.note(written)
        try:
            return self.toolbox.run(call)
        except KeyboardInterrupt:
            interrupts.forget()
            return "Error: the user stopped this call."


class _Shown:
    """Passes a reply's events to its view."""

    def __init__(self, view: View):
        self.view = view

    def take(self, events: Iterable[Event]) -> list[ToolCall]:
        """The calls among them."""
        calls = list[ToolCall]()
        for event in events:
            match event:
                case Said(text=text):
                    self.view.said(text)
                case Thought(text=text):
                    self.view.thought(text)
                case Called(calls=called):
                    calls += called
        return calls


def _written(call: ToolCall) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
    return f"{call.name}({arguments})"
