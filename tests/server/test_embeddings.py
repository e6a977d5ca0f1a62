"""Embeddings through OpenAI's client are those of the encoder itself."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import openai
import pytest

import lfm2_export
from lfm2_export.errors import RunnerError
from lfm2_export.server.embeddings import EncoderQueue
from tests.conftest import Exported
from tests.encoder_checkpoints import COLBERT, EMBEDDING
from tests.server.conftest import Running, Serve
from tests.server.script_runner import scripted
from tests.shows import shows

TEXTS = ["What is a dictionary?", "A list holds items. " * 20, "x"]


@pytest.fixture(scope="module")
def embedder(encoder: Callable[..., Exported]) -> lfm2_export.Encoder:
    return lfm2_export.load_encoder(encoder(EMBEDDING).artifact)


@pytest.fixture(scope="module")
def server(serve: Serve, embedder: lfm2_export.Encoder) -> Running:
    return serve(scripted("Hi"), encoders=[EncoderQueue("embedding", embedder, queue_limit=4)])


@shows("serve", "embeddings", family="lfm2_bidirectional", scheme="fp32")
@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_vectors_are_the_encoders(server: Running, embedder: lfm2_export.Encoder, encoding: Any) -> None:
    options = {} if encoding is None else {"encoding_format": encoding}
    answer = server.openai().embeddings.create(model="embedding", input=TEXTS, **options)
    found = [one.embedding for one in answer.data]
    if encoding == "base64":  # asked for by name it stays as it came
        found = [np.frombuffer(base64.b64decode(one), "<f4") for one in found]  # type: ignore[arg-type]
    assert np.abs(np.array(found) - embedder.encode(TEXTS)).max() < 1e-6
    assert answer.usage.prompt_tokens > 60


def test_a_query_has_its_own_prompt(server: Running, embedder: lfm2_export.Encoder) -> None:
    create = server.openai().embeddings.create
    found = np.array(create(model="embedding", input="x", extra_body={"input_type": "query"}).data[0].embedding)
    assert np.abs(found - embedder.encode("x", query=True)).max() < 1e-6
    assert np.abs(found - embedder.encode("x")).max() > 1e-3, "a control: a document's is another"


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ({"input": []}, "input: .* give a text or a list of texts"),
        ({"input": [1, 2]}, "input: .* give a text or a list of texts"),
        ({"input": [""]}, "none of them empty"),
        ({"input": "x", "dimensions": 8}, "dimensions: 8 is not supported"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format: 'int8' is not one of float, base64"),
        ({"input": "x", "model": "script"}, "script gives no embeddings"),
    ],
)
def test_what_is_wrong_is_named(server: Running, body: dict[str, Any], fault: str) -> None:
    with pytest.raises(openai.BadRequestError, match=fault):
        server.openai().post("/embeddings", body={"model": "embedding"} | body, cast_to=object)


def test_an_encoder_is_listed_and_does_not_chat(server: Running) -> None:
    assert [model.id for model in server.openai().models.list().data] == ["script", "embedding"]
    with pytest.raises(openai.BadRequestError, match="embedding is an encoder; use /v1/embeddings"):
        server.openai().chat.completions.create(model="embedding", messages=[{"role": "user", "content": "x"}])


def test_a_vector_a_token_is_refused_at_the_start(encoder: Callable[..., Exported]) -> None:
    colbert = lfm2_export.load_encoder(encoder(COLBERT).artifact)
    with pytest.raises(RunnerError, match="a vector a token, which OpenAI's API cannot say"):
        EncoderQueue("colbert", colbert, queue_limit=1)
