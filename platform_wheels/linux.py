"""Compiles the operator library for Linux so that it needs nothing but glibc.

In: the kernels' sources, a machine; CMake and GCC, for another machine than this one its cross compiler. Out: a library
and the tag that it earns.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from lfm2_export.errors import Lfm2ExportError
from lfm2_export.kernels import build
from platform_wheels.elf import manylinux_tag
from platform_wheels.repack import Platform, extract_sources, repack

MACHINES = ("x86_64", "aarch64")
# libstdc++ inside, for ourselves: the host program may have its own. Not libgcc: its unwinder is written for the glibc
# that it was built with, and libgcc_s is wherever onnxruntime's wheel runs.
_EXPORTS = Path(__file__).with_name("exports.map")
_LINK = f"-static-libstdc++ -Wl,--version-script={_EXPORTS} -Wl,--gc-sections -Wl,--strip-all"


class CompilerError(Lfm2ExportError):
    """The library could not be compiled."""

    exit_code = 3


def make_wheel(wheel: Path, machine: str, into: Path, work: Path) -> Path:
    """The pure ``wheel`` as one for Linux on ``machine``; ``work``: a folder for what is compiled, emptied first.

    Raises:
        CompilerError: no compiler, or it failed.
        NotPortableError: the library needs more than glibc.
    """
    shutil.rmtree(work, ignore_errors=True)
    library = compile_library(extract_sources(wheel, work / "sources"), machine, work / "build")
    tag = manylinux_tag(library, machine)
    return repack(wheel, library, Platform(tag=tag, system="linux", machine=machine), into)


def compile_library(sources: Path, machine: str, work: Path) -> Path:
    found = build.tools()
    compiler = _compiler(machine)
    if found is None or shutil.which(compiler) is None:
        raise CompilerError(f"{machine}: needs cmake and {compiler}, and one is missing; install it")
    entries = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": machine,
        "CMAKE_CXX_COMPILER": compiler,
        "CMAKE_SHARED_LINKER_FLAGS": _LINK,
        "LFM2_BUILD_OPS": "OFF",
        "LFM2_BUILD_ONNX": "ON",
    }
    definitions = [f"-D{name}={value}" for name, value in entries.items()]
    _run([found.cmake, "-S", str(sources), "-B", str(work), *definitions])
    count = str(os.cpu_count() or 1)
    _run([found.cmake, "--build", str(work), "--target", "lfm2_onnx", "--parallel", count])
    return work / "liblfm2_onnx.so"


def _compiler(machine: str) -> str:
    return "g++" if machine == platform.machine() else f"{machine}-linux-gnu-g++"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise CompilerError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-4000:]}")
