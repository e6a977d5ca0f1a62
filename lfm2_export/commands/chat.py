"""``lfm2-export chat``: a conversation with an artifact."""

from __future__ import annotations

import argparse
from functools import partial

from lfm2_export import console, states
from lfm2_export.chat import Chat, Constrain
from lfm2_export.commands.base import add_artifact, add_machine, given
from lfm2_export.commands.speculate import add_speculation
from lfm2_export.commands.talk import (
    STDIN_LIMIT,
    Opened,
    add_generation,
    note_speculation,
    open_for_text,
    reading,
    standard_input,
)
from lfm2_export.constraints import Grammars
from lfm2_export.errors import ConfigError, GenerationError
from lfm2_export.forced_calls import forced_calls
from lfm2_export.messages import listed, shown
from lfm2_export.terminal.application import edited_lines, is_full_terminal, talk, views
from lfm2_export.terminal.lines import Lines, PlainLines
from lfm2_export.terminal.session import Session
from lfm2_export.terminal.toolbox import Toolbox, open_toolbox
from lfm2_export.terminal.turns import Turns
from lfm2_export.terminal.view import Thinking
from lfm2_export.text import check_text

_REQUIRED = "required"


class ChatCommand:
    name = "chat"
    help = "talk to an artifact; the conversation's state is kept between turns"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_artifact(parser)
        add_generation(parser)
        _add_conversation(parser)
        add_speculation(parser)
        add_machine(parser)

    def run(self, options: argparse.Namespace) -> int:
        toolbox = _checked(options)
        opened = open_for_text(options)
        if not opened.tokenizer.has_chat_template:
            raise GenerationError(f"{options.artifact}: has no chat template; use `lfm2-export run --raw`")
        session = _session(options, opened, toolbox)
        if options.load_state is not None:
            session.chat.load_state(options.load_state)
        session.set_thinking(Thinking(options.thinking))
        console.note(f"{opened.program}   /help lists commands   Ctrl-C stops an answer   /exit or Ctrl-D leaves")
        code = talk(session)
        if options.save_state is not None:
            session.chat.save_state(options.save_state)
            console.note(f"the state after {session.chat.held_tokens} tokens is saved")
        note_speculation(opened)
        return code


def _add_conversation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--thinking",
        choices=[str(one) for one in Thinking],
        default=str(Thinking.SHOW),
        help="what is done with a model's thinking; off asks the chat template for none, where it can (default: show)",
    )
    parser.add_argument(
        "--tools",
        metavar="FILE.json|module.py",
        type=given,
        help="what the model may call: OpenAI's list, whose results you type, or a Python file of yours, which is "
        "imported and whose functions run when you agree to a call",
    )
    parser.add_argument(
        "--tool-choice",
        metavar="required|NAME",
        type=given,
        help="the first reply of each turn must be a call of any tool, or of this one (default: the model decides)",
    )
    parser.add_argument(
        "--save-state",
        metavar="FILE",
        type=given,
        help="at the end, write the conversation and its state to FILE, to go on in milliseconds with --load-state",
    )
    parser.add_argument("--load-state", metavar="FILE", type=given, help="go on from what --save-state wrote")
    parser.add_argument("--no-history", action="store_true", help="do not keep what is typed for the next time")
    parser.add_argument("--no-markdown", action="store_true", help="show answers as they are on a terminal, too")


def _checked(options: argparse.Namespace) -> Toolbox | None:
    """What can be said before a program is loaded; the tools."""
    check_text(options.system or "", "--system")
    if options.load_state is not None and options.system is not None:
        raise ConfigError("--load-state: has the system message that it was saved with; leave --system out")
    if options.save_state is not None:
        states.check_target(options.save_state)
    toolbox = None if options.tools is None else open_toolbox(options.tools)
    choice = options.tool_choice
    if choice is not None and toolbox is None:
        raise ConfigError(f"--tool-choice {shown(choice, 40)}: there is no tool to choose; give --tools")
    if toolbox is not None and choice not in (None, _REQUIRED, *toolbox.tools.names):
        raise ConfigError(
            f"--tool-choice {shown(choice, 40)}: is neither {_REQUIRED} nor one of {listed(toolbox.tools.names)}"
        )
    return toolbox


def _session(options: argparse.Namespace, opened: Opened, toolbox: Toolbox | None) -> Session:
    chat = Chat(
        opened.runner,
        opened.tokenizer,
        opened.config,
        system=options.system,
        tools=None if toolbox is None else toolbox.described,
        # The markers tell where a call is.
        skip_special_tokens=options.skip_special_tokens and toolbox is None,
    )
    lines, is_full = _lines(options), is_full_terminal()
    turns = Turns(
        chat=chat,
        lines=lines,
        views=views(markdown=is_full and not options.no_markdown),
        toolbox=toolbox,
        forced=_forced(opened, toolbox, options.tool_choice),
    )
    templates = tuple(opened.tokenizer.chat_templates.values())
    return Session(chat=chat, turns=turns, lines=lines, program=str(opened.program), templates=templates)


def _lines(options: argparse.Namespace) -> Lines:
    stdin = standard_input()
    plain = PlainLines(_reading_line, is_terminal=stdin.isatty())
    return edited_lines(plain, keeps_history=not options.no_history) if is_full_terminal() else plain


def _reading_line() -> str:
    line = reading(lambda: standard_input().readline(STDIN_LIMIT + 1))
    if len(line) > STDIN_LIMIT:
        raise GenerationError(f"standard input: a line has more than {STDIN_LIMIT:,} characters; send shorter ones")
    return line


def _forced(opened: Opened, toolbox: Toolbox | None, choice: str | None) -> Constrain | None:
    if toolbox is None or choice is None:
        return None
    grammars = Grammars(opened.tokenizer, opened.runner.vocab_size, opened.config.stop_token_ids)
    name = "" if choice == _REQUIRED else choice
    constrain = partial(forced_calls, grammars, opened.tokenizer, toolbox.tools, name=name)
    constrain("")  # what cannot be forced is said before anything is typed
    return constrain
