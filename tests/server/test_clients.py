"""Clients that go away, wait, come without a key, from elsewhere, or with something that is no request."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import openai
import pytest
from starlette.datastructures import Headers

from lfm2_export.server.access import Access
from lfm2_export.server.errors import ApiError
from lfm2_export.server.limits import Limits
from tests.server.conftest import Running, Serve
from tests.server.script_runner import ScriptRunner, scripted

HELLO: Any = [{"role": "user", "content": "Hello"}]
LONG = "word " * 2000
CHAT = "/v1/chat/completions"


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_generation(serve: Serve, stream: bool) -> None:
    server = serve(scripted(LONG, pause=0.005))
    body = {"messages": HELLO, "stream": stream, "max_tokens": 2000}
    if stream:
        with server.http().stream("POST", CHAT, json=body) as response:
            assert next(response.iter_lines()).startswith("data: ")
    else:
        with pytest.raises(httpx.ReadTimeout):
            server.http().post(CHAT, json=body, timeout=0.5)
    until(lambda: server.count("lfm2_abandoned_requests_total") == 1)
    stopped = server.count("lfm2_generated_tokens_total")
    time.sleep(0.3)
    print(f"{stopped:g} of 2000 tokens generated")
    assert server.count("lfm2_generated_tokens_total") == stopped < 1000
    assert server.count("lfm2_requests_running") == 0


def test_a_client_that_goes_away_while_it_waits_is_never_begun(serve: Serve) -> None:
    model = scripted(LONG, pause=0.002)
    server = serve(model, limits=Limits(queue=1))
    assert isinstance(model.runner, ScriptRunner)
    model.runner.gate.clear()
    first = threading.Thread(
        target=lambda: server.http().post(CHAT, json={"messages": HELLO, "max_tokens": 3}), daemon=True
    )
    first.start()
    until(lambda: server.count("lfm2_requests_running") == 1)
    with pytest.raises(httpx.ReadTimeout):
        server.http().post(CHAT, json={"messages": HELLO}, timeout=0.3)
    model.runner.gate.set()
    first.join(10)
    until(lambda: server.count("lfm2_abandoned_requests_total") == 1)
    assert server.count("lfm2_generated_tokens_total") == 3


def test_abandoned_requests_do_not_stay_in_the_queue(serve: Serve) -> None:
    """While no step ends each leaves with the next that comes; then all that are left leave at once."""
    model = scripted(LONG, pause=0.01)
    server = serve(model, limits=Limits(queue=1))
    assert isinstance(model.runner, ScriptRunner)
    model.runner.gate.clear()
    first = threading.Thread(
        target=lambda: server.http().post(CHAT, json={"messages": HELLO, "max_tokens": 200}), daemon=True
    )
    first.start()
    until(lambda: server.count("lfm2_requests_running") == 1)
    for gone in range(4):
        with pytest.raises(httpx.ReadTimeout):
            server.http().post(CHAT, json={"messages": HELLO}, timeout=0.3)
        until(lambda gone=gone: server.count("lfm2_abandoned_requests_total") == gone)
        until(lambda: server.count("lfm2_requests_waiting") == 1)
    model.runner.gate.set()
    until(lambda: server.count("lfm2_requests_waiting") == 0)
    assert server.count("lfm2_abandoned_requests_total") == 4
    assert server.count("lfm2_requests_running") == 1, "a control: no row was free meanwhile"
    first.join(10)


def test_a_full_queue_is_told_at_once(serve: Serve) -> None:
    model = scripted("Hi")
    server = serve(model, limits=Limits(queue=1))
    assert isinstance(model.runner, ScriptRunner)
    model.runner.gate.clear()
    answers: list[int] = []
    ask = lambda: answers.append(server.http().post(CHAT, json={"messages": HELLO}).status_code)  # noqa: E731
    waiting = [threading.Thread(target=ask) for _ in range(2)]
    for thread in waiting:
        thread.start()
    until(lambda: server.count("lfm2_requests_waiting") + server.count("lfm2_requests_running") == 2)
    with pytest.raises(openai.RateLimitError, match="2 requests for script come first"):
        server.openai().chat.completions.create(model="script", messages=HELLO)
    model.runner.gate.set()
    for thread in waiting:
        thread.join(10)
    assert answers == [200, 200]


def test_the_end_of_the_server_ends_answers_with_an_event(serve: Serve) -> None:
    server = serve(scripted(LONG, pause=0.005))
    with server.http().stream("POST", CHAT, json={"messages": HELLO, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        server.models.stop()
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["message"].startswith("the server is about to end")
    with pytest.raises(openai.InternalServerError, match="about to end"):
        server.openai().chat.completions.create(model="script", messages=HELLO)


def test_a_program_that_fails_is_told_and_the_next_request_answered(serve: Serve) -> None:
    model = scripted("Hi")
    server = serve(model)
    assert isinstance(model.runner, ScriptRunner)
    good, model.runner.logits_of = model.runner.logits_of, lambda row: 1 / 0  # type: ignore[method-assign]
    for stream in (False, True):
        response = server.http().post(CHAT, json={"messages": HELLO, "stream": stream})
        assert "internal error" in response.text
        assert "ZeroDivisionError" not in response.text
    model.runner.logits_of = good  # type: ignore[method-assign]
    assert server.http().post(CHAT, json={"messages": HELLO}).json()["choices"][0]["message"]["content"] == "Hi"


def test_a_key_is_asked_for_everywhere_but_for_health(serve: Serve) -> None:
    server = serve(scripted("Hi"), access=Access(key="secret-ü"))
    assert server.http().get("/health").status_code == 200
    for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Basic secret"}, {"Authorization": "Bearer"}):
        for path in ("/v1/models", "/metrics", "/nowhere"):
            response = server.http(**headers).get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError, match="no API key"):
        server.openai("other").models.list()
    plain = serve(scripted("Hi"), access=Access(key="secret"))
    assert plain.openai("secret").models.list().data[0].id == "script"


@pytest.mark.parametrize(
    ("key", "sent", "known"),
    [
        ("clé", "clé".encode(), True),
        ("clé", "clé".encode("latin-1"), True),  # a browser's
        ("à", "à".encode(), True),  # its last byte is a space in Latin-1
        ("ключ", "ключ".encode(), True),
        ("cl\udce9", b"cl\xe9", True),  # bytes of a command line that were no UTF-8
        ("cl\ud800", b"cl\xe9", False),
        ("clé", b"cle", False),
        ("clé", "clê".encode(), False),
    ],
)
def test_a_key_that_is_not_ascii_is_compared_as_bytes(key: str, sent: bytes, known: bool) -> None:
    headers = Headers(raw=[(b"host", b"localhost"), (b"authorization", b"Bearer " + sent)])
    with contextlib.nullcontext() if known else pytest.raises(ApiError, match="no API key, or another one"):
        Access(key=key).check("/v1/models", headers)


@pytest.fixture(scope="module")
def server(serve: Serve) -> Running:
    return serve(scripted("Hi"), limits=Limits(body=20_000, tokens=50))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost"}, 200),
        ({"Host": "127.0.0.1:80"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "attacker.example:8000"}, 403),
        ({"Host": "127.0.0.1.attacker.example"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Host": "localhost", "Origin": "http://localhost:3000"}, 403),
        ({"Host": "localhost", "Origin": "null"}, 403),
    ],
)
def test_pages_of_the_web_are_not_answered(server: Running, headers: dict[str, str], status: int) -> None:
    response = server.http(**headers).get("/v1/models")
    assert response.status_code == status
    assert "access-control-allow-origin" not in response.headers


def test_an_origin_that_is_allowed_is_answered(serve: Serve) -> None:
    origin = "http://localhost:3000"
    server = serve(scripted("Hi"), access=Access(origins=(origin,), key="secret"))
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    assert server.http(**asked).options(CHAT).status_code == 200
    response = server.http(Origin=origin).get("/v1/models")
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (401, origin)
    assert server.http(Origin="http://other", Authorization="Bearer secret").get("/v1/models").status_code == 403


@pytest.mark.parametrize(
    ("change", "param", "fault"),
    [
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": "Hello"}, "messages", "at least one message"),
        ({"messages": ["Hello"]}, "messages[0]", "is not a message"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "is not one of system"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "assistant", "tool_calls": 1}]}, "messages[0].tool_calls", "is not a list"),
        ({"model": 3}, "model", "is not text"),
        ({"stream": "yes"}, "stream", "give true or false"),
        ({"stream": True, "stream_options": 1}, "stream_options", "give an object"),
        ({"temperature": "hot"}, "temperature", "give a number from 0 to 2"),
        ({"temperature": 2.5}, "temperature", "give a number from 0 to 2"),
        ({"temperature": True}, "temperature", "give a number from 0 to 2"),
        ({"temperature": 10**400}, "temperature", "give a number from 0 to 2"),
        ({"temperature": -(10**400)}, "temperature", "give a number from 0 to 2"),
        ({"temperature": float("nan")}, "temperature", "give a number from 0 to 2"),
        ({"top_p": -1}, "top_p", "from 0 to 1"),
        ({"max_tokens": 0}, "max_tokens", "an integer from 1 up"),
        ({"max_tokens": 51}, "max_tokens", "this server gives 50 at most"),
        ({"max_completion_tokens": 51}, "max_tokens", "this server gives 50 at most"),
        ({"seed": "x"}, "seed", "give an integer"),
        ({"n": 2}, "n", "one answer a request"),
        ({"n": True}, "n", "one answer a request"),
        ({"frequency_penalty": 1}, "frequency_penalty", "use repetition_penalty"),
        ({"presence_penalty": 0.1}, "presence_penalty", "use repetition_penalty"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "leave it out"),
        ({"response_format": "json"}, "response_format", "is not text, json_object, or json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "with its schema"),
        ({"stop": 3}, "stop", "a string or a list"),
        ({"stop": [""]}, "stop", "of 1 to 256 characters"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"chat_template_kwargs": 1}, "chat_template_kwargs", "give an object"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "not Unicode text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "parts of type text only"),
    ],
)
def test_what_is_wrong_with_a_request_is_named(server: Running, change: dict[str, Any], param: str, fault: str) -> None:
    response = server.http().post(CHAT, content=json.dumps({"messages": HELLO} | change))
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert fault in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"prompt": None}, "give some text, or a list of token ids"),
        ({"prompt": ["a", "b"]}, "2 prompts; give one a request"),
        ({"prompt": [10**9]}, "is not in the vocabulary"),
        ({"prompt": [-1]}, "is not in the vocabulary"),
        ({"echo": True}, "the prompt is not repeated"),
        ({"suffix": "x"}, "text is continued only"),
        ({"best_of": 2}, "one answer a request"),
        ({"logprobs": 6}, "from 0 to 5"),
    ],
)
def test_what_is_wrong_with_a_completion_is_named(server: Running, change: dict[str, Any], fault: str) -> None:
    response = server.http().post("/v1/completions", json={"prompt": "a"} | change)
    assert response.status_code == 400
    assert fault in response.json()["error"]["message"]


def test_null_and_unknown_fields_change_nothing(server: Running) -> None:
    nothing = dict.fromkeys(
        ("temperature", "stop", "seed", "tools", "n", "logit_bias", "response_format", "max_tokens")
    )
    body = {"messages": HELLO, "user": "me", "nobody_knows": [1], "presence_penalty": 0, "n": 1, **nothing}
    assert server.http().post(CHAT, json=body).json()["choices"][0]["message"]["content"] == "Hi"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"[" * 10_000, b'{"messages": NaN,}', b"3"])
def test_what_is_no_json_object_is_a_400(server: Running, data: bytes) -> None:
    response = server.http().post(CHAT, content=data)
    assert response.status_code == 400
    assert response.json()["error"]["message"].endswith(("give one JSON object", '{"messages": [...]}'))


def test_a_body_that_is_too_large_is_a_413_however_it_is_sent(server: Running) -> None:
    for content in (b" " * 20_001, iter([b" " * 10_000] * 3)):
        response = server.http().post(CHAT, content=content)
        assert response.status_code == 413
        assert "more than 20000 bytes; shorten it" in response.json()["error"]["message"]


def test_other_paths_and_methods_are_told_as_json(server: Running) -> None:
    assert server.http().get("/v1/nowhere").json()["error"]["message"] == "GET /v1/nowhere: there is no such path here"
    wrong = server.http().get(CHAT)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["message"] == f"GET {CHAT}: takes another method"
    assert server.http().get("/v1/models/none").status_code == 404
