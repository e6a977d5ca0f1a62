"""What importing the package costs, and that running an artifact needs no torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import lfm2_export
from lfm2_export.source import BUNDLED
from tests.checkpoints import tiny_config, write_random_checkpoint

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "executorch", "numpy")


def python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_no_runtime_and_takes_little_time() -> None:
    code = f"""
import sys, time
started = time.process_time()
import lfm2_export
took = time.process_time() - started
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
print(took)
"""
    took = min(float(python(code)) for _ in range(3))
    print(f"import lfm2_export: {took * 1000:.1f} ms of CPU")
    assert took < 0.3


def test_public_names_exist() -> None:
    import lfm2_export

    for name in lfm2_export.__all__:
        assert getattr(lfm2_export, name) is not None


def test_running_an_artifact_needs_no_torch(artifact: Callable[[str], Path]) -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors"):
            raise ModuleNotFoundError(f"{name} is not installed", name=name)
sys.meta_path.insert(0, Refuse())
from lfm2_export.cli import main
assert main(["run", sys.argv[1], "--prompt", "What is a list?", "--max-new-tokens", "4"]) == 0
assert main(["bench", sys.argv[1], "--rounds", "1", "--prompt-tokens", "4"]) == 0
assert main(["inspect", sys.argv[1]]) == 0
code = main(["export", "tiny-moe", "-o", sys.argv[1] + "-more"])
assert code == 2, code
"""
    done = subprocess.run([sys.executable, "-c", code, str(artifact("tiny-moe"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install 'lfm2-export[export]'" in done.stderr


COMPANIONS = ("integrations/lfm2-export-demo", "integrations/optimum-lfm2")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheels of this project by their distribution's name, built as ``make wheels`` builds them, but of a copy:
    setuptools would leave its work in the checkout, and take up what lies there."""
    folder, copy = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("source")
    for name in ("lfm2_export", "integrations"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    sources = (copy, *(copy / companion for companion in COMPANIONS))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("setuptools, which builds the wheels, cannot be had here")
    assert done.returncode == 0, done.stderr
    return {wheel.name.partition("-")[0]: wheel for wheel in folder.glob("*.whl")}


def test_the_wheel_is_pure_and_small_and_holds_what_is_no_python(wheels: dict[str, Path]) -> None:
    """The texts, and the kernels' sources, which are built where the wheel is installed."""
    wheel = wheels["lfm2_export"]
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < 1 << 20
    held = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "lfm2_export"
    files = {p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts and p.name[0] != "."}
    carried = {path for name in BUNDLED for path in (package / "assets" / name).iterdir()}
    assert {str(path.relative_to(ROOT)) for path in files - carried} <= held
    assert not {str(path.relative_to(ROOT)) for path in carried} & held
    assert not [
        name for name in held if name.startswith(("tests/", "benchmarks/", "examples/", "docs/", "documentation/"))
    ]


def test_the_bundled_checkpoints_come_with_a_distribution_of_their_own(wheels: dict[str, Path], tmp_path: Path) -> None:
    """Where the two are installed without a checkout; without the second, the remedy is told."""
    zipfile.ZipFile(wheels["lfm2_export"]).extractall(tmp_path)
    assert "the small checkpoints are not installed; pip install 'lfm2-export[demo]'" in inspected(tmp_path, 2).stderr
    zipfile.ZipFile(wheels["lfm2_export_demo"]).extractall(tmp_path)
    for name in BUNDLED:
        assert (tmp_path / "lfm2_export_demo" / name / "LICENSE").is_file()
    assert json.loads(inspected(tmp_path, 0).stdout)["parameters"] == 2_875_904


def tracked() -> set[str]:
    """The files of the checkout, of which a source distribution itself has no list."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is no checkout, whose files git could list")
    return set(filter(None, done.stdout.split("\0")))


def test_the_source_distribution_has_all_that_a_checkout_has(tmp_path: Path) -> None:
    """So that the suite runs from it; and nothing that was built beside the sources."""
    pytest.importorskip("build", reason="pip install build")
    wanted = tracked()
    for name in wanted:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "source" / name, follow_symlinks=False)
    for built in ("build/site/index.html", "examples/web/node_modules/a.js", "tests/__pycache__/a.pyc"):
        (tmp_path / "source" / built).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / built).write_bytes(b"")
    command = [sys.executable, "-m", "build", "--sdist", "--outdir", str(tmp_path / "dist"), str(tmp_path / "source")]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No matching distribution found for setuptools" in done.stdout + done.stderr:
        pytest.skip("setuptools, which builds it, cannot be had here")
    assert done.returncode == 0, done.stderr
    (made,) = (tmp_path / "dist").iterdir()
    assert made.name == f"lfm2_export-{lfm2_export.__version__}.tar.gz"
    with tarfile.open(made) as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers() if not member.isdir()}
    print(f"{made.name}: {made.stat().st_size:,} bytes, {len(held)} files")
    assert not wanted - held
    made_by_setuptools = {"PKG-INFO", "setup.cfg"}
    assert {name for name in held - wanted if not name.startswith("lfm2_export.egg-info/")} == made_by_setuptools


def test_every_distribution_has_the_same_version() -> None:
    """Those of integrations/ too, with the bounds that they put on each other."""
    found = {
        name: tomllib.loads((ROOT / name / "pyproject.toml").read_text())["project"] for name in (".", *COMPANIONS)
    }
    assert {project["version"] for project in found.values()} == {lfm2_export.__version__}
    asked = [
        line
        for project in found.values()
        for line in (*project.get("dependencies", ()), *project.get("optional-dependencies", {}).get("demo", ()))
    ]
    bounds = [line for line in asked if line.startswith("lfm2-export") and "," in line]
    major, minor, _ = lfm2_export.__version__.split(".")
    wanted = f">={major}.{minor},<{major}.{int(minor) + 1}"
    assert [bound for bound in bounds if bound.endswith(wanted)] == bounds
    assert len(bounds) == 2


def inspected(folder: Path, code: int) -> subprocess.CompletedProcess[str]:
    """What ``inspect`` says of a bundled checkpoint, run from the packages in a folder alone."""
    command = [sys.executable, "-c", "from lfm2_export.cli import main; raise SystemExit(main())", "inspect"]
    environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "tiny-lfm3", "--json"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done


def test_the_command_has_a_name_of_its_own_too(wheels: dict[str, Path]) -> None:
    """Liquid's own tools install an ``lfm2-export``."""
    archive = zipfile.ZipFile(wheels["lfm2_export"])
    (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    scripts = [line for line in archive.read(name).decode().splitlines() if "=" in line]
    assert scripts == ["lfm2-export = lfm2_export.cli:main", "lfm2x = lfm2_export.cli:main"]


def test_optimum_cli_has_our_export(wheels: dict[str, Path], tmp_path: Path) -> None:
    """Found by optimum where the wheel is installed, here beside the environment's packages; the same files, byte for
    byte, as from ``export``, and the same line for a mistake."""
    pytest.importorskip("optimum", reason="pip install 'optimum>=2.3'")
    zipfile.ZipFile(wheels["optimum_lfm2"]).extractall(tmp_path / "site")
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", tiny_config("lfm2"), seed=3)

    def optimum_cli(*arguments: str, installed: bool = True) -> subprocess.CompletedProcess[str]:
        places = [str(tmp_path / "site")] * installed + [str(ROOT)]
        return subprocess.run(
            [sys.executable, "-c", "from optimum.commands.optimum_cli import main; main()", *arguments],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )

    command = ("export", "lfm2", str(checkpoint), "out", "--scheme", "q4,fp32", "--group-size", "32")
    done = optimum_cli(*command)
    assert done.returncode == 0, done.stderr
    assert "onnx/model_q4.onnx" in done.stdout
    artifact = lfm2_export.Artifact.open(tmp_path / "out")
    direct = lfm2_export.export(checkpoint, scheme=["q4", "fp32"], group_size=32, output=tmp_path / "direct")
    assert artifact.manifest.all_files() == direct.manifest.all_files()
    refused = optimum_cli("export", "lfm2", str(checkpoint), "other", "--scheme", "q5")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("lfm2-export: scheme 'q5' is unknown")
    assert not (tmp_path / "other").exists()
    assert optimum_cli(*command, installed=False).returncode == 2  # optimum alone knows no lfm2
