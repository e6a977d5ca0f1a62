"""Parity: artifacts that are the model pass, artifacts that are not fall short in the hop where they went wrong."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import lfm2_export
from lfm2_export.artifact import Artifact
from lfm2_export.artifact_writer import ArtifactWriter
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.cli import main
from lfm2_export.errors import ArtifactError, Lfm2ExportError
from lfm2_export.manifest import CheckpointRecord
from lfm2_export.parity import ParityReport, control, hops, measure_parity, page, record_parity
from lfm2_export.parity.sample import HELD_OUT, read_sample
from lfm2_export.source import BUNDLED
from tests.checkpoints import tiny_config, with_a_token_too_many, write_random_checkpoint
from tests.conftest import Exported, Once
from tests.shows import of, shows

SCHEMES = ("fp32", "q8", "q4")
FEW = 96
CONV, ATTENTION = "conv", "full_attention"
CONFIGS: dict[str, dict[str, Any]] = {
    "moe": tiny_config(
        "lfm2_moe",
        layer_types=[CONV, ATTENTION, CONV],
        num_hidden_layers=3,
        moe_intermediate_size=64,
        conv_bias=True,
        use_expert_bias=False,
        tie_word_embeddings=False,
    ),
    "dense": tiny_config(
        "lfm2",
        layer_types=[ATTENTION, CONV, ATTENTION],
        num_hidden_layers=3,
        conv_L_cache=7,
        num_key_value_heads=1,
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def exported(once: Once) -> Callable[[str], Exported]:
    """A random checkpoint of a named config, exported as SCHEMES. Leave it unchanged."""

    def make(name: str) -> Callable[[Path], object]:
        return lambda folder: lfm2_export.export(
            calm_checkpoint(folder / "checkpoint", CONFIGS[name]), scheme=SCHEMES, output=folder / "artifact"
        )

    def made(name: str) -> Exported:
        folder = once(f"parity-{name}", make(name))
        return Exported(checkpoint=folder / "checkpoint", artifact=folder / "artifact")

    return made


def calm_checkpoint(folder: Path, raw_config: dict[str, Any]) -> Path:
    """Random weights whose layers add little to the residual stream, as a trained model's do. Otherwise the rounding of
    activations to int8 turns into KL divergences that say nothing about the export."""
    path = write_random_checkpoint(folder, raw_config, seed=1, dtype="F32") / "model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        if name.endswith(("w2.weight", "out_proj.weight")):
            weight *= 0.2
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            weight *= 0.5
    save_file(weights, path)
    return folder


@pytest.fixture
def copied(exported: Callable[[str], Exported], tmp_path: Path) -> Callable[[str], Exported]:
    """The same, to be changed."""

    def made(name: str) -> Exported:
        found = exported(name)
        folder = shutil.copytree(found.artifact, tmp_path / "artifact")
        return Exported(checkpoint=found.checkpoint, artifact=folder)

    return made


def edit_graphs(artifact: Path, scheme: str, edit: Callable[[onnx.GraphProto], None], *roles: str) -> None:
    """Changes the graphs of a program (default: all) and lets the manifest vouch for the result."""
    path = artifact / "lfm2_export.json"
    manifest = json.loads(path.read_text())
    (program,) = (p for p in manifest["programs"] if p["scheme"] == scheme)
    for role, name in program["graphs"].items():
        if roles and role not in roles:
            continue
        model = onnx.load(artifact / name, load_external_data=False)
        edit(model.graph)
        onnx.save(model, artifact / name)
        content = (artifact / name).read_bytes()
        program["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest))


def shown(report: ParityReport) -> ParityReport:
    """Prints every figure, for a reader of the test's output."""
    for row in report.rows():
        print(" | ".join(row))
    return report


def failing_hops(report: ParityReport) -> set[str]:
    hops = [report.model, *(hop for program in report.programs for hop in program.hops)]
    return {hop.name for hop in hops if not hop.passed}


def test_random_checkpoints_pass_in_every_hop(exported: Callable[[str], Exported]) -> None:
    for name in CONFIGS:
        found = exported(name)
        report = shown(measure_parity(found.artifact, found.checkpoint, max_tokens=512, threads=1))
        assert report.failures() == []
        assert report.passed
        assert report.model.summary["max_abs_error"] <= 1e-5
        for measured in report.programs:
            lowering = measured.lowering.summary
            if measured.program.scheme == "fp32":
                assert lowering["max_abs_error"] <= 1e-4
            assert lowering["kl"] <= 1e-3


