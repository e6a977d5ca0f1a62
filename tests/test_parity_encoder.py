"""``parity`` of encoders: a trained model's weights as an encoder, every scheme, and what must fall short.

The bundled dense checkpoint, read in both directions: its weights are trained, so that what quantization costs is what
it costs a real model, which random ones would exaggerate.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import save_file
from safetensors.torch import load_file

import lfm2_export
from lfm2_export.cli import main
from lfm2_export.source import ASSETS
from tests.conftest import Exported, Once

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEMES = ("fp32", "fp16", "q8", "q4")
# What quantization was measured to leave of the mean cosine.
COSINES = {"fp32": 0.9999999, "fp16": 0.999999, "q8": 0.9999, "q4": 0.998}


@pytest.fixture(scope="module")
def trained(once: Once) -> Exported:
    """The bundled checkpoint under the published names of an encoder, with CLS pooling."""

    def make(folder: Path) -> None:
        checkpoint = folder / "checkpoint"
        shutil.copytree(ASSETS / "tiny-dense", checkpoint)
        raw = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps({**raw, "architectures": ["Lfm2BidirectionalModel"]}))
        tensors = load_file(checkpoint / "model.safetensors")
        save_file(
            {name.removeprefix("model."): value.float().numpy() for name, value in tensors.items()},
            checkpoint / "model.safetensors",
        )
        names = (("Transformer", ""), ("Pooling", "1_Pooling"))
        modules = [{"path": path, "type": f"sentence_transformers.models.{name}"} for name, path in names]
        (checkpoint / "modules.json").write_text(json.dumps(modules))
        (checkpoint / "1_Pooling").mkdir()
        (checkpoint / "1_Pooling/config.json").write_text('{"pooling_mode": "cls"}')
        lfm2_export.export(checkpoint, scheme=SCHEMES, output=folder / "artifact")

    folder = once("trained-encoder", make)
    return Exported(checkpoint=folder / "checkpoint", artifact=folder / "artifact")


@pytest.fixture
def copy(trained: Exported, tmp_path: Path) -> Path:
    """An artifact of its own, to be changed."""
    shutil.copytree(trained.artifact, tmp_path / "artifact")
    return tmp_path / "artifact"


def test_every_scheme_passes_and_every_control_is_noticed(trained: Exported) -> None:
    report = lfm2_export.measure_parity(trained.artifact, trained.checkpoint, max_tokens=1024)
    assert report.passed, report.failures()
    assert {measured.program.scheme for measured in report.programs} == set(SCHEMES)
    for measured in report.programs:
        cosine = measured.quantization.summary["cosine"]
        print(f"{measured.program}: cosine {cosine:.6f}, lowering {measured.lowering.summary}")
        assert cosine > COSINES[measured.program.scheme]
        assert len(measured.lowering.controls) == 1
        assert len(measured.quantization.controls) == 2
    fp32 = next(one for one in report.programs if one.program.scheme == "fp32")
    assert {figure.measure for figure in fp32.lowering.figures} == {"max abs error"}
    assert "mean cosine" in report.verdict()


def test_the_command_keeps_its_figures(copy: Path, trained: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    page = copy.parent / "page.html"
    arguments = [str(copy), str(trained.checkpoint), "--scheme", "q8", "--report", str(page)]
    before = {name: (copy / name).read_bytes() for name in ("lfm2_export.json", "README.md")}
    assert main(["parity", *arguments]) == 0
    assert {name: (copy / name).read_bytes() for name in before} == before
    assert main(["parity", *arguments, "--record"]) == 0
    assert "sentence_embedding, mean" in capsys.readouterr().out
    program = lfm2_export.Artifact.open(copy).program(scheme="q8")
    assert program.parity is not None
    assert program.parity["quantization"]["cosine"] > COSINES["q8"]
    assert "| onnx q8 | " in (copy / "README.md").read_text().partition("## Parity")[2]
    assert f"Measured on {program.parity['text']}." in (copy / "README.md").read_text()
    assert "KL divergence" not in page.read_text()


def test_a_program_of_other_weights_falls_short(trained: Exported, copy: Path) -> None:
    """q4's data file where q8's was: the graph reads other bytes, which the hashes would tell."""
    manifest = json.loads((copy / "lfm2_export.json").read_text())
    data = copy / "onnx/model_quantized.onnx_data"
    raw = bytearray(data.read_bytes())
    raw[100_000:140_000] = bytes(40_000)
    data.write_bytes(raw)
    for program in manifest["programs"]:
        if program["scheme"] == "q8":
            import hashlib

            program["files"]["onnx/model_quantized.onnx_data"]["sha256"] = hashlib.sha256(raw).hexdigest()
    (copy / "lfm2_export.json").write_text(json.dumps(manifest))
    report = lfm2_export.measure_parity(copy, trained.checkpoint, scheme="q8", max_tokens=256)
    assert not report.passed
    print(report.failures())
    assert any("relative error" in line for line in report.failures())


def test_another_checkpoint_is_refused(
    trained: Exported, encoder: Callable[..., Exported], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parity", str(trained.artifact), str(encoder("embedding").checkpoint)]) == 2
    assert "was made of" in capsys.readouterr().err
