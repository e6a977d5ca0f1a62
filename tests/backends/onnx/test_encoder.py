"""Encoders as ONNX programs: every scheme, every head, padding on both sides, on onnxruntime and through our runner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import lfm2_export
from lfm2_export.backends.onnx import stored_weights
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.errors import ArtifactError, RunnerError
from lfm2_export.manifest import ENCODER, MODEL
from lfm2_export.models.loading import load_encoder_model
from lfm2_export.parity.encoder import cosine_distances, eager, max_abs_error, padded, unpadded
from tests import encoder_reference as reference
from tests.conftest import Exported
from tests.encoder_checkpoints import COLBERT, EMBEDDING, KINDS, MASKED_LM, WIDTH, write_encoder
from tests.shows import of, shows

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEMES = ("fp32", "fp16", "q8", "q4", "q4f16")
Encoders = Callable[..., Exported]
# Mean 1 - cosine between the program and the eager model with its weights; measured: 5e-7 for fp16, 1e-4 to 3e-3 for
# int8 activations on 64 random values a token.
LOWERING = {"fp16": 5e-6, "q8": 2e-3, "q4": 1e-2, "q4f16": 5e-3}


def rows_of(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, 2600, length) for length in lengths]


def session_outputs(folder: Path, ids: np.ndarray, mask: np.ndarray, graph: str = "onnx/model.onnx") -> dict[str, Any]:
    session = ort.InferenceSession(folder / graph, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(names, {"input_ids": ids, "attention_mask": mask}), strict=True))


@pytest.fixture(scope="module")
def exported(encoder: Encoders) -> Callable[[str], Exported]:
    return lambda kind: encoder(kind, SCHEMES if kind == EMBEDDING else ("fp32", "q4"))


@shows("onnxruntime", "embeddings", "padding", family="lfm2_bidirectional", scheme="fp32")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_float32_is_the_reference_in_a_padded_batch(exported, kind: str, left: bool) -> None:
    made = exported(kind)
    rows = rows_of(1, 9, 4, 600)
    ids, mask = padded(rows, left=left)
    found = unpadded(session_outputs(made.artifact, ids, mask), mask)
    expected = [reference.outputs(made.checkpoint, row) for row in rows]
    for name in expected[0]:
        error = max_abs_error(found, expected, name)
        print(f"{name}: {error:.1e}")
        assert error < (1e-4 if name == "logits" else 1e-5)
    unmasked = unpadded(session_outputs(made.artifact, ids, np.ones_like(mask)), mask)
    assert max_abs_error(unmasked, expected, "last_hidden_state") > 0.1, "the comparison can fail"


@pytest.mark.parametrize("width", [4, 7])
def test_other_conv_widths(tmp_path: Path, width: int) -> None:
    folder = write_encoder(tmp_path / "c", EMBEDDING, conv_L_cache=width, conv_bias=True, num_key_value_heads=1)
    lfm2_export.export(folder, scheme="fp32", output=tmp_path / "out")
    rows = rows_of(1, 12)
    ids, mask = padded(rows, left=True)
    found = unpadded(session_outputs(tmp_path / "out", ids, mask), mask)
    expected = [reference.outputs(folder, row) for row in rows]
    assert max_abs_error(found, expected, "last_hidden_state") < 1e-5


def test_expansion_tokens(exported) -> None:
    made = exported(COLBERT)
    (row,) = rows_of(10)
    attended = np.arange(10) < 6
    found = session_outputs(made.artifact, row[None], np.where(attended, 1, 2)[None])
    expected = reference.outputs(made.checkpoint, row, attended)
    assert np.abs(found["token_embeddings"][0] - expected["token_embeddings"]).max() < 1e-5


@shows("onnxruntime", "embeddings", "padding", family="lfm2_bidirectional", scheme=of("scheme"))
@pytest.mark.parametrize("scheme", SCHEMES[1:])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_other_schemes_compute_with_their_weights(exported, scheme: str, left: bool) -> None:
    made = exported(EMBEDDING)
    artifact = lfm2_export.Artifact.open(made.artifact)
    program = artifact.program("onnx", scheme)
    config = open_checkpoint(made.checkpoint).config
    model = load_encoder_model(stored_weights(made.artifact, program, config))
    rows = rows_of(1, 9, 4, 200)
    expected, (ids, mask) = eager(model, rows), padded(rows, left=left)
    found = unpadded(session_outputs(made.artifact, ids, mask, program.graphs[MODEL]), mask)
    other = eager(model, [row[::-1].copy() for row in rows])
    for name in expected[0]:
        assert found[0][name].dtype == np.float32
        distance = cosine_distances(found, expected, name).mean()
        print(f"{scheme} {name}: {distance:.1e}")
        assert distance < LOWERING[scheme] < cosine_distances(found, other, name).mean()


@shows("ours", "embeddings", family="lfm2_bidirectional", scheme="q4")
@pytest.mark.parametrize("kind", [COLBERT, MASKED_LM])
def test_quantized_heads(exported, kind: str) -> None:
    made = exported(kind)
    artifact = lfm2_export.Artifact.open(made.artifact)
    program = artifact.program("onnx", "q4")
    model = load_encoder_model(stored_weights(made.artifact, program, open_checkpoint(made.checkpoint).config))
    rows = rows_of(7, 30)
    expected = eager(model, rows)
    found = lfm2_export.load_encoder(artifact, scheme="q4").run(rows)
    for name in expected[0]:
        assert cosine_distances(found, expected, name).mean() < LOWERING["q4"]


def test_the_manifest_says_what_it_is(exported) -> None:
    shapes = {
        EMBEDDING: {"sentence_embedding": ("batch_size", 64)},
        COLBERT: {"token_embeddings": ("batch_size", "sequence_length", WIDTH)},
        MASKED_LM: {"logits": ("batch_size", "sequence_length", 2662)},
    }
    for kind, more in shapes.items():
        artifact = lfm2_export.Artifact.open(exported(kind).artifact)
        program = artifact.program("onnx", "fp32")
        assert (program.kind, program.cache.tensors) == (ENCODER, ())
        assert {one.name: one.shape for one in program.outputs} == {
            "last_hidden_state": ("batch_size", "sequence_length", 64),
            **more,
        }
        assert (program.operators["MultiHeadAttention"], program.operators["CausalConvWithState"]) == (1, 2)
        assert not list(artifact.path.glob("genai_config.json"))
        assert not list(artifact.path.glob("onnx/*lfm2*"))


def test_files_are_named_as_transformers_js_wants_them(exported) -> None:
    names = {path.name for path in (exported(EMBEDDING).artifact / "onnx").iterdir()}
    graphs = {"model.onnx", "model_fp16.onnx", "model_quantized.onnx", "model_q4.onnx", "model_q4f16.onnx"}
    assert names == graphs | {f"{name}_data" for name in graphs}


def test_a_graph_of_something_else_is_refused(exported, tmp_path: Path) -> None:
    """A manifest that says other outputs than the graph has."""
    from dataclasses import replace

    from lfm2_export.backends.onnx import load_encoder

    artifact = lfm2_export.Artifact.open(exported(EMBEDDING).artifact)
    program = artifact.program("onnx", "fp32")
    with pytest.raises(RunnerError, match="the graph has other inputs or outputs than an encoder"):
        load_encoder(artifact.path, replace(program, outputs=program.outputs[:1]))
    wrong = (program.outputs[0], replace(program.outputs[1], shape=("batch_size", 3)))
    with pytest.raises(RunnerError, match=r"sentence_embedding is .* the last 3, expected"):
        load_encoder(artifact.path, replace(program, outputs=wrong))
    with pytest.raises(ArtifactError, match="no such program"):
        load_encoder(tmp_path, program)
