"""The page of every command and option. In: the argument parser. Out: Markdown."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from lfm2_export.commands.examples import EXAMPLES
from lfm2_export.commands.parser import PROGRAM, CommandLine

_HEAD = """# Commands

What `lfm2-export COMMAND --help` says. Every command also takes `--verbose`.
Exit codes and habits: [On the command line](../command_line.md).
"""


def page() -> str:
    """Every command with what it takes."""
    line = CommandLine()
    help_of = _help_of(line.parser)
    parts = [_HEAD, *(_section(name, help_of[name], parser) for name, parser in line.verbs.items())]
    return "\n".join(parts)


def _help_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    verbs = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {choice.dest: choice.help or "" for choice in verbs._choices_actions}


def _section(name: str, said: str, parser: argparse.ArgumentParser) -> str:
    lines = [f"## {name}", "", _sentence(_cell(said)), "", "```text"]
    lines += [f"{PROGRAM} {example}" for example in EXAMPLES[name]]
    lines += ["```", "", "| Argument | What it does |", "|---|---|"]
    lines += [f"| {_names(action)} | {_what(action)} |" for action in own_arguments(parser)]
    return "\n".join([*lines, ""])


def own_arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Without the options that every command takes."""
    for action in parser._actions:
        if not {"--help", "--verbose"} & set(action.option_strings):
            yield action


def _names(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    if not action.option_strings:
        return f"`{value}`"
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    return f"{names} `{value}`" if value else names


def _what(action: argparse.Action) -> str:
    """Its help, with what argparse puts in; and that it must be there, where it is an option that must."""
    said = (action.help or "") % (vars(action) | {"prog": PROGRAM})
    required = bool(action.option_strings) and action.required
    return _cell(said) + ("; must be given" if required else "")


def _cell(text: str) -> str:
    """As the text of a table's cell: neither a column's end nor markup."""
    for sign in "\\|*_<[":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
