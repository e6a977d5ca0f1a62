"""A backend, a family and a scheme that only this test knows, through everything that is done with one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import transformers

import lfm2_export
from lfm2_export.backends import BACKENDS, ExportOption, get_backend
from lfm2_export.backends.eager import EagerRunner
from lfm2_export.backends.program import Estimate, ExportedProgram, ExportRequest
from lfm2_export.cache import CacheSpec
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.cli import main
from lfm2_export.errors import ExportError
from lfm2_export.families import FAMILIES, get_family
from lfm2_export.generation import complete
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.manifest import MODEL, Program, StoredTensor
from lfm2_export.models import NETS
from lfm2_export.models.loading import load_model
from lfm2_export.quant.schemes import SCHEMES
from lfm2_export.registry import Registry
from lfm2_export.source import ASSETS
from lfm2_export.support import supported

GREEDY = GenerationConfig(max_new_tokens=4)


def goes_through_everything(checkpoint: str | Path, folder: Path, capsys: pytest.CaptureFixture, **asked: str) -> None:
    """Export, support, card, manifest, inspection, generation on the command line, parity."""
    artifact = lfm2_export.export(checkpoint, output=folder, **asked)
    program = lfm2_export.Artifact.open(folder).program(**asked)
    assert asked.items() <= {"backend": program.backend, "scheme": program.scheme}.items()
    rows = [(row.family, row.backend, row.scheme, row.file) for row in supported()]
    record = artifact.manifest.checkpoint
    assert (record.model_type, program.backend, program.scheme, Path(program.graphs[MODEL]).name) in rows
    assert f"| {program.backend} | {program.scheme} |" in (folder / "README.md").read_text()
    words = [word for name, value in asked.items() for word in (f"--{name}", value)]
    assert main(["inspect", str(folder), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["programs"][0]["scheme"] == program.scheme
    assert main(["run", str(folder), "--prompt", "worm", "--max-new-tokens", "4", *words]) == 0
    assert main(["support"]) == 0
    assert program.scheme in capsys.readouterr().out
    report = lfm2_export.measure_parity(folder, checkpoint, max_tokens=256, **asked)
    assert report.passed, report.failures()


def test_a_scheme(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = replace(SCHEMES["q4"], name="mine", linear=SCHEMES["q8"].linear, preference=50)
    monkeypatch.setitem(get_backend("onnx").SCHEMES, "mine", "model_mine.onnx")
    with SCHEMES.registered("mine", made_up):
        goes_through_everything("tiny-dense", tmp_path / "made", capsys, scheme="mine")
        assert (tmp_path / "made/onnx/model_mine.onnx").is_file()


@pytest.fixture
def twin(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint of the dense family under another model_type."""

    class TwinConfig(transformers.Lfm2Config):
        model_type = "twin"

    class TwinForCausalLM(transformers.Lfm2ForCausalLM):
        config_class = TwinConfig

    transformers.AutoConfig.register("twin", TwinConfig)
    transformers.AutoModelForCausalLM.register(TwinConfig, TwinForCausalLM)
    dense = get_family("lfm2")
    family = SimpleNamespace(
        ARCHITECTURES=("TwinForCausalLM",),
        parse_config=lambda raw: replace(dense.parse_config({**raw, "model_type": "lfm2"}), model_type="twin"),
        tensors=dense.tensors,
        fused_tensors=dense.fused_tensors,
        reference_config=dense.reference_config,
    )
    folder = tmp_path / "twin"
    shutil.copytree(ASSETS / "tiny-dense", folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "model_type": "twin", "architectures": ["TwinForCausalLM"]}))
    with FAMILIES.registered("twin", family), NETS.registered("twin", NETS["lfm2"]):
        yield folder


