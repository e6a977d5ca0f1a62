"""The arguments of the whole command line, every verb's included."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from lfm2_export import streams
from lfm2_export.commands import COMMANDS
from lfm2_export.commands.examples import EXAMPLES, FIRST_STEPS
from lfm2_export.spelling import did_you_mean

PROGRAM = "lfm2-export"
_EXIT_CODES = """exit codes: 0 done; 1 a check fell short; 2 the input or the request was wrong; 3 the machine could not
do it (memory, disk); 70 a bug of this program; 128 and the number of the signal that stopped it (Ctrl-C: 130)"""
_VERBOSE = "also tell what is being done, and what an error's line has no room for"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error of this program, and what was probably meant."""

    def error(self, message: str) -> NoReturn:
        streams.error_line(f"{message}; see `{self.prog} --help`")
        raise SystemExit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = list(map(str, action.choices))
        raise argparse.ArgumentError(
            action, f"there is no {str(value)!r}{did_you_mean(str(value), choices)}; it may be: {', '.join(choices)}"
        )

    def refuse_left_over(self, words: Sequence[str]) -> NoReturn:
        """Says which arguments there are not, with the option that the first was meant to be."""
        known = [name for action in self._actions for name in action.option_strings]
        first = words[0].partition("=")[0]
        hint = did_you_mean(first, known) if first.startswith("-") else ""
        self.error(f"unrecognized arguments: {' '.join([words[0] + hint, *words[1:]])}")


class CommandLine:
    """The parser of every verb together. ``--verbose`` is taken before the verb and after it."""

    def __init__(self, program: str = PROGRAM) -> None:
        self.parser = _Parser(
            prog=program,
            description="Export LiquidAI's LFM2 and LFM2-MoE checkpoints to quantized programs, prove and run them.",
            epilog=_epilog(FIRST_STEPS, _EXIT_CODES),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.parser.add_argument("--version", action="store_true", help="our version and that of every runtime found")
        self.parser.add_argument("--verbose", action="store_true", help=_VERBOSE)
        verbs = self.parser.add_subparsers(dest="verb", metavar="COMMAND", parser_class=_Parser)
        self.verbs: dict[str, _Parser] = {}
        for command in COMMANDS:
            added = verbs.add_parser(
                command.name,
                help=command.help,
                description=command.help,
                epilog=_epilog(EXAMPLES[command.name]),
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            command.add_arguments(added)
            # Without a default of its own, which would undo the one before the verb.
            added.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help=_VERBOSE)
            added.set_defaults(run=command.run)
            self.verbs[command.name] = added

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """What was asked for.

        Raises:
            SystemExit: it cannot be, which has been said, or help was asked for and printed.
        """
        options, left = self.parser.parse_known_args(arguments)
        parser = self.verbs.get(options.verb, self.parser)
        if left and not _took_words(parser, options, left):
            parser.refuse_left_over(left)
        options.print_help = self.parser.print_help
        return options


def _took_words(parser: argparse.ArgumentParser, options: argparse.Namespace, words: Sequence[str]) -> bool:
    """Whether words that argparse left over are an optional last argument that has none yet: it takes those before the
    first option only, so that the prompt of ``run DIR -n 8 PROMPT`` would be lost. After ``--`` they may begin with a
    dash."""
    end = words.index("--") if "--" in words else len(words)
    if any(word.startswith("-") for word in words[:end]):
        return False
    words = [*words[:end], *words[end + 1 :]]
    for action in parser._actions:
        if action.nargs == "*" and not action.option_strings and not getattr(options, action.dest):
            setattr(options, action.dest, list(words))
            return True
    return False


def _epilog(examples: Iterable[str], rest: str = "") -> str:
    lines = "\n".join(f"  {PROGRAM} {example}" for example in examples)
    return f"examples:\n{lines}" + (f"\n\n{rest}" if rest else "")


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """For what lists the options of every verb: the page of commands, completion."""
    return CommandLine(program).parser
