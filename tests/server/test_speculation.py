"""Answers of models that speculate are those of models that do not: across turns that share a state, with clients that
go away, and whatever a request asks of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lfm2_export
from lfm2_export.backends.onnx import variants
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.server.served import Model
from lfm2_export.speculation import Drafter, ModelDrafter, PromptLookup, Report, SpeculativeRunner, StreamDrafter
from lfm2_export.speculation.controller import Always
from tests.server.conftest import Running, Serve, opened
from tests.server.test_clients import until

pytestmark = pytest.mark.skipif(variants.own_library() is None, reason="no compiler for our operators")

CHAT = "/v1/chat/completions"
LIST = "Say it twice: a.txt, b.txt, c.txt, d.txt. a.txt, b.txt,"
WORD: Any = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
ASKED: list[dict[str, Any]] = [
    {"max_tokens": 40},
    {"max_tokens": 40, "temperature": 0.8, "seed": 3},
    {"max_tokens": 30, "stop": ["txt", "zz"], "repetition_penalty": 1.1},
    {"max_tokens": 20, "logprobs": True, "top_logprobs": 2},
    {"max_tokens": 40, "response_format": {"type": "json_schema", "json_schema": {"name": "word", "schema": WORD}}},
]


def speculating(model: Model, drafter: Drafter) -> Model:
    controller = Always(most=6, report=Report(drafter=drafter.name))
    return replace(model, runner=SpeculativeRunner(model.runner, drafter, controller=controller))


@pytest.fixture(scope="module")
def drafters(artifact: Callable[[str], Path], taught: Path) -> dict[str, Callable[[], Drafter]]:
    return {
        "lookup": PromptLookup,
        "model": lambda: ModelDrafter(lfm2_export.load_runner(artifact("tiny-moe"), scheme="q4", threads=1)),
        "drafter": lambda: StreamDrafter(lfm2_export.load_drafter(taught, threads=1)),
    }


def conversation(server: Running) -> list[Any]:
    """What a client sees of it: every setting, turns that go on, and one that begins like another."""
    seen: list[Any] = []
    for settings in ASKED:
        messages: list[Any] = [{"role": "user", "content": LIST}]
        for text in ("And again?", "Once more."):
            answer = server.http().post(CHAT, json={"messages": messages, **settings}).json()
            message = answer["choices"][0]["message"]
            seen.append((answer["choices"], answer["usage"]))
            messages += [{"role": "assistant", "content": message["content"]}, {"role": "user", "content": text}]
    streamed = server.openai().completions.create(
        model=server.models.all()[0].model.name, prompt=LIST, max_tokens=40, stream=True
    )
    return [*seen, "".join(chunk.choices[0].text for chunk in streamed)]


@pytest.fixture(scope="module")
def plain(serve: Serve, folder: Path) -> list[Any]:
    return conversation(serve(opened(folder)))


@pytest.mark.parametrize("kind", ["lookup", "model", "drafter"])
def test_answers_are_those_without(
    serve: Serve, folder: Path, drafters: dict[str, Callable[[], Drafter]], plain: list[Any], kind: str
) -> None:
    """Usage, too: as many tokens came from kept states."""
    server = serve(speculating(opened(folder), drafters[kind]()))
    assert conversation(server) == plain
    proposed, accepted, passes = (
        server.count(f"lfm2_speculation_{name}_total") for name in ("proposed_tokens", "accepted_tokens", "passes")
    )
    print(f"{kind}: {accepted:g} of {proposed:g} proposals in {passes:g} passes")
    assert 0 < accepted < proposed
    assert passes > 10


def test_a_client_that_goes_away_ends_it_and_the_next_answer_is_right(serve: Serve, folder: Path, taught: Path) -> None:
    drafting = StreamDrafter(lfm2_export.load_drafter(taught, threads=1))
    endless = replace(opened(folder), settings=GenerationConfig())  # without tokens that end it
    server, control = serve(speculating(endless, drafting)), serve(replace(endless, runner=opened(folder).runner))
    body = {"prompt": LIST, "max_tokens": 4000, "stream": True}
    with server.http().stream("POST", "/v1/completions", json=body) as response:
        assert next(response.iter_lines()).startswith("data: ")
    until(lambda: server.count("lfm2_abandoned_requests_total") == 1)
    until(lambda: server.count("lfm2_requests_running") == 0)
    stopped = server.count("lfm2_speculation_passes_total")
    answers = [
        one.http().post("/v1/completions", json={"prompt": LIST, "max_tokens": 40}).json()["choices"][0]["text"]
        for one in (server, control)
    ]
    assert answers[0] == answers[1] != ""
    assert server.count("lfm2_speculation_passes_total") > stopped


def test_models_that_do_not_speculate_have_no_such_figures(serve: Serve, folder: Path) -> None:
    server = serve(opened(folder), speculating(opened(folder, "quick"), PromptLookup()))
    lines = [line for line in server.http().get("/metrics").text.splitlines() if line.startswith("lfm2_speculation")]
    assert {line.partition('model="')[2].partition('"')[0] for line in lines} == {"quick"}
    assert "lfm2_speculation" not in serve(opened(folder)).http().get("/metrics").text