@shows("ours", "logits", family=of("name"), scheme=("fp32", "fp16", "q4f16"))
@shows("ours-own", "logits", family=of("name"), scheme=("q8", "q4"))
@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_checkpoints_pass_under_every_scheme(name: str, artifact: Callable[[str], Path]) -> None:
    report = shown(measure_parity(artifact(name), name, max_tokens=1536, threads=1))
    assert report.failures() == []
    assert max(figure.value for figure in report.model.figures if "padding" not in figure.name) <= 1e-5
    figures = {measured.program.scheme: measured for measured in report.programs}
    assert figures["fp32"].lowering.summary["max_abs_error"] <= 1e-4
    assert figures["fp16"].lowering.summary["kl"] <= 1e-4
    assert max(figures[scheme].lowering.summary["kl"] for scheme in ("q8", "q4", "q4f16")) <= 1e-3
    costs = {scheme: measured.quantization.summary["kl"] for scheme, measured in figures.items()}
    assert costs["fp32"] < costs["fp16"] < costs["q8"] < costs["q4"]
    assert "kept out of the checkpoint's training" in report.text


def other_epsilon(value: float) -> Callable[[onnx.GraphProto], None]:
    """Sets the epsilon of one norm, which is 1e-5."""

    def edit(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.op_type == "SkipSimplifiedLayerNormalization")
        next(attribute for attribute in node.attribute if attribute.name == "epsilon").f = value

    return edit


def test_a_graph_that_computes_something_else_falls_short(copied: Callable[[str], Exported]) -> None:
    found = copied("dense")
    edit_graphs(found.artifact, "fp32", other_epsilon(2e-5))
    report = shown(measure_parity(found.artifact, found.checkpoint, scheme="fp32", max_tokens=FEW, threads=1))
    assert "lowering" in failing_hops(report)
    assert not report.passed


def test_only_full_precision_kernels_show_a_small_error(copied: Callable[[str], Exported]) -> None:
    found = copied("dense")
    edit_graphs(found.artifact, "q4", other_epsilon(2e-5))
    report = shown(measure_parity(found.artifact, found.checkpoint, scheme="q4", max_tokens=FEW, threads=1))
    failed = [figure.name for figure in report.programs[0].lowering.figures if not figure.passed]
    assert [name.split(",")[0] for name in failed] == ["kernels at full precision"]


def test_a_scoring_graph_that_is_not_the_shipped_one_falls_short(copied: Callable[[str], Exported]) -> None:
    found = copied("dense")
    edit_graphs(found.artifact, "fp32", other_epsilon(1e-3), "scoring")
    report = measure_parity(found.artifact, found.checkpoint, scheme="fp32", max_tokens=FEW, threads=1)
    assert any("scoring graph and shipped graph" in line for line in report.failures())


def test_a_graph_that_is_missing_is_said_not_to_be_compared(
    copied: Callable[[str], Exported], caplog: pytest.LogCaptureFixture
) -> None:
    found = copied("dense")
    path = Artifact.open(found.artifact, verify=False).program("onnx", "q4").graphs["lfm2"]
    (found.artifact / path).unlink()
    report = measure_parity(found.artifact, found.checkpoint, scheme="q4", max_tokens=FEW, threads=1)
    assert f"{found.artifact}: {path} is missing and not compared" in [one.getMessage() for one in caplog.records]
    assert not any(path in figure.name for figure in report.programs[0].lowering.figures)


def test_a_zero_point_that_no_node_reads_falls_short(copied: Callable[[str], Exported]) -> None:
    found = copied("dense")

    def drop_zero_point(graph: onnx.GraphProto) -> None:
        # The same one in every graph: our operators take q, k and v together, others one by one.
        products = (n for n in graph.node if n.op_type == "MatMulNBits" and "out_proj.qdata" in n.input[1])
        next(n for n in products if "zero_point" in n.input[-1]).input.pop()

    edit_graphs(found.artifact, "q4", drop_zero_point)
    report = shown(measure_parity(found.artifact, found.checkpoint, scheme="q4", max_tokens=FEW, threads=1))
    # Both sides of hop 2 have the same wrong weight; the checkpoint has not.
    assert failing_hops(report) == {"quantization"}
    assert any("int4 weights, worst in row" in line for line in report.failures())


def test_two_weights_in_each_others_place_fall_short(copied: Callable[[str], Exported]) -> None:
    found = copied("moe")

    def swap(graph: onnx.GraphProto) -> None:
        pair = [t for t in graph.initializer if re.fullmatch(r".*\.0\.feed_forward\.w[13]\.weight", t.name)]
        first, second = (next(entry for entry in tensor.external_data if entry.key == "offset") for tensor in pair)
        first.value, second.value = second.value, first.value

    edit_graphs(found.artifact, "fp32", swap)
    report = measure_parity(found.artifact, found.checkpoint, scheme="fp32", max_tokens=FEW, threads=1)
    assert failing_hops(report) == {"quantization"}


