"""The package as a notebook meets it: names, types, what a result looks like, and what a base install says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import lfm2_export
from lfm2_export import choices
from lfm2_export.backends import BACKENDS
from lfm2_export.backends.base import Kernels, KvCache
from lfm2_export.errors import Lfm2ExportError, MissingPackageError
from lfm2_export.parity.figures import Control, Figure, Hop
from lfm2_export.parity.report import ParityReport
from lfm2_export.quality.report import Quality, QualityReport, Size
from lfm2_export.quant.algorithms import ALGORITHMS
from lfm2_export.quant.schemes import SCHEMES
from tests.artifacts import write_artifact

# What the base install has not.
BASE = """
import sys
ABSENT = "torch transformers onnx onnx_ir onnxscript safetensors huggingface_hub gguf threadpoolctl".split()
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
"""


def in_base_install(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", BASE + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_literal_types_are_what_is_registered() -> None:
    found = {
        choices.BackendName: BACKENDS,
        choices.SchemeName: SCHEMES,
        choices.AlgorithmName: ALGORITHMS,
        choices.KernelsName: list(map(str, Kernels)),
        choices.KvCacheName: list(map(str, KvCache)),
    }
    for literal, registered in found.items():
        assert set(get_args(literal)) == set(registered), literal


def test_errors_and_protocols_have_public_names() -> None:
    for name in ("Runner", "Completion", "TokenEvent", "ParityReport", "QualityReport", "Progress"):
        assert getattr(lfm2_export, name).__module__.startswith("lfm2_export.")
    kinds = [getattr(lfm2_export, name) for name in lfm2_export.__all__ if name.endswith("Error")]
    assert len(kinds) == 12
    assert all(issubclass(kind, Lfm2ExportError) for kind in kinds)


def test_a_base_install_can_be_imported_whole_and_explored() -> None:
    """Without torch: help and import * work; what needs more says which command brings it, as our error."""
    out = in_base_install("""
from lfm2_export import *
import lfm2_export, pydoc
text = pydoc.plain(pydoc.render_doc(lfm2_export))
assert "load_runner" in text and "class Artifact" in text, text
assert isinstance(GenerationConfig(), GenerationConfig)
print(repr(ExportedModelForCausalLM))
assert not isinstance(3, ExportedModelForCausalLM)
def refused(call):
    try:
        call()
    except MissingPackageError as error:
        assert isinstance(error, Lfm2ExportError) and isinstance(error, ImportError)
        print(error)
    else:
        raise AssertionError("no error")
refused(lambda: ExportedModelForCausalLM.from_pretrained("x"))
refused(lambda: ExportedModelForCausalLM("x"))
refused(lambda: exec("class Mine(ExportedModelForCausalLM): pass", globals()))
refused(lambda: export("tiny-moe", output="made"))
refused(lambda: open_checkpoint("organization/name"))
refused(lambda: measure_parity("made", "tiny-moe"))
""")
    lines = out.splitlines()
    assert len(lines) == 7
    remedy = re.compile(r"needs \w+, which is not installed; pip install 'lfm2-export\[export\]'")
    assert all(remedy.search(line) for line in lines)


def test_a_package_that_no_extra_brings_is_missed_as_it_is() -> None:
    from lfm2_export.packages import explained

    def missing() -> None:
        raise ModuleNotFoundError("No module named 'mine'", name="mine")

    with pytest.raises(ModuleNotFoundError) as error:
        explained(missing)()
    assert not isinstance(error.value, MissingPackageError)


def test_results_are_short_in_a_console_and_tables_in_a_notebook(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "<made>", {"q4": "a", "fp32": "b"})
    assert repr(artifact) == f"Artifact('{tmp_path}/<made>': onnx q4, onnx fp32; made of tiny-moe)"
    html = artifact._repr_html_()
    assert html.count("<tr>") == 3
    assert "<td>onnx/model_q4.onnx</td>" in html
    assert "&lt;made&gt;" in html
    assert "<made>" not in html
    figure = Figure(name="text", measure="KL", value=1e-4, tolerance=1e-3)
    control = Control(change="a weight", measure="KL", value=1.0, tolerance=1e-3)
    hop = Hop(name="model", title="", figures=(figure,), controls=(control,), summary={})
    report = ParityReport(artifact="made", checkpoint="tiny-moe", text="some", model=hop, programs=(), versions={})
    assert repr(report) == "ParityReport(made and tiny-moe: : passed)"
    assert report._repr_html_().startswith("<p>passed: ")
    size = Size(file_bytes=1000, file_weights=2000, step_bytes=500, step_weights=1000)
    model = Quality(
        name="made q4",
        kind="onnx",
        kl=2e-3,
        kl_error=1e-4,
        kl_p99=1e-2,
        top1_agreement=0.96,
        perplexity=50.0,
        size=size,
        errors={"a": 0.1},
    )
    quality = QualityReport(
        checkpoint="tiny-moe", text="some", tokens=64, perplexity=49.0, models=(model,), versions={}
    )
    assert repr(quality) == "QualityReport(tiny-moe, 64 tokens: made q4: KL 2.00e-03)"
    assert "<td>2.00e-03</td>" in quality._repr_html_()
    assert all(len(repr(one)) < 200 for one in (artifact, report, quality))
