"""Artifacts and GGUF files beside each other: figures that agree with parity's, a gate, a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from lfm2_export import cli, load_runner
from lfm2_export.backends.eager import EagerRunner
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.errors import ArtifactError, CheckpointError, Lfm2ExportError
from lfm2_export.models.loading import load_model
from lfm2_export.parity.divergence import Divergence, compare
from lfm2_export.parity.lowering import score
from lfm2_export.parity.sample import read_sample
from lfm2_export.quality import Quality, measure_quality, subjects
from lfm2_export.quality.page import render
from lfm2_export.quality.report import QualityReport, Size
from lfm2_export.quality.routing import agreement, chosen_experts
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.gguf.written import write

TOKENS = 1024


@pytest.fixture(scope="module", autouse=True)
def weights_alone() -> Iterator[None]:
    """GGUF files as they are compared where llama-cpp-python is not installed; for the rest there is test_llama.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subjects, "llama_is_installed", lambda: False)
        yield


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("quality") / "tiny-dense-Q4_0.gguf", "tiny-dense")


@pytest.fixture(scope="module")
def report(artifact: Callable[[str], Path], gguf_file: Path) -> QualityReport:
    return measure_quality([artifact("tiny-dense"), gguf_file], "tiny-dense", max_tokens=TOKENS, threads=1)


