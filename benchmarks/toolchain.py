"""The C and C++ compilers and cmake that the benchmarks build with, and the flags that a compiler needs.

In: the environment (``CC``, ``CXX``, ``PATH``). Out: a ``Compiler`` and cmake's path, or one line that says what to
install.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import BenchmarkError

# gcc 12 compiles llama.cpp's AMX kernels into a program that crashes; it builds them wherever these are on.
_NO_AMX = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")
_FIRST_SOUND_GCC = 13
_X86 = ("x86_64", "AMD64")


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """``name``: "gcc 12.2.0", "clang 19.1.7"."""

    c: str
    cxx: str
    name: str

    @property
    def flags(self) -> tuple[str, ...]:
        """What it must be told beside ``-march=native``."""
        family, _, version = self.name.partition(" ")
        old_gcc = family == "gcc" and int(version.split(".")[0]) < _FIRST_SOUND_GCC
        return _NO_AMX if old_gcc and platform.machine() in _X86 else ()


def find_compiler() -> Compiler:
    """``CC`` and ``CXX``, else the first pair found.

    Raises:
        BenchmarkError: there is none.
    """
    given = os.environ.get("CC"), os.environ.get("CXX")
    pairs = [given] if all(given) else [("gcc", "g++"), ("clang", "clang++"), ("cc", "c++")]
    for c, cxx in pairs:
        if c and cxx and shutil.which(c) and shutil.which(cxx):
            return Compiler(c=c, cxx=cxx, name=_name(cxx))
    names = ", ".join(cxx for _, cxx in pairs if cxx)
    raise BenchmarkError(f"no C++ compiler ({names}) was found; install g++ or clang, or set CC and CXX")


def find_cmake() -> str:
    """The one on the path, else the one that pip installed beside this Python.

    Raises:
        BenchmarkError: there is none.
    """
    found = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if found is None:
        raise BenchmarkError("cmake was not found, and llama.cpp is built with it; pip install cmake")
    return found


def _name(cxx: str) -> str:
    text = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout
    return compiler_name(text, cxx)


def compiler_name(version_text: str, program: str) -> str:
    """What ``--version`` says, as "gcc 12.2.0"."""
    first = version_text.strip().split("\n")[0]
    # In the first line, distributions put their own version in brackets before the compiler's.
    numbers = re.findall(r"\d+\.\d+(?:\.\d+)?", re.sub(r"\([^)]*\)", "", first))
    family = "clang" if "clang" in first else "gcc" if "Free Software Foundation" in version_text else program
    return f"{family} {numbers[0] if numbers else 'unknown'}"
