"""Exported drafters against the eager one with the weights that are in their files, on either kernels."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import lfm2_export
from lfm2_export.artifact import Artifact
from lfm2_export.backends import get_backend
from lfm2_export.backends.onnx import variants
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.errors import ArtifactError, RunnerError
from lfm2_export.manifest import DRAFTER, MANIFEST, MODEL, CheckpointRecord, Manifest
from lfm2_export.models.lfm2_dspark import Lfm2DSparkDraftModel
from lfm2_export.models.loading import load_draft_model
from tests.conftest import Exported
from tests.drafters import LAYERS, TARGET
from tests.shows import of, shows

SCHEMES = ("fp32", "q8", "q4")
KERNELS = [
    "stock",
    pytest.param("auto", marks=pytest.mark.skipif(variants.own_library() is None, reason="no compiler")),
]
# Measured: 2e-7 (fp32) and, where activations are rounded to int8, 0.02 (q8, q4).
CLOSE = {"fp32": 1e-5, "q8": 0.06, "q4": 0.06}


@pytest.fixture(scope="module")
def drafter(random_artifact: Callable[..., Exported], random_drafter: Callable[..., Exported]) -> Exported:
    return random_drafter(random_artifact(TARGET, ("fp32", "q4", "q8")).artifact, SCHEMES)


@pytest.fixture(scope="module")
def target(random_artifact: Callable[..., Exported]) -> Path:
    return random_artifact(TARGET, ("fp32", "q4", "q8")).artifact


def streams(count: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((count, len(LAYERS) * 64)).astype(np.float32)


def eager(net: Lfm2DSparkDraftModel, context: np.ndarray, anchor: int) -> tuple[list[int], np.ndarray]:
    empty = torch.zeros(1, 2, 0, 32)
    with torch.no_grad():
        found, _ = net(
            torch.from_numpy(context)[None],
            torch.tensor([anchor]),
            dict.fromkeys(range(2), (empty, empty)),
            torch.tensor([0]),
        )
    assert found.confidence is not None
    return found.tokens.tolist(), found.confidence.numpy()


def stored_net(folder: Path, scheme: str, checkpoint: Path, target: Path) -> Lfm2DSparkDraftModel:
    """The eager drafter with the weights that a program's nodes read."""
    program = Artifact.open(folder).program("onnx", scheme)
    config = open_checkpoint(checkpoint, target=target).config
    return load_draft_model(get_backend("onnx").stored_weights(folder, program, config))


@shows(of("kernels", {"stock": "ours", "auto": "ours-own"}.get), "proposals", family="lfm2_dspark", scheme=of("scheme"))
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_programs_propose_what_the_eager_drafter_with_their_weights_does(
    drafter: Exported, target: Path, scheme: str, kernels: str
):
    net = stored_net(drafter.artifact, scheme, drafter.checkpoint, target)
    runner = lfm2_export.load_drafter(drafter.artifact, scheme=scheme, kernels=kernels, threads=1)
    assert (runner.layers, runner.block_size, runner.width) == (LAYERS, 5, 192)
    context, worst, equal = streams(300), 0.0, 0
    for anchor, end in ((5, 1), (9, 4), (11, 290), (77, 300)):
        found = runner.propose(context[runner.held : end], anchor)
        tokens, confidence = eager(net, context[:end], anchor)
        equal += int(np.sum(found.tokens == tokens))
        # Behind a token that differs, all may.
        same = int(np.argmin([*(found.tokens == tokens), False])) + 1
        worst = max(worst, float(np.abs(found.confidence - confidence)[:same].max()))
    print(f"{scheme}, {kernels}: {equal} of 20 tokens, confidences differ by up to {worst:.1e}")
    assert worst < CLOSE[scheme]
    assert equal == 20 or scheme != "fp32"


def test_what_was_taken_back_is_forgotten_and_the_cache_is_what_counts(drafter: Exported):
    runner = lfm2_export.load_drafter(drafter.artifact, scheme="fp32", kernels="stock", threads=1)
    context = streams(12)
    runner.propose(context[:8], 5)
    kept = runner.propose(context[8:10], 7)
    runner.cut(8)
    assert runner.held == 8
    other = runner.propose(-context[8:10], 7)
    runner.cut(8)
    again = runner.propose(context[8:10], 7)
    np.testing.assert_array_equal(kept.confidence, again.confidence)
    assert np.abs(kept.confidence - other.confidence).max() > 1e-3


def test_the_manifest_says_whose_drafter_it_is(drafter: Exported, target: Path):
    programs = Artifact.open(drafter.artifact).programs
    assert [(program.scheme, program.kind) for program in programs] == [(s, DRAFTER) for s in ("q4", "q8", "fp32")]
    made = programs[0].options["drafter"]
    assert made["target"] == Artifact.open(target).manifest.checkpoint.digest
    assert (made["target_layers"], made["num_target_layers"], made["block_size"]) == (list(LAYERS), 5, 5)
    record = Artifact.open(drafter.artifact).manifest.checkpoint
    assert set(record.shards) == {"model.safetensors", "model_q4.onnx_data"}
    assert isinstance(record, CheckpointRecord)


def test_it_generates_no_text_by_itself(drafter: Exported, target: Path):
    with pytest.raises(ArtifactError, match="is a drafter, which generates no text by itself; give its model"):
        lfm2_export.load_runner(drafter.artifact)
    with pytest.raises(ArtifactError, match="onnx q4 is no drafter"):
        lfm2_export.load_drafter(target)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"target_layers": [5]}, "which names no block and layers of a target"),
        ({"target_layers": [[1]]}, "which names no block and layers of a target"),
        ({"target_layers": []}, "which names no block and layers of a target"),
        ({"block_size": 0}, "which names no block and layers of a target"),
        ({"num_target_layers": True}, "which names no block and layers of a target"),
        ({"target": 3}, "which does not say whose drafter it is"),
    ],
)
def test_a_manifest_that_describes_no_drafter_is_refused(drafter: Exported, changes: dict[str, object], text: str):
    manifest = json.loads((drafter.artifact / MANIFEST).read_text())
    manifest["programs"][0]["options"]["drafter"] |= changes
    with pytest.raises(ArtifactError, match=text):
        Manifest.from_json(json.dumps(manifest))


def test_a_graph_that_is_no_drafters_is_refused(drafter: Exported, target: Path, tmp_path: Path):
    """Its inputs, and what it gives where the manifest promises something else."""
    program = Artifact.open(drafter.artifact).program("onnx", "fp32")
    stranger = replace(program, graphs={MODEL: Artifact.open(target).program("onnx", "fp32").graphs[MODEL]})
    with pytest.raises(RunnerError, match="the graph has other inputs or outputs than a drafter"):
        get_backend("onnx").load_drafter(target, stranger)
    other = replace(program, options={"drafter": {**program.options["drafter"], "block_size": 4}})
    runner = get_backend("onnx").load_drafter(drafter.artifact, other)
    with pytest.raises(RunnerError, match=r"tokens came out as int64 \[5\], \[4\] expected"):
        runner.propose(streams(2), 5)
    assert runner.held == 0
