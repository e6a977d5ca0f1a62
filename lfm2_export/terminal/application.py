"""The loop of a chat: a line, what it asks for, the next line.

In: a session. Out: nothing; it ends with the lines, with ``/exit`` or when the user leaves. What fails in a turn is
told, and does not end the conversation.
"""

from __future__ import annotations

import os
import sys

from lfm2_export import console, interrupts
from lfm2_export.errors import Lfm2ExportError
from lfm2_export.streams import OutputError
from lfm2_export.terminal.commands import Leave, command_names, is_command, message_of, run_command
from lfm2_export.terminal.history import TypedHistory, default_path
from lfm2_export.terminal.lines import Lines, PlainLines
from lfm2_export.terminal.session import Session
from lfm2_export.terminal.view import PlainView, TerminalView, Views
from lfm2_export.text import check_text


def talk(session: Session) -> int:
    """The exit code: of lines that no person types, that of the last error.

    Raises:
        OutputError, ReaderGone: nobody can read the answers.
    """
    code = 0
    while (line := _next(session)) is not None:
        try:
            _take(session, line)
        except Leave:
            break
        except OutputError:
            raise
        except Lfm2ExportError as error:
            console.error(str(error))
            code = 0 if session.lines.interactive else error.exit_code
        except KeyboardInterrupt:  # of a command; replies have their own
            if not session.lines.interactive:
                raise
            interrupts.forget()
    return code


def _next(session: Session) -> str | None:
    """A Ctrl-C of a person before the prompt is there is one at the prompt: it is drawn again."""
    while True:
        try:
            return session.lines.read()
        except KeyboardInterrupt:
            if not session.lines.interactive:
                raise
            interrupts.forget()


def _take(session: Session, line: str) -> None:
    if is_command(line):
        run_command(session, line)
    elif text := message_of(line):
        check_text(text, "your message")
        session.turns.send(text)


def is_full_terminal() -> bool:
    """Whether lines can be edited and answers drawn: a person at both ends, at a terminal that can move its cursor."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "") not in ("dumb", "")


def edited_lines(plain: PlainLines, *, keeps_history: bool) -> Lines:
    """Lines with editing; ``plain`` where prompt_toolkit is not installed, which is said."""
    try:
        from lfm2_export.terminal.editor import EditedLines
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "prompt_toolkit":
            raise
        console.note("prompt_toolkit is not installed: lines cannot be edited; pip install prompt_toolkit")
        return plain
    return EditedLines(TypedHistory(default_path() if keeps_history else None), command_names())


def views(*, markdown: bool) -> Views:
    return TerminalView if markdown else PlainView
