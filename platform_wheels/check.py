"""Proves a platform wheel where there is no compiler: in a new environment, with nothing on the PATH.

In: the wheel and an artifact with a program for our operators. Out: what ran, or a line that says what is wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lfm2_export.errors import Lfm2ExportError
from lfm2_export.kernels import shipped


class CheckError(Lfm2ExportError):
    """The wheel does not do what it is for."""

    exit_code = 1


def check(wheel: Path, artifact: Path) -> dict[str, object]:
    """Installs the wheel with what it requires, and runs the artifact on the library that it brought.

    Raises:
        CheckError: it ran something else, compiled, or wrote beside the library; or ran on our operators without the
            library, so that this proved nothing.
    """
    with tempfile.TemporaryDirectory(prefix="platform-wheel-") as folder:
        work = Path(folder)
        package = _install(wheel, work / "environment")
        before = _contents(package)
        done = _run(work, artifact)
        if done.returncode:
            raise CheckError(f"{wheel.name}: {done.stderr.strip()}")
        result = json.loads(done.stdout)
        if not result["kernels"].startswith("lfm2 "):
            raise CheckError(f"{wheel.name}: ran on {result['kernels']}")
        if (work / "cache" / "lfm2-export" / "kernels").exists() or "compil" in done.stderr:
            raise CheckError(f"{wheel.name}: compiled the library that it has")
        if _contents(package) != before:
            raise CheckError(f"{wheel.name}: wrote into {package.name}")
        shutil.rmtree(package / "kernels" / shipped.FOLDER)
        control = _run(work, artifact)
        if control.returncode == 0 or "cannot be built without" not in control.stderr:
            raise CheckError(f"{wheel.name}: ran without its library as well: {control.stderr.strip()}")
        return {"wheel": wheel.name, "without its library": control.stderr.strip(), **result}


def _install(wheel: Path, environment: Path) -> Path:
    """The installed package's folder."""
    _done([sys.executable, "-m", "venv", str(environment)])
    python = str(environment / "bin" / "python")
    _done([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", str(wheel)])
    where = _done([python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"])
    return Path(where.strip()) / "lfm2_export"


def _done(command: list[str]) -> str:
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _environment() -> dict[str, str]:
    """Without what would bring another lfm2-export, or a compiler."""
    return {name: value for name, value in os.environ.items() if name not in ("CXX", "PYTHONPATH")}


def _run(work: Path, artifact: Path) -> subprocess.CompletedProcess[str]:
    program = work / "environment" / "bin" / "lfm2-export"
    command = [str(program), "run", str(artifact.absolute()), "--prompt", "What is a list?", "--json"]
    environment = _environment() | {
        "PATH": str(program.parent),
        "XDG_CACHE_HOME": str(work / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        [*command, "--max-new-tokens", "8", "--kernels", "lfm2"],
        env=environment,
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
    )


def _contents(package: Path) -> dict[str, str]:
    """Digests of the package's files, but for what Python itself compiles."""
    files = (path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(package)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
