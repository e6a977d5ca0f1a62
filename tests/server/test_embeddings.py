"""Embeddings through OpenAI's client are those of the encoder itself."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import httpx2 as httpx
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
from tests.server.test_clients import until
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


def test_vectors_of_many_texts_are_in_the_texts_order(server: Running, embedder: lfm2_export.Encoder) -> None:
    """More than are computed at once, of every length."""
    texts = [f"{index} " + "word " * (index * 37 % 101) for index in range(80)]
    answer = server.openai().embeddings.create(model="embedding", input=texts)
    assert [one.index for one in answer.data] == list(range(80))
    assert np.abs(np.array([one.embedding for one in answer.data]) - embedder.encode(texts)).max() < 1e-6
    assert answer.usage.prompt_tokens == sum(len(embedder.preparation.tokens(one, query=False).ids) for one in texts)


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


class SlowEncoder:
    """An encoder whose every text takes some time; ``texts`` are those that it has begun."""

    is_late_interaction = False
    runner = SimpleNamespace(context_length=512)
    preparation = SimpleNamespace(tokens=lambda text, query: SimpleNamespace(ids=[1]))

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def encode(self, texts: Sequence[str], *, query: bool = False) -> np.ndarray:
        for text in texts:
            self.texts.append(text)
            self.gate.wait()
            time.sleep(0.002)
        return np.array([[len(text)] for text in texts], np.float32)


@pytest.fixture
def slow() -> Iterator[SlowEncoder]:
    encoder = SlowEncoder()
    yield encoder
    encoder.gate.set()


def serving(serve: Serve, encoder: SlowEncoder, queue_limit: int = 4) -> Running:
    queue = EncoderQueue("slow", cast(lfm2_export.Encoder, encoder), queue_limit=queue_limit)
    return serve(scripted("Hi"), encoders=[queue])


def asked(server: Running, texts: list[str], timeout: float = 20) -> httpx.Response:
    with server.http() as client:
        return client.post("/v1/embeddings", json={"model": "slow", "input": texts}, timeout=timeout)


def test_a_client_that_goes_away_ends_its_embeddings(serve: Serve, slow: SlowEncoder) -> None:
    server = serving(serve, slow)
    with pytest.raises(httpx.ReadTimeout):
        asked(server, ["x"] * 2000, timeout=0.3)
    assert asked(server, ["mine"]).json()["data"][0]["embedding"] == [4]
    begun = len(slow.texts)
    time.sleep(0.3)
    print(f"{begun - 1} of 2000 texts computed for nobody")
    assert len(slow.texts) == begun < 1000
    assert slow.texts[-1] == "mine"


def test_a_client_that_goes_away_while_it_waits_takes_nothing(serve: Serve, slow: SlowEncoder) -> None:
    """Not the encoder's time, nor a place in the queue, however many go."""
    server = serving(serve, slow, queue_limit=1)
    slow.gate.clear()
    answers: list[int] = []
    first = threading.Thread(target=lambda: answers.append(asked(server, ["first"]).status_code))
    first.start()
    until(lambda: slow.texts == ["first"])
    for _ in range(4):
        with pytest.raises(httpx.ReadTimeout):
            asked(server, ["gone"], timeout=0.3)
    slow.gate.set()
    first.join(10)
    assert asked(server, ["mine"]).status_code == 200
    assert (answers, slow.texts) == ([200], ["first", "mine"])


def test_the_end_of_the_server_ends_embeddings(serve: Serve, slow: SlowEncoder) -> None:
    server = serving(serve, slow)
    answers: list[httpx.Response] = []
    asking = [threading.Thread(target=lambda: answers.append(asked(server, ["x"] * 2000))) for _ in range(2)]
    for thread in asking:
        thread.start()
    until(lambda: len(slow.texts) > 0)
    server.models.stop()
    for thread in asking:
        thread.join(10)
    assert len(slow.texts) < 1000
    for answer in (*answers, asked(server, ["x"])):
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
        assert "about to end; ask another one" in answer.json()["error"]["message"]
    assert len(answers) == 2
