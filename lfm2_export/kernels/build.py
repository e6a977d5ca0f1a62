"""Builds the operator libraries at first use, and remembers them.

In: the C++ sources beside this file, a C++ compiler and CMake, and for ExecuTorch its installed wheel. Out: the path of
``liblfm2_ops.so`` (ExecuTorch's operator), ``liblfm2_onnx.so`` (ONNX Runtime's operators) or the native runner in the
user's cache, in a folder named for everything that went into it: a new version of anything builds anew, and what older
ones built stays valid. Needs no source of either runtime.
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
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lfm2_export.errors import Lfm2ExportError
from lfm2_export.hashing import cache_folder

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
_SUFFIX = "dylib" if sys.platform == "darwin" else "so"
LIBRARY, ONNX_LIBRARY = f"liblfm2_ops.{_SUFFIX}", f"liblfm2_onnx.{_SUFFIX}"
RUNNER = "lfm2_native_run"
_COMPILERS = ("c++", "g++", "clang++")
# What to do instead of building.
_REMEDY = {ONNX_LIBRARY: "onnxruntime's own kernels (--kernels stock)"}
_STOCK_OPERATOR = "the program with the stock operator (--moe-op stock)"


class KernelBuildError(Lfm2ExportError):
    """The operator library could not be built; the message names the file that holds the compiler's output."""

    exit_code = 3


def library_path() -> Path | None:
    """ExecuTorch's operator library, built now if it is not there; None without a compiler, which is said once.

    Raises:
        KernelBuildError: executorch is not installed, or the build failed.
    """
    package = executorch_folder()
    if tools() is None:
        _say_once(missing_tools(LIBRARY))
        return None
    return _remembered(LIBRARY, {}, package)


def onnx_library_path() -> Path | None:
    """ONNX Runtime's operator library, built now if it is not there; None without a compiler.

    Raises:
        KernelBuildError: the build failed.
    """
    options = {"LFM2_BUILD_ONNX": "ON", "LFM2_BUILD_OPS": "OFF"}
    return None if tools() is None else _remembered(ONNX_LIBRARY, options, None)


def built_onnx_library() -> Path | None:
    """The same where it was built before; nothing is built."""
    found = tools()
    path = None if found is None else _folder(None, found.compiler) / ONNX_LIBRARY
    return path if path is not None and path.exists() else None


def runner_path() -> Path:
    """The native runner (``runner/main.cpp``), built now if it is not there.

    Raises:
        KernelBuildError: executorch is not installed, there is no compiler, or the build failed.
    """
    return _remembered(RUNNER, {"LFM2_BUILD_RUNNER": "ON", "LFM2_BUILD_OPS": "OFF"}, executorch_folder())


def build(target: str, into: Path, *, options: Mapping[str, str], package: Path | None) -> Path:
    """Runs CMake on our sources and puts the file ``target`` into the folder ``into`` once it is whole.

    Args:
        options: CMake cache entries, such as those of another compiler.
        package: the executorch wheel's folder, for what is built against it.

    Raises:
        KernelBuildError: there is no compiler or CMake, or they failed; what they printed stays in a file.
    """
    found = tools()
    if found is None:
        raise KernelBuildError(missing_tools(target))
    wheel = {} if package is None else {"CMAKE_PREFIX_PATH": str(package / "share" / "cmake")}
    entries = {"CMAKE_CXX_COMPILER": found.compiler, **wheel, **options}
    logger.info("building %s (once)", target)
    try:
        return _build(found.cmake, target, into, [f"-D{name}={value}" for name, value in entries.items()])
    except OSError as error:
        raise KernelBuildError(
            f"{into}: {target} cannot be built here ({error}); set XDG_CACHE_HOME to a folder that can be written"
        ) from error


def _build(cmake: str, target: str, into: Path, definitions: list[str]) -> Path:
    into.mkdir(parents=True, exist_ok=True)
    log = into / f"{target}.log"
    with tempfile.TemporaryDirectory(prefix=f"{target}.", dir=into) as work:
        for mode, command in (
            ("w", [cmake, "-S", str(SOURCES), "-B", work, *definitions]),
            ("a", [cmake, "--build", work, "--target", _cmake_name(target), "--parallel"]),
        ):
            _run(log, command, mode, remedy=_remedy(target))
        os.replace(Path(work, target), into / target)
    log.unlink(missing_ok=True)
    return into / target


def _cmake_name(target: str) -> str:
    return target.removeprefix("lib").partition(".")[0]


def _remembered(target: str, options: Mapping[str, str], package: Path | None) -> Path:
    found = tools()
    if found is None:
        raise KernelBuildError(missing_tools(target))
    folder = _folder(package, found.compiler)
    built = folder / target
    return built if built.exists() else build(target, folder, options=options, package=package)


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
    scripts = sysconfig.get_path("scripts")  # `pip install cmake` puts it there, on the PATH or not
    cmake = shutil.which("cmake") or shutil.which("cmake", path=scripts)
    named = os.environ.get("CXX")
    compiler = next(filter(None, map(shutil.which, [named] if named else _COMPILERS)), None)
    return None if cmake is None or compiler is None else Tools(cmake, compiler)


@cache
def _say_once(message: str) -> None:
    logger.warning("%s", message)


def _remedy(target: str) -> str:
    return _REMEDY.get(target, _STOCK_OPERATOR)


def missing_tools(target: str) -> str:
    """What is wanted to build ``target``, and what to do without it."""
    wanted = os.environ.get("CXX") or " or ".join(_COMPILERS)
    return (
        f"{target} cannot be built: it needs CMake and a C++20 compiler ({wanted}); install them (pip install cmake), "
        f"or use {_remedy(target)}"
    )


def _folder(package: Path | None, compiler: str) -> Path:
    return cache_folder() / "kernels" / _key(package, compiler)


def _key(package: Path | None, compiler: str) -> str:
    wheel = [] if package is None else [str(package), importlib.metadata.version("executorch")]
    parts = [platform.machine(), *wheel, _version(compiler)]
    digest = hashlib.sha256("\n".join(parts).encode())
    for file in sorted(_source_files()):
        digest.update(f"\n{file.relative_to(SOURCES)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:20]


def _source_files() -> list[Path]:
    return [SOURCES / "CMakeLists.txt", *(SOURCES / "src").iterdir(), *(SOURCES / "runner").iterdir()]


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _run(log: Path, command: list[str], mode: str, *, remedy: str) -> None:
    with log.open(mode) as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise KernelBuildError(
            f"{Path(command[0]).name} failed with exit code {done.returncode} on {SOURCES}: its output is in {log}; "
            f"or use {remedy}"
        )