def test_a_family(twin: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    goes_through_everything(twin, tmp_path / "made", capsys, scheme="fp32")


class Copying:
    """A backend whose program is the checkpoint itself, run eagerly."""

    SCHEMES = {"fp32": "copy.safetensors"}  # noqa: RUF012
    DEFAULT_SCHEME = "fp32"
    OPTIONS = {"flavour": ExportOption(kind=str, metavar="NAME", help="recorded and nothing else")}  # noqa: RUF012
    DRAFTER_SCHEMES: tuple[str, ...] = ()
    TESTED_WITH: dict[str, str] = {}  # noqa: RUF012
    KL_TOLERANCE = 0.0

    def make_plan(self, config, scheme, options):
        raise AssertionError("no scheme of this backend mixes widths")

    def estimate(self, request: ExportRequest) -> Estimate:
        return Estimate(disk_bytes=request.checkpoint.total_bytes, memory_bytes=1 << 20)

    def export_program(self, request: ExportRequest) -> ExportedProgram:
        source, config = request.checkpoint.path, request.checkpoint.config
        files = {"model.safetensors": f"copying/{request.file_name}", "config.json": "copying/config.json"}
        for name, target in files.items():
            (request.folder / target).parent.mkdir(exist_ok=True)
            shutil.copy(source / name, request.folder / target)
        request.progress(request.checkpoint.total_bytes)
        tensors = request.checkpoint.tensors.items()
        return ExportedProgram(
            graphs={MODEL: files["model.safetensors"]},
            files=tuple(files.values()),
            context_length=config.max_position_embeddings,
            inputs=(),
            outputs=(),
            cache=CacheSpec.from_config(config),
            options=dict(request.options),
            operators={},
            tensors=tuple(StoredTensor(name=name, shape=info.shape, dtype="float32") for name, info in tensors),
        )

    def how_to_run(self, programs: Sequence[Program], family: str) -> str:
        return "## Run it\n\nAs you like.\n"

    def runtime_files(self, checkpoint, writer) -> None:
        writer.write_json("config.json", checkpoint.raw_config)

    def _open(self, folder: Path, program: Program):
        place = folder.parent / f"{folder.name}-opened"
        if not place.is_dir():
            shutil.copytree(folder / "copying", place)
            (place / "copy.safetensors").rename(place / "model.safetensors")
        return open_checkpoint(place)

    def load_runner(self, folder: Path, program: Program, options=None) -> EagerRunner:
        return EagerRunner(load_model(self._open(folder, program)))

    def runnable_graphs(self, program: Program) -> dict[str, Program]:
        return {program.graphs[MODEL]: program}

    def stored_weights(self, folder: Path, program: Program, config):
        opened = self._open(folder, program)
        tensors = {name: SimpleNamespace(shape=info.shape, dtype="float32") for name, info in opened.tensors.items()}
        return SimpleNamespace(config=opened.config, family=opened.family, tensors=tensors, read=opened.read)

    def score_at_full_precision(self, folder: Path, program: Program, rows: Sequence[np.ndarray], *, threads=None):
        return None


def test_a_backend(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with BACKENDS.registered("copying", Copying()):
        goes_through_everything("tiny-dense", tmp_path / "made", capsys, backend="copying", scheme="fp32")
        assert "As you like." in (tmp_path / "made/README.md").read_text()
        runner = lfm2_export.load_runner(tmp_path / "made")
        assert len(complete(runner, [[1, 2, 3]], GREEDY)[0].tokens) == 4
        flavoured = lfm2_export.export(
            "tiny-dense", backend="copying", scheme="fp32", output=tmp_path / "more", flavour="salt"
        )
        assert flavoured.program().options == {"flavour": "salt"}
        with pytest.raises(ExportError, match="--flavour 'salt': is for backend copying, not for onnx; pass --backend"):
            lfm2_export.export("tiny-dense", output=tmp_path / "none", flavour="salt")


def test_settings_that_no_backend_has_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match="export: 'sugar' is no setting of backend executorch; it has: embedding_bits"
    ):
        lfm2_export.export("tiny-dense", backend="executorch", scheme="fp32", output=tmp_path / "none", sugar=1)
    with pytest.raises(ExportError, match="--max-context 8: is for backend executorch, not for onnx"):
        lfm2_export.export("tiny-dense", output=tmp_path / "none", max_context=8)
    assert not list(tmp_path.iterdir())


def test_a_registry_loads_late_and_takes_a_name_once() -> None:
    registry: Registry[object] = Registry({"later": "json:dumps", "never": "no.such.module"})
    assert registry["later"] is json.dumps
    assert list(registry) == ["later", "never"]
    assert "never" in registry
    assert 3 not in registry
    with registry.registered("now", 1):
        assert registry["now"] == 1
        with pytest.raises(ValueError, match="now is registered already"):
            registry.register("now", 2)
    assert "now" not in registry
