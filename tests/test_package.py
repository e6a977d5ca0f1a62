"""What importing the package costs, and that running an artifact needs no torch."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

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


def test_the_wheel_is_pure_and_holds_what_is_no_python(tmp_path: Path) -> None:
    """Checkpoints, and the kernels' sources, which are built where the wheel is installed."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("setuptools, which builds the wheel, cannot be had here")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "lfm2_export"
    wanted = {p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts and p.name[0] != "."}
    assert {str(path.relative_to(ROOT)) for path in wanted} <= held
    assert not [name for name in held if name.startswith(("tests/", "benchmarks/", "examples/"))]
