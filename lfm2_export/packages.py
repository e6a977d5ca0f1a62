"""The packages of others that take part: which extra brings each, and where its version is told.

In: nothing. Out: versions for ``--version`` and for manifests, and the extra that a missing module belongs to.
"""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

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


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
