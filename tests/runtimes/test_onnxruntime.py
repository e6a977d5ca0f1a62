"""onnxruntime alone, as examples/onnxruntime_only.py uses it, gives from an artifact what our runner gives."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import lfm2_export
from lfm2_export.artifact import Artifact
from lfm2_export.text import Tokenizer
from tests.graphs import Graph, kl_divergence
from tests.runtimes.greedy import FAMILIES, PROMPTS, SCHEMES
from tests.shows import of, shows

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnxruntime_only.py"
HELDOUT = Path(lfm2_export.__file__).parent / "assets" / "heldout.txt"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("onnxruntime_only", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_imports_nothing_of_ours():
    tree = ast.walk(ast.parse(EXAMPLE.read_text()))
    names = {name.name.split(".")[0] for node in tree if isinstance(node, ast.Import) for name in node.names}
    tree = ast.walk(ast.parse(EXAMPLE.read_text()))
    names |= {(node.module or "").split(".")[0] for node in tree if isinstance(node, ast.ImportFrom)}
    assert names - sys.stdlib_module_names == {"numpy", "onnxruntime", "tokenizers"}


@shows("onnxruntime", "greedy", "logits", family=of("checkpoint"), scheme=of("scheme"))
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_same_logits_as_our_runner(artifact: Callable[[str], Path], example, checkpoint, scheme):
    folder = artifact(checkpoint)
    program = Artifact.open(folder, verify=False).program("onnx", scheme)
    runner = lfm2_export.load_runner(folder, scheme=scheme, kernels="stock")
    graph = program.graphs.get("cpu", program.graphs["model"])
    largest = 0.0
    for prompt in PROMPTS[:2]:
        ids = Tokenizer.from_dir(folder).encode(prompt)
        runner.reset()
        ours = runner.prefill([ids])[0]
        for token, theirs in example.greedy(example.Model(folder, graph), ids, 24):
            assert token == int(ours.argmax())
            largest = max(largest, float(np.abs(theirs - ours).max()))
            ours = runner.decode([token])[0]
    print(f"{checkpoint} {scheme}: largest difference of logits {largest:.2e}")
    assert largest <= 1e-6


@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_the_example_runs_as_a_program(artifact: Callable[[str], Path], checkpoint):
    folder = artifact(checkpoint)
    command = [sys.executable, EXAMPLE, folder, PROMPTS[0], "--max-new-tokens", "8"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    text, tokens = result.stdout.rsplit("tokens:", 1)
    ids = [int(token) for token in tokens.split()]
    print(result.stdout)
    assert 0 < len(ids) <= 8
    assert text.rstrip("\n") == Tokenizer.from_dir(folder).decode(ids).rstrip("\n")


@shows("onnxruntime", "logits", family=of("checkpoint"), scheme=("fp16", "q4", "q4f16"))
@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_float16_programs_run_on_the_cpu_and_stay_close(artifact: Callable[[str], Path], checkpoint):
    folder = artifact(checkpoint)
    ids = np.array([Tokenizer.from_dir(folder).encode(HELDOUT.read_text(encoding="utf-8")[:1500])[:256]])

    def logits(scheme: str) -> np.ndarray:
        graph = Graph(folder, scheme, "scoring")
        return graph(ids, np.ones_like(ids), graph.empty(1))[0][0]

    reference = logits("fp32")
    cost = {scheme: kl_divergence(reference, logits(scheme)) for scheme in ("fp16", "q4", "q4f16")}
    print(f"{checkpoint}: KL divergence to fp32 over {ids.size} tokens:", {k: f"{v:.2e}" for k, v in cost.items()})
    assert cost["fp16"] <= 1e-4
    assert cost["q4"] <= 4e-3  # measured: 2.4e-3 and 2.8e-3, mixed widths
    assert cost["q4f16"] <= 7e-3  # measured: 4.8e-3 and 3.5e-3, uniform ones
