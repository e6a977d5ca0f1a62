"""What a request may take before it reaches a program's queue: texts that cannot fit, schemas that are too large."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

import httpx2 as httpx
import openai
import pytest
import tokenizers

from lfm2_export.server import chat_answer, preparing
from lfm2_export.server.limits import Limits
from lfm2_export.text import Tokenizer
from tests.hash_runner import TOKENIZER
from tests.server.conftest import Running, Serve
from tests.server.script_runner import scripted
from tests.server.test_clients import CHAT, HELLO, until
from tests.test_constraints import chain, wide

PLAIN = "/v1/completions"


@pytest.fixture(scope="module")
def server(serve: Serve) -> Running:
    return serve(scripted("Hi"))


def slow(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[int]]:
    """A chat is prepared when the event comes; how many are at once, each time one begins."""
    gate, counts, inside, lock = threading.Event(), list[int](), [0], threading.Lock()
    prepare = chat_answer.prepare

    def waiting(*asked: Any) -> Any:
        with lock:
            inside[0] += 1
            counts.append(inside[0])
        gate.wait(20)
        with lock:
            inside[0] -= 1
        return prepare(*asked)

    monkeypatch.setattr(chat_answer, "prepare", waiting)
    return gate, counts


@pytest.mark.parametrize(("path", "param"), [(CHAT, "messages"), (PLAIN, "prompt")])
def test_a_text_that_cannot_fit_is_never_tokenized(
    server: Running, monkeypatch: pytest.MonkeyPatch, path: str, param: str
) -> None:
    monkeypatch.setattr(Tokenizer, "encode", lambda *_, **__: pytest.fail("it was tokenized"))
    text = "a1" * 300_000
    body = {"prompt": text} if path == PLAIN else {"messages": [{"role": "user", "content": text}]}
    response = server.http().post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, "context_length_exceeded")
    assert "bytes, more than fit the model's context" in error["message"]


def test_no_token_stands_for_more_bytes_than_the_bound() -> None:
    texts = [" " * 5000, "-" * 5000, "word " * 500, "Ωß漢字🙂" * 300, "<|im_end|>" * 200]
    for text in texts:
        count = len(TOKENIZER.encode(text, add_special_tokens=False))
        assert len(text.encode()) <= count * preparing._most_bytes(TOKENIZER)


@pytest.mark.parametrize(
    ("change", "keeps"),
    [
        ({}, True),
        ({"normalizer": {"type": "NFC"}}, False),
        ({"pre_tokenizer": {"type": "Whitespace"}}, False),
        ({"model": {"type": "BPE", "unk_token": "<unk>"}}, False),
        ({"model": {"type": "WordPiece", "unk_token": "<unk>"}}, False),
        ({"added_tokens": [{"lstrip": True}]}, False),
    ],
)
def test_a_tokenizer_that_drops_or_changes_text_gets_slack(change: Mapping[str, Any], keeps: bool) -> None:
    assert preparing._keeps_bytes({**json.loads(TOKENIZER.to_json()), **change}) is keeps


def test_spaces_that_a_tokenizer_drops_do_not_make_a_text_too_long() -> None:
    dropping = json.loads(TOKENIZER.to_json()) | {"pre_tokenizer": {"type": "Whitespace"}}
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(dropping)), {}, {}, "made")
    assert preparing._most_bytes(tokenizer) >= 16 * preparing._most_bytes(TOKENIZER)


def asked(server: Running, count: int) -> tuple[list[threading.Thread], list[int]]:
    statuses: list[int] = []
    ask = lambda: statuses.append(server.http().post(CHAT, json={"messages": HELLO}).status_code)  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, statuses


def joined(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(20)


def test_two_are_prepared_at_a_time(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(scripted("Hi"))
    gate, counts = slow(monkeypatch)
    threads, statuses = asked(server, 6)
    until(lambda: len(counts) == 2)
    gate.set()
    joined(threads)
    assert statuses == [200] * 6
    assert max(counts) == 2


def test_too_many_that_are_not_prepared_are_told_at_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(scripted("Hi"), limits=Limits(queue=3))
    gate, _ = slow(monkeypatch)
    threads, statuses = asked(server, 9)
    until(lambda: len(statuses) == 5)
    assert statuses == [429] * 5, "one at a time is answered, three wait"
    gate.set()
    joined(threads)
    assert sorted(statuses) == [200] * 4 + [429] * 5


def test_one_whose_client_went_away_is_not_prepared(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(scripted("Hi"))
    gate, counts = slow(monkeypatch)
    threads, statuses = asked(server, 2)
    until(lambda: len(counts) == 2)
    with pytest.raises(httpx.ReadTimeout):
        server.http().post(CHAT, json={"messages": HELLO}, timeout=0.3)
    gate.set()
    joined(threads)
    until(lambda: 'status="499"' in server.http().get("/metrics").text)
    assert (statuses, len(counts)) == ([200, 200], 2)


def form(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}}


def forced(*schemas: Any) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": one}} for i, one in enumerate(schemas)]
    return {"tools": tools, "tool_choice": "required"}


def matryoshka(depth: int) -> dict[str, Any]:
    """Lists in lists, each of the same ten types: a grammar's rules would be a power of ten."""
    return {"type": ["array"] * 10, "items": matryoshka(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (form(chain(1000)), "response_format: schema: has more than 2000|response_format: schema: is more than 256"),
        (form(chain(600)), "response_format: schema: is more than 256 levels deep"),
        (form(wide(10_000)), "response_format: schema: has more than 2000 properties"),
        (forced(chain(600)), "tool_choice: schema: is more than 256 levels deep"),
        (forced(wide(10_000)), "tool_choice: schema: has more than 2000 properties"),
        (forced(*[wide(100)] * 100), "tool_choice: schema: the tools have 10100 parts, more than 3000"),
        (forced({"properties": {"a": matryoshka(8)}}), "tool_choice: schema: type .* names one twice"),
    ],
)
def test_a_schema_that_is_too_large_or_too_deep_is_refused_and_the_server_lives(
    server: Running, options: dict[str, Any], fault: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=fault):
        server.openai().chat.completions.create(model="script", messages=HELLO, **options)
    assert server.http().get("/health").status_code == 200
