"""Answers that must be JSON of a schema are, whatever the model would have said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.conftest import Running, Serve
from tests.server.script_runner import scripted

QUESTION: Any = [{"role": "user", "content": "What is a dictionary?"}]
PERSON = {
    "type": "object",
    "properties": {"kind": {"enum": ["thing", "person"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}


def form(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


def ask(server: Running, model: str = "tiny-dense", **options: Any) -> Any:
    return server.openai().chat.completions.create(model=model, messages=QUESTION, max_tokens=200, **options)


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_keeps_its_schema(server: Running, folder: Path, temperature: float) -> None:
    for seed in range(4):
        choice = ask(server, response_format=form(PERSON), temperature=temperature, seed=seed).choices[0]
        answer = json.loads(choice.message.content)
        assert (choice.finish_reason, set(answer)) == ("stop", {"kind", "count"})
        assert answer["kind"] in ("thing", "person")
        assert 0 <= answer["count"] <= 99
    with pytest.raises(json.JSONDecodeError):  # a control: without a schema
        json.loads(ask(server, temperature=temperature, seed=0).choices[0].message.content)


def test_an_object_is_an_object(server: Running) -> None:
    choice = ask(server, response_format={"type": "json_object"}).choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    else:
        assert choice.message.content.startswith("{"), "a small model's strings may go on and on"


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        ({"type": "nonsense"}, "Invalid type: nonsense"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "Unsatisfiable"),
    ],
)
def test_a_schema_that_cannot_be_met_is_refused(server: Running, schema: Any, fault: str) -> None:
    with pytest.raises(openai.BadRequestError, match=f"response_format: schema: .*{fault}.*; change it"):
        ask(server, response_format=form(schema))


def test_tools_beside_a_schema_are_refused(server: Running) -> None:
    tools: Any = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(openai.BadRequestError, match="response_format: tools could not be called in this form"):
        ask(server, tools=tools, response_format={"type": "json_object"})


def test_an_answer_that_fits_by_itself_is_left_as_it_is(serve: Serve) -> None:
    server = serve(scripted('{"kind": "thing", "count": 7}'))
    assert json.loads(ask(server, "script", response_format=form(PERSON)).choices[0].message.content)["count"] == 7
