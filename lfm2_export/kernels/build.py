"""Builds the operator libraries at first use, and remembers them; ONNX Runtime's may have come with the wheel.

In: the C++ sources beside this file, a C++ compiler and CMake, and for ExecuTorch its installed wheel. Out: the path of
``liblfm2_ops.so`` (ExecuTorch's operator), ``liblfm2_onnx.so`` (ONNX Runtime's operators) or the native runner in the
user's cache, in a folder named for everything that went into it: a new version of anything builds anew, and what older
ones built stays valid. The kernels are compiled once for all three (``compiling.py``). It needs no source of either.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lfm2_export.hashing import cache_folder
from lfm2_export.kernels import shipped, sources
from lfm2_export.kernels.compiling import Build, KernelBuildError

logger = logging.getLogger(__name__)

# As CMake names a shared library here.
_NAME = {"darwin": "lib{}.dylib", "win32": "{}.dll"}.get(sys.platform, "lib{}.so")
LIBRARY, ONNX_LIBRARY = _NAME.format("lfm2_ops"), _NAME.format("lfm2_onnx")
RUNNER = "lfm2_native_run"
_COMPILERS = ("c++", "g++", "clang++")
# What to do instead of building.
_REMEDY = {ONNX_LIBRARY: "onnxruntime's own kernels (--kernels stock)"}
_STOCK_OPERATOR = "the program with the stock operator (--moe-op stock)"


def library_path() -> Path | None:
    """ExecuTorch's operator library, built now if it is not there; None without a compiler, which is said once.

    Raises:
        KernelBuildError: executorch is not installed, or the build failed.
    """
    package = executorch_folder()
    if tools() is None:
        _say_once(missing_tools(LIBRARY))
        return None
    return _remembered(LIBRARY, package)


def onnx_library_path() -> Path | None:
    """ONNX Runtime's operator library: what a platform wheel brought, or built now if it is not there; None where
    neither can be.

    Raises:
        KernelBuildError: the build failed.
    """
    if (path := shipped.library(ONNX_LIBRARY)) is not None:
        return path
    return None if tools() is None else _remembered(ONNX_LIBRARY, None)


def built_onnx_library() -> Path | None:
    """The same where it was shipped, or built before; nothing is built."""
    if (path := shipped.library(ONNX_LIBRARY)) is not None:
        return path
    found = tools()
    path = None if found is None else _folder(None, found.compiler) / ONNX_LIBRARY
    return path if path is not None and path.exists() else None


def runner_path() -> Path:
    """The native runner (``runner/main.cpp``), built now if it is not there.

    Raises:
        KernelBuildError: executorch is not installed, there is no compiler, or the build failed.
    """
    return _remembered(RUNNER, executorch_folder())


def _remembered(target: str, package: Path | None) -> Path:
    """The file of a target of ``CMakeLists.txt``, built if it is not there; ``package``: the executorch wheel's folder,
    for what is built against it."""
    found = tools()
    if found is None:
        raise KernelBuildError(missing_tools(target))
    result = _folder(package, found.compiler) / target
    if result.exists():
        return result
    return Build(
        result=result,
        objects=_objects(found),
        cmake=found.cmake,
        entries={"CMAKE_CXX_COMPILER": found.compiler, "LFM2_BUILD_ONNX": "ON", **_wheel_entries(package)},
        remedy=_remedy(target),
    ).make()


def _wheel_entries(package: Path | None) -> dict[str, str]:
    if package is None:
        return {"LFM2_BUILD_OPS": "OFF"}
    return {
        "CMAKE_PREFIX_PATH": str(package / "share" / "cmake"),
        "LFM2_BUILD_RUNNER": "ON",
        "LFM2_EXECUTORCH_VERSION": importlib.metadata.version("executorch"),
    }


def executorch_folder() -> Path:
    """Where the installed executorch wheel is.

    Raises:
        KernelBuildError: it is not installed.
    """
    spec = importlib.util.find_spec("executorch")
    if spec is None or not spec.submodule_search_locations:
        raise KernelBuildError("executorch is not installed; pip install 'lfm2-export[executorch]'")
    return Path(next(iter(spec.submodule_search_locations)))


class Tools(NamedTuple):
    """Paths of what a build needs."""

    cmake: str
    compiler: str


@cache
def tools() -> Tools | None:
    """CMake and the compiler ($CXX, or the first that is found); None if one is missing."""
    cmake, compiler = _cmake(), _compiler()
    return None if cmake is None or compiler is None else Tools(cmake, compiler)


def _cmake() -> str | None:
    scripts = sysconfig.get_path("scripts")  # `pip install cmake` puts it there, on the PATH or not
    return shutil.which("cmake") or shutil.which("cmake", path=scripts)


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else _COMPILERS)), None)


@cache
def _say_once(message: str) -> None:
    logger.warning("%s", message)


def _remedy(target: str) -> str:
    return _REMEDY.get(target, _STOCK_OPERATOR)


def missing_tools(target: str) -> str:
    """What is missing to build ``target``; of ExecuTorch's, also what to do without it."""
    wanted = os.environ.get("CXX") or " or ".join(_COMPILERS)
    lacking = [
        *(["CMake (pip install cmake)"] if _cmake() is None else []),
        *([f"a C++20 compiler ({wanted})"] if _compiler() is None else []),
    ]
    remedy = "" if target == ONNX_LIBRARY else f"; install what is missing, or use {_STOCK_OPERATOR}"
    return f"{target} cannot be built without {' and '.join(lacking)}{remedy}"


def _folder(package: Path | None, compiler: str) -> Path:
    return cache_folder() / "kernels" / _key(package, compiler)


def _objects(found: Tools) -> Path:
    """Of the sources and tools alone: what is built against a wheel shares the kernels with what is not."""
    digest = hashlib.sha256("\n".join([_key(None, found.compiler), *found]).encode())
    return cache_folder() / "kernels" / f"objects-{digest.hexdigest()[:20]}"


def _key(package: Path | None, compiler: str) -> str:
    wheel = [] if package is None else [str(package), importlib.metadata.version("executorch")]
    parts = [platform.machine(), *wheel, _version(compiler), sources.digest()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
