"""The packages of others that take part: which extra brings each, and where its version is told.

In: nothing. Out: versions for ``--version`` and for manifests, and the extra that a missing module belongs to.
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, ParamSpec, TypeVar

from lfm2_export.errors import MissingPackageError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

OURS = "lfm2-export"


@dataclass(frozen=True, kw_only=True)
class Package:
    """``name`` is the distribution's, ``module`` the first part of what is imported from it; ``extra`` brings it (None:
    it is always there, or nothing of ours needs it). ``recorded``: its version may change what an export contains.
    ``listed``: ``--version`` tells it."""

    name: str
    module: str
    extra: str | None = None
    recorded: bool = False
    listed: bool = False


# In the order in which versions are told.
PACKAGES = (
    Package(name="torch", module="torch", extra="export", recorded=True, listed=True),
    Package(name="transformers", module="transformers", extra="export", recorded=True, listed=True),
    Package(name="onnx", module="onnx", extra="export", recorded=True, listed=True),
    Package(name="onnx-ir", module="onnx_ir", extra="export", recorded=True),
    Package(name="onnxscript", module="onnxscript", extra="export", recorded=True, listed=True),
    Package(name="safetensors", module="safetensors", extra="export"),
    Package(name="huggingface_hub", module="huggingface_hub", extra="export"),
    Package(name="onnxruntime", module="onnxruntime", recorded=True, listed=True),
    Package(name="onnxruntime-genai", module="onnxruntime_genai", listed=True),
    Package(name="numpy", module="numpy", recorded=True, listed=True),
    Package(name="executorch", module="executorch", extra="executorch", recorded=True, listed=True),
    Package(name="torchao", module="torchao", extra="executorch", recorded=True),
    Package(name="starlette", module="starlette", extra="serve"),
    Package(name="uvicorn", module="uvicorn", extra="serve"),
    Package(name="llguidance", module="llguidance", extra="serve"),
    Package(name="ray", module="ray", extra="sweep"),
    Package(name="pyyaml", module="yaml", extra="sweep"),
    Package(name="shtab", module="shtab", extra="completion"),
)


def recorded_versions() -> dict[str, str]:
    """Python's version, ours, and that of every installed package that may change what an export contains."""
    names = [OURS, *(package.name for package in PACKAGES if package.recorded)]
    found = {name: version for name in names if (version := _version(name)) is not None}
    return {"python": platform.python_version(), **found}


def listed_versions() -> dict[str, str | None]:
    """Version of every runtime and of what else a report should name; None where it is not installed."""
    return {package.name: _version(package.name) for package in PACKAGES if package.listed}


def extra_of(module: str) -> str | None:
    """The extra that brings a module, by the first part of its name."""
    return next((package.extra for package in PACKAGES if package.module == module), None)


def missing(error: Exception, what: str) -> MissingPackageError | None:
    """Our error for ``what`` where another one says that a package is missing which an extra brings; else None."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if (extra := extra_of(package)) is None:
        return None
    return MissingPackageError(f"{what} needs {package}, which is not installed; pip install '{OURS}[{extra}]'")


def explained(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A public function whose lack of a package is our error, with the command that brings it."""

    @functools.wraps(function)
    def called(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        try:
            return function(*args, **options)
        except ModuleNotFoundError as error:
            if isinstance(error, MissingPackageError) or (ours := missing(error, function.__name__)) is None:
                raise
            raise ours from error

    return called


class Absent:
    """Stands for a public name whose module needs a package that is not installed: it can be imported, looked at and
    asked for its documentation, and whoever uses it learns what to install."""

    def __init__(self, name: str, error: MissingPackageError):
        self._name, self._error = name, error
        self.__doc__ = str(error)

    def __repr__(self) -> str:
        return f"<{self._name}: {self._error}>"

    def _refuse(self, *args: Any, **options: Any) -> NoReturn:
        raise MissingPackageError(str(self._error))

    __call__ = __mro_entries__ = _refuse

    def __instancecheck__(self, instance: object) -> bool:
        return False  # nobody can have made one

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what tools look at, and need not find
            raise AttributeError(name)
        self._refuse()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
