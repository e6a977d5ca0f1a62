"""Wheels that carry the compiled operators: what is in them, and that they need no compiler.

``make platform-wheels`` compiles them and proves this machine's in a new environment; here they carry what the
suite has compiled anyway.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lfm2_export.kernels import build, shipped, sources
from platform_wheels import __main__ as command
from platform_wheels.elf import NotPortableError, manylinux_tag
from platform_wheels.repack import NotOurWheelError, Platform, repack

ROOT = Path(__file__).parents[1]
INFO = "lfm2_export-0.1.0.dist-info"
HERE = Platform(tag=f"manylinux_2_34_{platform.machine()}", system=sys.platform, machine=platform.machine())
needs_compiler = pytest.mark.skipif(build.tools() is None, reason="no compiler for our operators")


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``make wheels`` builds it, as far as it matters here: the package, and what a wheel says of itself."""
    path = tmp_path_factory.mktemp("pure") / "lfm2_export-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted((ROOT / "lfm2_export").rglob("*")):
            carried = file.suffix == ".py" or file.parent.name in ("src", "runner", "templates")
            if (carried or file.name == "CMakeLists.txt" or file.parent.name == "assets") and file.is_file():
                archive.write(file, file.relative_to(ROOT))
        archive.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n\n")
        archive.writestr(f"{INFO}/METADATA", "Metadata-Version: 2.4\nName: lfm2-export\nVersion: 0.1.0\n")
        archive.writestr(f"{INFO}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def carrying(pure: Path) -> Path:
    """The wheel for this machine."""
    library = build.onnx_library_path()
    if library is None:
        pytest.skip("no compiler for our operators")
    return repack(pure, library, HERE, pure.parent)


def run(folder: Path, artifact: Path) -> subprocess.CompletedProcess[str]:
    """A q4 program on our operators by the package in a folder, where no compiler is found."""
    code = "import sys, lfm2_export.cli as cli; sys.exit(cli.main(sys.argv[1:]))"
    arguments = ["run", str(artifact), "--prompt", "What is a list?", "--max-new-tokens", "4", "--kernels", "lfm2"]
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {
        "PATH": str(folder / "nothing"),
        "PYTHONPATH": str(folder),
        "XDG_CACHE_HOME": str(folder.parent / "cache"),
    }
    command = [sys.executable, "-c", code, *arguments, "--scheme", "q4", "--threads", "1", "--json"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """But for what Python itself compiles."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def test_without_a_compiler_a_program_runs_on_the_library_in_the_wheel(
    carrying: Path, artifact: Callable[[str], Path], tmp_path: Path
) -> None:
    installed = tmp_path / "installed"
    zipfile.ZipFile(carrying).extractall(installed)
    before = listing(installed)
    done = run(installed, artifact("tiny-moe"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    print(result["kernels"], result["processor"])
    assert result["kernels"].startswith("lfm2 ")
    assert result["threads"] == 1
    assert "compil" not in done.stderr
    assert listing(installed) == before
    assert not (tmp_path / "cache" / "lfm2-export" / "kernels").exists()


def test_a_library_from_other_sources_is_not_taken(
    carrying: Path, artifact: Callable[[str], Path], tmp_path: Path
) -> None:
    installed = tmp_path / "installed"
    zipfile.ZipFile(carrying).extractall(installed)
    with (installed / "lfm2_export/kernels/src/moe.cpp").open("a") as source:
        source.write("// changed\n")
    done = run(installed, artifact("tiny-moe"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "our kernels cannot be had here: " in line
    assert "cannot be built without" in line
    assert "a C++20 compiler" in line


@needs_compiler
def test_the_shipped_library_comes_before_what_is_compiled(
    carrying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zipfile.ZipFile(carrying).extractall(tmp_path)
    compiled = build.onnx_library_path()
    monkeypatch.setattr(sources, "SOURCES", tmp_path / "lfm2_export" / "kernels")
    monkeypatch.setattr(sources.digest, "__defaults__", (sources.SOURCES,))
    found = build.onnx_library_path()
    assert found == build.built_onnx_library() != compiled
    assert found.is_relative_to(tmp_path)
    assert found.read_bytes() == compiled.read_bytes()
    monkeypatch.setattr(platform, "machine", lambda: "sparc")
    assert shipped.library(build.ONNX_LIBRARY) is None


def test_the_wheel_says_what_it_is_for_and_what_is_in_it(carrying: Path, pure: Path) -> None:
    assert carrying.name == f"lfm2_export-0.1.0-py3-none-{HERE.tag}.whl"
    archive, before = zipfile.ZipFile(carrying), zipfile.ZipFile(pure)
    text = archive.read(f"{INFO}/WHEEL").decode()
    assert "Root-Is-Purelib: false\n" in text
    assert f"Tag: py3-none-{HERE.tag}\n" in text
    recorded = {name: digest for name, digest, _ in csv.reader(io.StringIO(archive.read(f"{INFO}/RECORD").decode()))}
    assert set(recorded) == set(archive.namelist())
    for name, digest in recorded.items():
        if name != f"{INFO}/RECORD":
            found = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).decode().rstrip("=")
            assert digest == f"sha256={found}"
    (added,) = set(archive.namelist()) - set(before.namelist())
    assert added.startswith(f"lfm2_export/kernels/shipped/{sys.platform}-{platform.machine()}-")


def test_the_same_input_makes_the_same_wheel(carrying: Path, pure: Path, tmp_path: Path) -> None:
    library = build.onnx_library_path()
    assert repack(pure, library, HERE, tmp_path).read_bytes() == carrying.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [carrying.name]


def test_only_the_pure_wheel_is_taken(carrying: Path, pure: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(NotOurWheelError, match="is not lfm2-export's pure wheel; make it with `make wheels`"):
        repack(carrying, pure, HERE, tmp_path)
    arguments = ["carry", str(carrying), "--library", str(pure), "--tag", "t", "--system", "s", "--machine", "m"]
    assert command.main([*arguments, "--into", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {carrying}: is not")
    assert not list(tmp_path.iterdir())


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
@pytest.mark.parametrize(
    ("code", "newest"),
    [('extern "C" float expf(float); float f(float x) { return expf(x); }', 27), ("int f() { return 1; }", 17)],
)
def test_the_tag_is_the_newest_glibc_among_what_is_needed(code: str, newest: int, tmp_path: Path) -> None:
    (tmp_path / "f.cpp").write_text(code)
    compiler, made = build.tools().compiler, tmp_path / "libf.so"
    flags = ["-shared", "-fPIC", "-nodefaultlibs", "-o", str(made), str(tmp_path / "f.cpp"), "-lm", "-lc"]
    subprocess.run([compiler, *flags], check=True)
    assert manylinux_tag(made, platform.machine()) == f"manylinux_2_{newest}_{platform.machine()}"


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_what_needs_more_than_glibc_gets_no_tag() -> None:
    with pytest.raises(NotPortableError, match=r"needs libstdc\+\+\.so\.6; link it statically"):
        manylinux_tag(build.onnx_library_path(), platform.machine())
    with pytest.raises(NotPortableError, match="readelf cannot read it"):
        manylinux_tag(Path(__file__), platform.machine())
