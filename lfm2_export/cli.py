"""The command line: one subcommand per verb; each parses, calls the library, prints.

Results go to stdout, progress and errors to stderr. A command that fails leaves one line there, no traceback, and an
exit code (``commands/parser.py`` lists them). Nothing heavy is imported before streams and signals are in order, so
that a Ctrl-C while Python loads torch ends a command like any other.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lfm2_export import interrupts, memory, packages, streams
from lfm2_export.errors import Lfm2ExportError, ResourceError

if TYPE_CHECKING:
    import argparse

# Of a bug: neither a check that fell short, nor the user's mistake, nor the machine's (sysexits.h: EX_SOFTWARE).
BUG = 70
_ARGUMENT = re.compile(r"([a-z_]+)=")
# numpy's linear algebra ends the process where it cannot map this much for itself and each of its threads: with two
# cores 150 MB were too little and 200 enough.
_LEAST_MEMORY, _LEAST_MEMORY_PER_CORE = 96 << 20, 32 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code.

    Without ``arguments`` they are those of this process, whose streams and signals then belong to the command until it
    ends; otherwise both are given back.
    """
    return _whole(lambda: _parsed(arguments), own=arguments is None)


def call(options: argparse.Namespace) -> int:
    """Runs a command whose arguments the command line of another program has parsed, as ``main`` runs one in a process
    of its own; ``options.run`` is the command's, ``options.verb`` what its errors call it."""
    return _whole(lambda: options, own=True)


def _whole(parse: Callable[[], argparse.Namespace], *, own: bool) -> int:
    with streams.prepared(own=own):
        try:
            with interrupts.raising(for_good=own):
                code = _flushed(_run(parse))
                if own:
                    interrupts.leave_with(code)
        except (KeyboardInterrupt, interrupts.Terminated) as error:
            code = interrupts.exit_code(error)
            streams.error_line(f"stopped by {interrupts.cause(error)}")
            if own:
                interrupts.leave_with(code)
        return code


def _run(parse: Callable[[], argparse.Namespace]) -> int:
    options = None
    try:
        options = parse()
        interrupts.check()
        return _called(options)
    except interrupts.Terminated:
        raise
    except SystemExit as asked:  # of argparse
        return asked.code if isinstance(asked.code, int) else 0
    except Exception as error:
        interrupts.check()  # what was half imported fails later, in other words
        return _failed(error, options)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Imports what the verbs need at once, so this is what takes a third of a second."""
    _check_memory()
    # torch's threads beside a runtime's own: those that wait must not take the cores from those that work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from lfm2_export.commands.parser import CommandLine

    return CommandLine().parse(arguments)


def _check_memory() -> None:
    left, needed = memory.address_space_left(), _LEAST_MEMORY + _LEAST_MEMORY_PER_CORE * (os.cpu_count() or 1)
    if left is not None and left < needed:
        raise ResourceError(
            f"this program needs {needed >> 20} MB of memory to begin with, {left >> 20} MB are left under the limit "
            "of this process; raise it (ulimit -v)"
        )


def _called(options: argparse.Namespace) -> int:
    from lfm2_export import console
    from lfm2_export.commands import version_text

    if getattr(options, "version", False):
        streams.deliver(f"{version_text()}\n")
        return 0
    if options.verb is None:
        options.print_help(sys.stderr)
        return 2
    with console.logging_to_stderr(verbose=options.verbose):
        return options.run(options)


def _failed(error: Exception, options: argparse.Namespace | None) -> int:
    """Says what went wrong; returns the exit code."""
    verb = (options and options.verb) or "lfm2-export"
    verbose = bool(options and options.verbose)
    if isinstance(error, streams.ReaderGone):
        return 0
    if isinstance(error, Lfm2ExportError):
        streams.error_line(_with_options(str(error), options))
        if verbose:
            streams.details(error.details)
        return error.exit_code
    if memory.ran_out(error):
        streams.error_line(f"{verb}: the machine ran out of memory; close other programs or use a larger one")
        return ResourceError.exit_code
    if (lacking := packages.missing(error, verb)) is not None:
        streams.error_line(str(lacking))
        return lacking.exit_code
    return _bug(error, verb, verbose)


def _with_options(message: str, options: argparse.Namespace | None) -> str:
    """``message`` with the arguments of Python's functions that it begins with, ``group_size=33``, as the options that
    the user gave."""
    found = _ARGUMENT.match(message)
    if found is None or getattr(options, found[1], None) is None:
        return message
    return f"--{found[1].replace('_', '-')} {message[found.end() :]}"


def _bug(error: Exception, verb: str, verbose: bool) -> int:
    streams.error_line(
        f"{verb}: internal error ({type(error).__name__}: {error}); this is a bug: report it with what --verbose prints"
    )
    if verbose:
        import traceback

        streams.details("".join(traceback.format_exception(error)).splitlines())
    return BUG


def _flushed(code: int) -> int:
    """What argparse or a library has printed may only now turn out not to fit on the disk."""
    try:
        streams.deliver("")
    except streams.ReaderGone:
        return code
    except ResourceError as error:
        streams.error_line(str(error))
        return code or error.exit_code
    finally:
        streams.tell("")
    return code


if __name__ == "__main__":
    sys.exit(main())
