"""``python -m platform_wheels linux PURE_WHEEL --into dist`` compiles the library for Linux and makes the wheels.

``carry`` takes a library that was compiled otherwise, for systems whose compilers are not here; ``check`` proves one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lfm2_export.errors import Lfm2ExportError
from platform_wheels import linux
from platform_wheels.check import check
from platform_wheels.repack import Platform, repack


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        for made in options.make(options):
            print(made)
    except Lfm2ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m platform_wheels", description="wheels with a compiled library")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    compiled = verbs.add_parser("linux", help="compile for Linux; the tag follows from the glibc that is needed")
    compiled.add_argument("--machine", action="append", choices=linux.MACHINES, help="default: all of them")
    compiled.add_argument("--work", type=Path, default=Path("build/platform_wheels"), help="what is compiled")
    compiled.set_defaults(make=_linux)
    carried = verbs.add_parser("carry", help="take a library that is there")
    carried.add_argument("--library", type=Path, required=True)
    carried.add_argument("--tag", required=True, help="as in the wheel's name: macosx_11_0_arm64, win_amd64")
    carried.add_argument("--system", required=True, help="sys.platform there")
    carried.add_argument("--machine", required=True, help="platform.machine() there")
    carried.set_defaults(make=_carry)
    for verb in (compiled, carried):
        verb.add_argument("wheel", type=Path, help="the pure wheel")
        verb.add_argument("--into", type=Path, default=Path("dist"))
    checked = verbs.add_parser("check", help="install one in a new environment and run it without a compiler")
    checked.add_argument("wheel", type=Path, help="the platform wheel, for this machine")
    checked.add_argument("artifact", type=Path, help="an artifact with a q4 or q8 program")
    checked.set_defaults(make=_check)
    return parser


def _linux(options: argparse.Namespace) -> list[Path]:
    machines = options.machine or linux.MACHINES
    return [linux.make_wheel(options.wheel, name, options.into, options.work / name) for name in machines]


def _carry(options: argparse.Namespace) -> list[Path]:
    platform = Platform(tag=options.tag, system=options.system, machine=options.machine)
    return [repack(options.wheel, options.library, platform, options.into)]


def _check(options: argparse.Namespace) -> list[str]:
    return [f"{name}: {value}" for name, value in check(options.wheel, options.artifact).items()]


if __name__ == "__main__":
    sys.exit(main())
