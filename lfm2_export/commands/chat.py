"""``lfm2-export chat``: a conversation with an artifact."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

from lfm2_export import console, interrupts
from lfm2_export.chat import Chat
from lfm2_export.commands.base import add_artifact, add_machine
from lfm2_export.commands.talk import (
    STDIN_LIMIT,
    add_generation,
    add_speculation,
    note_speculation,
    open_for_text,
    reading,
    standard_input,
)
from lfm2_export.errors import GenerationError, Lfm2ExportError
from lfm2_export.streams import OutputError
from lfm2_export.text import check_text

_CHAT_HELP = "/again: another reply   /reset: forget everything   /exit or Ctrl-D: leave   Ctrl-C: stop a reply"


class ChatCommand:
    name = "chat"
    help = "talk to an artifact; the conversation's state is kept between turns"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_artifact(parser)
        add_generation(parser)
        add_speculation(parser)
        add_machine(parser)

    def run(self, options: argparse.Namespace) -> int:
        check_text(options.system or "", "--system")
        opened = open_for_text(options)
        if not opened.tokenizer.has_chat_template:
            raise GenerationError(f"{options.artifact}: has no chat template; use `lfm2-export run --raw`")
        chat = Chat(
            opened.runner,
            opened.tokenizer,
            opened.config,
            system=options.system,
            skip_special_tokens=options.skip_special_tokens,
        )
        console.note(f"{opened.program}   {_CHAT_HELP}")
        while (line := _read_line()) is not None:
            if not _answer(chat, line.strip()):
                break
        note_speculation(opened)
        return 0


def _read_line() -> str | None:
    """What was typed, None at the end."""
    stdin = standard_input()
    if stdin.isatty():
        console.stream("> ")
    try:
        line = reading(lambda: stdin.readline(STDIN_LIMIT + 1))
    except KeyboardInterrupt:
        interrupts.forget()
        return None
    if len(line) > STDIN_LIMIT:
        raise GenerationError(f"standard input: a line has more than {STDIN_LIMIT:,} characters; send shorter ones")
    return line or None


def _answer(chat: Chat, line: str) -> bool:
    """One turn; False to leave. A turn that fails is told and does not end the conversation."""
    if line in ("/exit", "/quit"):
        return False
    try:
        if line == "/reset":
            chat.clear()
        elif line.startswith("/") and line != "/again":
            console.note(_CHAT_HELP)
        elif line:
            check_text(line, "your message")
            _print_reply(chat.regenerate if line == "/again" else lambda: chat.send(line))
    except OutputError:
        raise
    except Lfm2ExportError as error:
        console.error(str(error))
    return True


def _print_reply(reply: Callable[[], Iterator[str]]) -> None:
    """Ctrl-C ends it: while it is written, what was written stays; before, the conversation is as it was."""
    pieces = None
    try:
        pieces = reply()
        for piece in pieces:
            console.stream(piece)
    except KeyboardInterrupt:
        interrupts.forget()
        if pieces is not None:
            pieces.close()  # type: ignore[attr-defined]
    console.stream("\n")
