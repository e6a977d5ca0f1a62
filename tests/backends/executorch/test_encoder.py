"""Encoders as .pte: every head, rows of any length up to the context, and what is stored."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import lfm2_export
from lfm2_export.backends.executorch import stored_weights
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.cli import main
from lfm2_export.errors import ContextLimitError
from lfm2_export.models.loading import load_encoder_model
from lfm2_export.parity.encoder import cosine_distances, eager, max_abs_error, padded, unpadded
from tests import encoder_reference as reference
from tests.conftest import Exported
from tests.encoder_checkpoints import COLBERT, EMBEDDING, KINDS
from tests.shows import shows

pytest.importorskip("executorch")
pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 600
# Mean 1 - cosine between the program and the eager model with its weights, on 64 random values a token.
INT8_DISTANCE = 2e-2


@pytest.fixture(scope="module")
def exported(encoder: Callable[..., Exported]) -> Callable[[str], Exported]:
    schemes = {EMBEDDING: ("fp32", "8da4w")}
    options = {"backend": "executorch", "max_context": CONTEXT}
    return lambda kind: encoder(kind, schemes.get(kind, ("fp32",)), **options)


def rows_of(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, 2600, length) for length in lengths]


@shows("pte", "embeddings", family="lfm2_bidirectional", scheme="fp32")
@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_the_reference(exported, kind: str) -> None:
    made = exported(kind)
    rows = rows_of(1, 2, 9, CONTEXT)
    found = lfm2_export.load_encoder(made.artifact, scheme="fp32").run(rows)
    expected = [reference.outputs(made.checkpoint, row) for row in rows]
    for name in expected[0]:
        error = max_abs_error(found, expected, name)
        print(f"{name}: {error:.1e}")
        assert error < (1e-4 if name == "logits" else 1e-5)
        other = [reference.outputs(made.checkpoint, row[::-1]) for row in rows]
        assert max_abs_error(found, other, name) > 0.01, "the comparison can fail"


@shows("pte", "padding", family="lfm2_bidirectional", scheme="fp32")
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_rows_of_a_padded_batch_are_run_alone(exported, left: bool) -> None:
    made = exported(EMBEDDING)
    rows = rows_of(3, 17)
    ids, mask = padded(rows, left=left)
    found = unpadded(lfm2_export.load_encoder(made.artifact, scheme="fp32").runner.run(ids, mask), mask)
    expected = [reference.outputs(made.checkpoint, row) for row in rows]
    assert max_abs_error(found, expected, "sentence_embedding") < 1e-5


def test_the_program_itself_reads_the_mask(exported) -> None:
    """As an application calls it: one row, padded to the length that it has planned for."""
    made = exported(COLBERT)
    session = lfm2_export.load_encoder(made.artifact).runner._session
    (row,) = rows_of(20)
    attended = np.arange(20) < 12
    for mask in (np.where(attended, 1, 2), attended.astype(np.int64)):
        hidden, vectors = session.call("forward", [row[None], mask[None]])
        seen = row if mask.max() == 2 else row[:12]
        expected = reference.outputs(made.checkpoint, seen, attended[: len(seen)])
        assert np.abs(hidden[0, : len(seen)] - expected["last_hidden_state"]).max() < 1e-5
        assert np.abs(vectors[0, : len(seen)] - expected["token_embeddings"]).max() < 1e-5
        assert not vectors[0, len(seen) :].any()


@shows("pte", "embeddings", family="lfm2_bidirectional", scheme="8da4w")
def test_quantized_weights_are_what_it_computes_with(exported) -> None:
    made = exported(EMBEDDING)
    artifact = lfm2_export.Artifact.open(made.artifact)
    program = artifact.program("executorch", "8da4w")
    model = load_encoder_model(stored_weights(made.artifact, program, open_checkpoint(made.checkpoint).config))
    rows = rows_of(5, 80)
    found = lfm2_export.load_encoder(artifact, scheme="8da4w").run(rows)
    other = eager(model, [row[::-1].copy() for row in rows])
    for name in found[0]:
        distance = cosine_distances(found, eager(model, rows), name).mean()
        print(f"{name}: {distance:.1e}")
        assert distance < INT8_DISTANCE < cosine_distances(found, other, name).mean()


def test_longer_rows_are_refused(exported) -> None:
    encoder = lfm2_export.load_encoder(exported(EMBEDDING).artifact)
    assert encoder.runner.context_length == CONTEXT
    with pytest.raises(ContextLimitError, match=f"row 0: has {CONTEXT + 1} tokens, the model takes {CONTEXT}; cut it"):
        encoder.run(rows_of(CONTEXT + 1))


def test_embed_runs_it(exported, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", str(exported(EMBEDDING).artifact), "--scheme", "fp32", "--text", "hello"]) == 0
    assert len(capsys.readouterr().out.split()) == 64
