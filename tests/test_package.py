"""What importing the package costs, and that running an artifact needs no torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
