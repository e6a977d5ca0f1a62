"""The chat's commands: lines that begin with a "/".

In: a line. Out: what it asks for, done. A text that begins with a "/" is sent as ``//text``, or behind a space.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lfm2_export import console
from lfm2_export.errors import GenerationError
from lfm2_export.messages import listed, shown
from lfm2_export.terminal import conversations
from lfm2_export.terminal.session import Session
from lfm2_export.terminal.view import Thinking
from lfm2_export.text import check_text

_SETTINGS: dict[str, Callable[[str], float | int]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
    "max_new_tokens": int,
}
_THINKING = "thinking"


@dataclass(frozen=True, kw_only=True)
class Command:
    """``usage`` is its name with what may follow; ``run`` is given that."""

    usage: str
    help: str
    run: Callable[[Session, str], None]
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.usage.partition(" ")[0], *self.aliases)


def is_command(line: str) -> bool:
    return line.startswith("/") and not line.startswith("//")


def message_of(line: str) -> str:
    """What a line that is no command says."""
    text = line.strip()
    return text[1:] if line.startswith("//") else text


def run_command(session: Session, line: str) -> None:
    """Raises: GenerationError: there is no such command, or it cannot be done; Leave: it was to leave."""
    name, _, argument = line.strip().partition(" ")
    command = _BY_NAME.get(name)
    if command is None:
        close = difflib.get_close_matches(name[1:], [known[1:] for known in _BY_NAME], 1)
        meant = f"did you mean /{close[0]}? " if close else ""
        raise GenerationError(f"{name}: is no command; {meant}/help lists them, and /{name} sends it as text")
    command.run(session, argument.strip())


def command_names() -> list[str]:
    return list(_BY_NAME)


class Leave(Exception):
    """The user asked to leave."""


def _help(session: Session, argument: str) -> None:
    width = max(len(command.usage) for command in COMMANDS)
    for command in COMMANDS:
        also = f" (also {', '.join(command.aliases)})" if command.aliases else ""
        console.note(f"{command.usage:<{width}}  {command.help}{also}")
    console.note("//text sends a text that begins with /   Ctrl-C stops an answer   Ctrl-D leaves")
    if session.lines.interactive:
        console.note("Alt-Enter, or \\ before Enter, begins another line")


def _set(session: Session, argument: str) -> None:
    name, _, value = argument.partition(" ")
    name = name.replace("-", "_")
    if not name:
        config = session.chat.config
        told = ", ".join(f"{one} {getattr(config, one)}" for one in _SETTINGS)
        console.note(f"{told}, {_THINKING} {session.turns.thinking}; {'greedy' if config.greedy else 'sampling'}")
    elif name == _THINKING:
        session.set_thinking(_thinking(value.strip()))
    else:
        _override(session, name, value.strip())


def _thinking(value: str) -> Thinking:
    try:
        return Thinking(value)
    except ValueError:
        raise GenerationError(f"/set thinking {shown(value, 40)}: give one of {', '.join(Thinking)}") from None


def _override(session: Session, name: str, value: str) -> None:
    if name not in _SETTINGS:
        close = difflib.get_close_matches(name, (*_SETTINGS, _THINKING), 1)
        meant = f"did you mean {close[0]}?" if close else f"there are {listed((*_SETTINGS, _THINKING))}"
        raise GenerationError(f"/set {shown(name, 40)}: is no setting; {meant}")
    try:
        number = _SETTINGS[name](value)
    except (ValueError, OverflowError):
        raise GenerationError(f"/set {name} {shown(value, 40)}: give a number") from None
    config = session.chat.config
    sampling = {"do_sample": config.do_sample} if name in ("seed", "max_new_tokens", "repetition_penalty") else {}
    session.chat.config = config.override(**{name: number}, **sampling)  # type: ignore[arg-type]


def _system(session: Session, argument: str) -> None:
    if argument:
        check_text(argument, "/system")
        session.chat.system = None if argument == '""' else argument
        console.note("the system message is set; the next message prefills the conversation again")
    else:
        console.note(session.chat.system or "there is no system message; /system TEXT sets one")


def _save(session: Session, argument: str) -> None:
    path = _file("/save", argument)
    conversations.save(path, session.chat.messages, session.program)
    console.note(f"{len(session.chat.messages)} messages saved")


def _load(session: Session, argument: str) -> None:
    session.chat.load(conversations.load(_file("/load", argument), session.templates))
    count = len(session.chat.messages)
    console.note(f"{count} messages loaded; the next one prefills {session.chat.count()} tokens and itself")


def _save_state(session: Session, argument: str) -> None:
    session.chat.save_state(_file("/save-state", argument))
    console.note(f"the state after {session.chat.held_tokens} tokens is saved")


def _load_state(session: Session, argument: str) -> None:
    session.chat.load_state(_file("/load-state", argument))
    console.note(f"{len(session.chat.messages)} messages, {session.chat.held_tokens} tokens")


def _file(name: str, argument: str) -> Path:
    if not argument:
        raise GenerationError(f"{name}: names no file; give one")
    try:
        return Path(argument).expanduser()
    except (RuntimeError, ValueError):
        raise GenerationError(
            f"{name} {shown(argument, 60)}: there is no such home folder; give a whole path"
        ) from None


def _undo(session: Session, argument: str) -> None:
    console.note(f"forgotten: {shown(session.chat.undo(), 60)} and what came after it")


def _tokens(session: Session, argument: str) -> None:
    chat = session.chat
    count = chat.count()
    console.note(
        f"the conversation has {count} tokens of {chat.context_length} ({100 * count / chat.context_length:.0f} %); "
        f"the last turn prefilled {chat.prefilled_tokens}, its reply had {chat.reply_tokens}"
    )


def _tools(session: Session, argument: str) -> None:
    toolbox = session.turns.toolbox
    if toolbox is None:
        console.note("there are no tools; start with --tools FILE.json or module.py")
        return
    for tool in toolbox.described:
        console.note(f"{tool['function']['name']}: {shown(tool['function'].get('description', ''), 100)[1:-1]}")


def _leave(session: Session, argument: str) -> None:
    raise Leave


COMMANDS = (
    Command(usage="/help", help="this list", run=_help, aliases=("/?",)),
    Command(usage="/set [NAME VALUE]", help="settings: temperature, seed, max_new_tokens, thinking, ...", run=_set),
    Command(usage="/system [TEXT]", help='the system message; "" removes it', run=_system),
    Command(usage="/retry", help="another answer", run=lambda session, _: session.turns.retry(), aliases=("/again",)),
    Command(usage="/undo", help="forget the last message and its answer", run=_undo),
    Command(
        usage="/reset",
        help="forget everything but the system message",
        run=lambda s, _: s.chat.clear(),
        aliases=("/clear",),
    ),
    Command(usage="/tokens", help="how much of the context is used", run=_tokens),
    Command(usage="/tools", help="what the model may call", run=_tools),
    Command(usage="/save FILE", help="the messages, as JSON", run=_save),
    Command(usage="/load FILE", help="go on with messages from JSON", run=_load),
    Command(usage="/save-state FILE", help="messages and state, to go on without a prefill", run=_save_state),
    Command(usage="/load-state FILE", help="go on with a state", run=_load_state),
    Command(usage="/exit", help="leave", run=_leave, aliases=("/quit", "/bye")),
)
_BY_NAME = {name: command for command in COMMANDS for name in command.names}