def test_figures_are_what_the_runner_gives(report: QualityReport, artifact: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint("tiny-dense")
    sample = read_sample(checkpoint, None, max_tokens=TOKENS, context_length=512)
    runners = EagerRunner(load_model(checkpoint)), load_runner(artifact("tiny-dense"), scheme="q4", threads=1)
    parts = [compare(*(score(runner, window) for runner in runners), window.targets) for window in sample.windows]
    expected, found = Divergence.joined(parts), {model.name: model for model in report.models}["tiny-dense q4"]
    assert found.kl == pytest.approx(expected.mean_kl, rel=1e-6)
    assert found.kl_p99 == pytest.approx(np.quantile(expected.kl, 0.99), rel=1e-6)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
    assert report.perplexity == pytest.approx(expected.reference_perplexity, rel=1e-6)


def test_more_bits_lose_less(report: QualityReport) -> None:
    found = {model.name: model for model in report.models}
    for model in report.models:
        print(f"{model.name}: {model.kl:.2e} ± {model.kl_error:.1e}, {model.size.file_bits:.2f} bits")
    order = ["tiny-dense q4", "tiny-dense q8", "tiny-dense fp32"]
    for more, less in pairwise(order):
        assert found[more].kl > found[less].kl
        assert found[more].size.file_bits < found[less].size.file_bits
    assert found["tiny-dense fp32"].kl < 1e-9
    assert found["tiny-dense fp32"].size.file_bits == pytest.approx(32, rel=0.1)
    assert found["tiny-dense-Q4_0"].kl > found["tiny-dense q8"].kl
    assert 4.5 < found["tiny-dense-Q4_0"].size.file_bits < 6


def test_routers_send_tokens_to_the_same_experts_as_far_as_the_weights_are_the_same(
    artifact: Callable[[str], Path], tmp_path: Path
) -> None:
    """All of them with weights as they were, fewer with fewer bits; with other weights hardly any."""
    gguf_file = write(tmp_path / "tiny-moe-Q4_0.gguf", "tiny-moe")
    found = measure_quality([artifact("tiny-moe"), gguf_file], "tiny-moe", max_tokens=TOKENS, threads=1)
    shares = {model.name: model.mean_same_experts or 0.0 for model in found.models}
    print(shares, found.models[0].same_experts)
    assert shares["tiny-moe fp32"] == 1
    assert 0.8 < shares["tiny-moe q4"] < shares["tiny-moe q8"] < 1
    assert 0.7 < shares["tiny-moe-Q4_0"] < 1
    checkpoint = open_checkpoint("tiny-moe")
    model, windows = (
        load_model(checkpoint),
        read_sample(checkpoint, None, max_tokens=TOKENS, context_length=512).windows,
    )
    expected = chosen_experts(model, windows)
    assert tuple(expected) == checkpoint.config.moe_layers
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            parameter.data = parameter.data.roll(1, 0)
    control = agreement(expected, chosen_experts(model, windows))
    print(control)
    assert max(control.values()) < 0.5
    assert "tokens that go to the same experts" in render(found)
    assert json.loads(json.dumps(found.to_json()))["models"][0]["same_experts"]


def test_the_command_writes_a_page_a_base_file_and_a_verdict(
    gguf_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, base = tmp_path / "page.html", tmp_path / "base.kld"
    common = ["quality", str(gguf_file), "--checkpoint", "tiny-dense", "--json", "--max-tokens", str(TOKENS)]
    assert cli.main([*common, "--report", str(page), "--write-base", str(base), "--max-kl", "1"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert "<svg" in page.read_text()
    assert cli.main([*common, "--base", str(base), "--max-kl", "1e-9"]) == 1
    out, err = capsys.readouterr()
    again = json.loads(out)
    assert "is above 1e-09" in err
    # The same tokens but for the first half of each chunk, against the same probabilities in 16 bits.
    assert again["models"][0]["kl"] == pytest.approx(whole["models"][0]["kl"], rel=0.25)
    assert "chunks of" in again["text"]


def test_what_cannot_be_compared_is_refused(artifact: Callable[[str], Path], gguf_file: Path, tmp_path: Path) -> None:
    with pytest.raises(Lfm2ExportError, match="give at least one"):
        measure_quality([], "tiny-dense")
    with pytest.raises(Lfm2ExportError, match="pass either --text or --base"):
        measure_quality([gguf_file], "tiny-dense", text="a", base="b")
    with pytest.raises(ArtifactError):
        measure_quality([tmp_path], "tiny-dense")
    with pytest.raises(CheckpointError, match="is of another shape than tiny-moe"):
        measure_quality([gguf_file], "tiny-moe")
    other = write_random_checkpoint(tmp_path / "other", tiny_config("lfm2"), seed=0)
    with pytest.raises(ArtifactError, match="was made of"):
        measure_quality([artifact("tiny-dense")], other)
    assert cli.main(["quality", str(gguf_file), "--checkpoint", "tiny-dense", "--max-kl", "nan"]) == 2


def quality(name: str, kl: float, nbytes: int) -> Quality:
    logits = np.zeros((4, 3), np.float32)
    one = Quality.of(name, "made up", [compare(logits, logits, np.zeros(4, np.int64))] * 2, size(nbytes))
    return Quality(**{**vars(one), "kl": kl, "errors": {"model.layers.1.x": 0.1}})


def size(nbytes: int) -> Size:
    return Size(file_bytes=nbytes, file_weights=8, step_bytes=nbytes, step_weights=8)


def test_the_frontier_is_what_no_other_beats_and_names_are_escaped() -> None:
    models = (
        quality("<b>", 0.1, 8),
        quality("worse", 0.2, 9),
        quality("best", 0.01, 10),
        quality("nan", float("nan"), 7),
    )
    found = QualityReport(checkpoint="<i>", text="t", tokens=4, perplexity=1.0, models=models[:3], versions={})
    assert [model.name for model in found.frontier()] == ["<b>", "best"]
    assert [model.name for model in found.above(0.05)] == ["<b>", "worse"]
    assert QualityReport(**{**vars(found), "models": models}).above(1.0) == (models[3],)
    page = render(found)
    assert "<b>" not in page
    assert "<i>" not in page
    assert "&lt;b&gt;" in page


def test_a_gguf_of_floats_is_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", tiny_config("lfm2"), seed=0)
    path = write(tmp_path / "model.gguf", open_checkpoint(checkpoint), type_of=lambda tensor: Type.F32)
    found = measure_quality([path], checkpoint, max_tokens=TOKENS)
    assert found.models[0].kl == 0
    assert found.models[0].top1_agreement == 1
