"""The command line: one subcommand per verb; each parses, calls the library, prints.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 a check fell short, 2 the input or the
request was wrong (one line, no traceback), 3 the machine could not do it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from lfm2_export import console
from lfm2_export.commands import COMMANDS, version_text
from lfm2_export.errors import Lfm2ExportError, ResourceError

# Packages of the extras; a command that lacks one says which extra to install.
_EXTRAS = {
    "export": ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "huggingface_hub"),
    "executorch": ("executorch", "torchao"),
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error of this program."""

    def error(self, message: str) -> NoReturn:
        console.error(f"{message}; see `{self.prog} --help`")
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lfm2-export",
        description="Export LiquidAI's LFM2 and LFM2-MoE checkpoints to quantized programs, prove and run them.",
    )
    parser.add_argument("--version", action="store_true", help="our version and that of every runtime found")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", parser_class=_Parser)
    for command in COMMANDS:
        added = verbs.add_parser(command.name, help=command.help, description=command.help)
        command.add_arguments(added)
        added.set_defaults(run=command.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    # A terminated export must clean up like a failed one.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # torch's threads beside a runtime's own: those that wait must not take the cores from those that work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.version:
        print(version_text())
        return 0
    if options.verb is None:
        parser.print_help(sys.stderr)
        return 2
    return _guarded(options)


def _guarded(options: argparse.Namespace) -> int:
    try:
        return options.run(options)
    except Lfm2ExportError as error:
        console.error(str(error))
        return error.exit_code
    except ModuleNotFoundError as error:
        return _missing_extra(options.verb, error)
    except MemoryError:
        console.error(f"{options.verb}: the machine ran out of memory; close other programs or use a larger one")
        return ResourceError.exit_code
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        return 130


def _missing_extra(verb: str, error: ModuleNotFoundError) -> int:
    package = (error.name or "").partition(".")[0]
    for extra, packages in _EXTRAS.items():
        if package in packages:
            console.error(f"{verb} needs {package}, which is not installed; pip install 'lfm2-export[{extra}]'")
            return 2
    raise error


if __name__ == "__main__":
    sys.exit(main())