def test_an_eager_model_that_is_not_transformers_falls_short(
    exported: Callable[[str], Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = exported("dense")
    load_model = hops.load_model

    def wrong(source: Any) -> Any:
        model = load_model(source)
        model.get_parameter("model.layers.1.conv.conv.weight").data[0, 0, 0] += 0.1
        return model

    monkeypatch.setattr(hops, "load_model", wrong)
    report = measure_parity(found.artifact, found.checkpoint, scheme="fp32", max_tokens=FEW, threads=1)
    assert {"model", "lowering"} <= failing_hops(report)


def test_a_control_that_nothing_notices_is_a_failure(
    exported: Callable[[str], Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = exported("dense")
    monkeypatch.setattr(control, "ROW_STEPS", (1e-9,))
    report = measure_parity(found.artifact, found.checkpoint, scheme="fp32", max_tokens=FEW, threads=1)
    assert not report.passed
    assert any(
        "control went unnoticed" in line and "model.layers.1.conv.out_proj.weight" in line for line in report.failures()
    )


def test_another_checkpoint_is_refused(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    found = exported("dense")
    with pytest.raises(ArtifactError, match=r"was made of checkpoint, and .* has another config"):
        measure_parity(found.artifact, exported("moe").checkpoint)
    other = shutil.copytree(found.checkpoint, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.embedding_norm.weight"] *= 1.01
    save_file(weights, other / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"and .* has other weights"):
        measure_parity(found.artifact, other)
    with pytest.raises(ArtifactError, match="has no fp16 program"):
        measure_parity(found.artifact, found.checkpoint, scheme="fp16")


def test_texts_that_cannot_be_used_are_refused(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    found, bundled = exported("dense"), lfm2_export.open_checkpoint("tiny-dense")
    with pytest.raises(Lfm2ExportError, match=r"has no tokenizer\.json to read"):
        measure_parity(found.artifact, found.checkpoint, text=HELD_OUT)
    with pytest.raises(Lfm2ExportError, match=r"max_tokens=5: at least 96 are needed"):
        measure_parity(found.artifact, found.checkpoint, max_tokens=5)

    def read(text: Path) -> Any:
        return read_sample(bundled, text, max_tokens=512, context_length=4096)

    with pytest.raises(Lfm2ExportError, match="no such file"):
        read(tmp_path / "none.txt")
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(Lfm2ExportError, match=r"short.txt: has \d+ tokens; at least 96 are needed"):
        read(tmp_path / "short.txt")
    other = lfm2_export.open_checkpoint(with_a_token_too_many(tmp_path / "other"))
    with pytest.raises(Lfm2ExportError, match=r"its tokenizer gives token 5000, config\.json knows 2660; bring back"):
        read_sample(other, None, max_tokens=512, context_length=4096)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9" * 100)
    with pytest.raises(Lfm2ExportError, match=r"latin.txt: is not UTF-8"):
        read(tmp_path / "latin.txt")


def test_windows_are_spread_over_the_text_and_do_not_overlap() -> None:
    checkpoint = lfm2_export.open_checkpoint("tiny-dense")
    sample = read_sample(checkpoint, None, max_tokens=2000, context_length=4096)
    assert [len(window.inputs) for window in sample.windows] == [512] * 3
    text = lfm2_export.Tokenizer.from_dir(checkpoint.path).encode(HELD_OUT.read_text(), add_special_tokens=False)
    (bos,) = lfm2_export.Tokenizer.from_dir(checkpoint.path).encode("")
    places = []
    for window in sample.windows:
        assert window.inputs[0] == bos
        assert window.inputs[1:].tolist() == window.targets[:-1].tolist()
        places.append(next(i for i in range(len(text)) if text[i : i + 512] == window.targets.tolist()))
    print("windows begin at", places, "of", len(text))
    assert places[0] == 0
    assert places[-1] + 512 == len(text)
    assert min(np.diff(places)) >= 512


def test_a_text_of_ones_own_is_used_and_named(artifact: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    report = measure_parity(
        artifact("tiny-dense"), "tiny-dense", scheme="fp32", text=tmp_path / "mine.txt", max_tokens=FEW, threads=1
    )
    digest = hashlib.sha256((tmp_path / "mine.txt").read_bytes()).hexdigest()
    assert report.text == f"96 tokens of mine.txt (sha256 {digest[:12]})"
    assert report.passed


def test_figures_are_recorded_in_manifest_and_model_card(copied: Callable[[str], Exported]) -> None:
    found = copied("dense")
    asked = {"scheme": ["q4", "fp32"], "max_tokens": FEW, "threads": 1}
    report = measure_parity(found.artifact, found.checkpoint, **asked)
    record_parity(found.artifact, found.checkpoint, report)
    artifact = Artifact.open(found.artifact)
    recorded = artifact.program("onnx", "q4").parity
    assert recorded is not None
    assert recorded["lowering"]["kl"] == report.programs[0].lowering.summary["kl"]
    assert recorded["quantization"]["top1_agreement"] == report.programs[0].quantization.summary["top1_agreement"]
    assert recorded["model"]["passed"] is recorded["lowering"]["passed"] is True
    assert artifact.program("onnx", "q8").parity is None
    card = found.artifact / "README.md"
    assert "Parity with the eager model" in card.read_text()
    assert f"Measured on {report.text}." in card.read_text()
    assert artifact.edited() == []
    for change in (lambda: card.write_bytes(b"mine, in Latin-1: \xe9"), lambda: artifact.adopt(), card.unlink):
        change()
        before = card.read_bytes() if card.exists() else None
        record_parity(found.artifact, found.checkpoint, report)
        assert (card.read_bytes() if card.exists() else None) == before


def test_weights_that_amplify_int8_activations_are_told_from_a_wrong_lowering(tmp_path: Path) -> None:
    """Wide random weights, not calmed: q4's kernels differ by more than the tolerance, the graph does not."""
    raw = tiny_config("lfm2_moe", num_hidden_layers=3, layer_types=[CONV, ATTENTION, CONV], moe_intermediate_size=64)
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", raw, seed=3, dtype="F32")
    artifact = lfm2_export.export(checkpoint, scheme="q4", output=tmp_path / "artifact")
    report = measure_parity(artifact.path, checkpoint, max_tokens=FEW, threads=1)
    print(report.failures())
    assert not report.passed
    (remark,) = report.remarks()
    assert "onnx q4: at full precision its graph agrees with the eager model" in remark


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(
    artifact: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hops, "measure", lambda *_, **__: pytest.fail("it was measured"))
    page = tmp_path / "missing" / "page.html"
    assert main(["parity", str(artifact("tiny-dense")), "tiny-dense", "--report", str(page)]) == 2
    assert f"{page}: the report cannot be written" in capsys.readouterr().err


def test_figures_that_cannot_be_recorded_are_printed_all_the_same(
    copied: Callable[[str], Exported], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = copied("dense")
    report = measure_parity(found.artifact, found.checkpoint, scheme="fp32", max_tokens=FEW, threads=1)
    monkeypatch.setattr(hops, "measure", lambda *_, **__: report)
    with ArtifactWriter(found.artifact, CheckpointRecord.of(open_checkpoint(str(found.checkpoint)))):
        assert main(["parity", str(found.artifact), str(found.checkpoint), "--json", "--record"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out) == report.to_json()
    assert "another export is writing to it" in err


class _Page(HTMLParser):
    """Every open tag is closed; what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "line", "polygon", "polyline"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_the_page_needs_nothing_else_and_shows_everything(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    found = exported("moe")
    report = measure_parity(found.artifact, found.checkpoint, scheme="q4", max_tokens=FEW, threads=1)
    page.write(report, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    parsed = _Page()
    parsed.feed(text)
    assert parsed.open == []
    assert parsed.links == []
    assert not re.search(r"https?://|@import|url\(|<script", text)
    for row in report.rows(details=True):
        assert row[2] in parsed.cells
    assert "<polyline" in text
    worst = max(report.programs[0].program.tensors, key=lambda tensor: tensor.error or 0.0)
    assert worst.name in parsed.cells
    with pytest.raises(Lfm2ExportError, match="the report cannot be written"):
        page.write(report, tmp_path / "none" / "report.html")
    json.dumps(report.to_json(), allow_nan=False)


def test_a_perturbed_weight_is_put_back() -> None:
    model = hops.load_model(lfm2_export.open_checkpoint("tiny-dense"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def changed() -> list[str]:
        return [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]

    for perturbation in (control.one_row(model), control.one_norm(model)):
        with perturbation.applied(model, 0.5):
            assert changed() == [perturbation.name]
        assert changed() == []


def test_a_transformers_that_lacks_the_family_is_named(
    random_artifact: Callable[..., Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers has LFM3 since 5.23, and older ones are taken for the other families."""
    import transformers

    found = random_artifact(tiny_config("lfm3"))
    monkeypatch.delitem(transformers.CONFIG_MAPPING._mapping, "lfm3", raising=False)
    refused = r"transformers [\d.]+ has no lfm3 to compare with; pip install 'transformers"
    with pytest.raises(Lfm2ExportError, match=refused):
        measure_parity(found.artifact, found.checkpoint, max_tokens=FEW, threads=1)
