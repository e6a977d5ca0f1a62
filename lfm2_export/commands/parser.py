"""The arguments of the whole command line, every verb's included."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lfm2_export import streams
from lfm2_export.commands import COMMANDS

_EXIT_CODES = """exit codes: 0 done; 1 a check fell short; 2 the input or the request was wrong; 3 the machine could not
do it (memory, disk); 70 a bug of this program; 128 and the number of the signal that stopped it (Ctrl-C: 130)"""
_VERBOSE = "also tell what is being done, and what an error's line has no room for"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error of this program."""

    def error(self, message: str) -> NoReturn:
        streams.error_line(f"{message}; see `{self.prog} --help`")
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    """``--verbose`` is taken before the verb and after it."""
    parser = _Parser(
        prog="lfm2-export",
        description="Export LiquidAI's LFM2 and LFM2-MoE checkpoints to quantized programs, prove and run them.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument("--version", action="store_true", help="our version and that of every runtime found")
    parser.add_argument("--verbose", action="store_true", help=_VERBOSE)
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", parser_class=_Parser)
    for command in COMMANDS:
        added = verbs.add_parser(command.name, help=command.help, description=command.help)
        command.add_arguments(added)
        # Without a default of its own, which would undo the one before the verb.
        added.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help=_VERBOSE)
        added.set_defaults(run=command.run)
    return parser
