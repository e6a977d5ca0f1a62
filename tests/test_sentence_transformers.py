"""An artifact as a model of sentence-transformers, on our runner."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import lfm2_export
from lfm2_export.errors import ArtifactError
from tests.conftest import Exported
from tests.encoder_checkpoints import COLBERT, EMBEDDING
from tests.shows import shows

pytest.importorskip("sentence_transformers", reason="pip install 'sentence-transformers>=6.2'")

TEXTS = ["What is a dictionary?", "A list holds items, in order. " * 40, "x"]


@shows("sentence-transformers", "embeddings", "padding", family="lfm2_bidirectional", scheme="fp32")
def test_encodes_with_the_checkpoints_prompts(encoder: Callable[..., Exported]) -> None:
    from lfm2_export.sentence_transformers import load

    folder = encoder(EMBEDDING).artifact
    model, ours = load(folder), lfm2_export.load_encoder(folder)
    queries, documents = model.encode_query(TEXTS), model.encode_document(TEXTS, batch_size=2)
    assert np.abs(queries - ours.encode(TEXTS, query=True)).max() < 1e-6
    assert np.abs(documents - ours.encode(TEXTS)).max() < 1e-6
    assert np.abs(model.encode(TEXTS) - queries).max() > 0.01, "without a prompt"
    assert (model.max_seq_length, model.get_embedding_dimension()) == (512, 64)
    assert model.similarity(queries, documents).numpy() == pytest.approx(queries @ documents.T, abs=1e-6)
    tokens = model.encode(TEXTS[0], output_value="token_embeddings")
    assert tuple(tokens.shape) == (len(ours.preparation.cut(TEXTS[0], 512)), 64)


def test_its_length_can_be_set(encoder: Callable[..., Exported]) -> None:
    from lfm2_export.sentence_transformers import load

    model = load(encoder(EMBEDDING).artifact)
    model.max_seq_length = 5
    assert model.preprocess([TEXTS[1]])["input_ids"].shape == (1, 5)


def test_other_settings(encoder: Callable[..., Exported], tmp_path: Path) -> None:
    from lfm2_export.sentence_transformers import load

    shutil.copytree(encoder(EMBEDDING).artifact, tmp_path / "a")
    settings = {"prompts": {"query": "q: "}, "default_prompt_name": "query", "similarity_fn_name": "dot"}
    (tmp_path / "a/config_sentence_transformers.json").write_text(json.dumps(settings))
    model = load(tmp_path / "a")
    assert (str(model.similarity_fn_name), model.default_prompt_name) == ("dot", "query")
    (tmp_path / "a/config_sentence_transformers.json").unlink()
    assert str(load(tmp_path / "a").similarity_fn_name) == "cosine"


def test_what_it_cannot_be(encoder: Callable[..., Exported], tmp_path: Path) -> None:
    from lfm2_export.sentence_transformers import load

    with pytest.raises(ArtifactError, match="has no vector for a whole text; use"):
        load(encoder(COLBERT).artifact)
    with pytest.raises(ArtifactError, match="an exported encoder is saved by copying"):
        load(encoder(EMBEDDING).artifact).save(str(tmp_path / "copy"))
