"""``lfm2-export completion``: what a shell needs to complete this command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator

from lfm2_export import console
from lfm2_export.backends import BACKENDS
from lfm2_export.quant.schemes import SCHEMES

SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")
_SCRIPTS = ("lfm2-export", "lfm2x")
_FOLDERS = ("artifact", "artifacts", "checkpoint", "output", "what", "lora", "config_from", "speculate")
_FILES = ("models", "text", "report", "base", "write_base", "measure", "statistics", "calibrate")


class CompletionCommand:
    name = "completion"
    help = "print what a shell needs to complete commands and options (the extra `completion`)"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=f"one of: {', '.join(SHELLS)}")

    def run(self, options: argparse.Namespace) -> int:
        import shtab

        from lfm2_export.commands.parser import build_parser

        called = os.path.basename(sys.argv[0]).removesuffix(".exe")
        parser = build_parser(called if called in _SCRIPTS else _SCRIPTS[0])
        for action in _actions(parser):
            _describe(action, shtab.FILE, shtab.DIRECTORY)
        console.print_line(shtab.complete(parser, options.shell))
        return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _actions(verb)


def _describe(action: argparse.Action, file: object, folder: object) -> None:
    """What an argument may be, where the parser does not say: lists with commas are for the library to check."""
    if action.dest == "scheme":
        action.choices = list(SCHEMES)
    elif action.dest == "backend":
        action.choices = list(BACKENDS)
    elif action.dest in _FOLDERS:
        action.complete = folder  # type: ignore[attr-defined]
    elif action.dest in _FILES and action.nargs != 0:
        action.complete = file  # type: ignore[attr-defined]
