"""Tools and thinking through OpenAI's client; the replies are scripted, the way to the client is the server's."""

from __future__ import annotations

import copy
import json
from typing import Any

import openai
import pytest

from lfm2_export.generation_config import GenerationConfig
from lfm2_export.server.served import Model
from tests.hash_runner import TOKENIZER, HashRunner
from tests.server.conftest import Running, Serve
from tests.server.script_runner import scripted

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds numbers",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
                "required": ["a", "b"],
            },
        },
    }
]
ASKED: Any = [{"role": "user", "content": "What is 2 + 3?"}]
CALL = "<|tool_call_start|>[add(a=2, b=3)]<|tool_call_end|>"
BAD = '<|tool_call_start|>[add(a="two", b=3)]<|tool_call_end|>'


@pytest.fixture(scope="module")
def server(serve: Serve) -> Running:
    return serve(scripted(f"Wait. {CALL}", "It is 5.", BAD, "<think>\nHm.</think>\n\nYes."))


def chat(server: Running, messages: Any, **options: Any) -> Any:
    return server.openai().chat.completions.create(model="script", messages=messages, **options)


def test_a_tool_loop(server: Running) -> None:
    answer = chat(server, ASKED, tools=TOOLS).choices[0]
    (call,) = answer.message.tool_calls
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", "Wait. ")
    assert call.function.name == "add"
    arguments = json.loads(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": str(arguments["a"] + arguments["b"])}
    messages = [*ASKED, answer.message.model_dump(exclude_none=True), result]
    final = chat(server, messages, tools=TOOLS)
    assert final.choices[0].message.content == "It is 5."
    assert final.choices[0].finish_reason == "stop"
    assert final.usage.prompt_tokens_details.cached_tokens > 20, "what the model wrote is fed back as it wrote it"


def test_a_call_in_a_stream_comes_whole_and_its_markers_not_at_all(server: Running) -> None:
    chunks = [chunk.choices[0] for chunk in chat(server, ASKED, tools=TOOLS, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "Wait. "
    (call,) = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert (call.index, call.function.name, json.loads(call.function.arguments)) == (0, "add", {"a": 2, "b": 3})
    assert chunks[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("options", [{}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_markers_are_text(server: Running, options: dict[str, Any]) -> None:
    answer = chat(server, ASKED, **options).choices[0]
    assert answer.message.content == f"Wait. {CALL}"
    assert (answer.finish_reason, answer.message.tool_calls) == ("stop", None)
    streamed = "".join(c.choices[0].delta.content or "" for c in chat(server, ASKED, stream=True, **options))
    assert streamed == f"Wait. {CALL}"


@pytest.mark.parametrize("stream", [False, True])
def test_an_integer_of_any_length_is_an_argument(serve: Serve, stream: bool) -> None:
    server = serve(scripted(f"<|tool_call_start|>[add(a={10**330}, b=3)]<|tool_call_end|>"))
    answer = chat(server, ASKED, tools=TOOLS, stream=stream)
    messages = [chunk.choices[0].delta for chunk in answer] if stream else [answer.choices[0].message]
    (call,) = [call for message in messages for call in message.tool_calls or ()]
    assert json.loads(call.function.arguments) == {"a": 10**330, "b": 3}


def test_a_call_with_wrong_arguments_is_text(server: Running) -> None:
    messages = [*ASKED, *({"role": role, "content": "x"} for role in ("assistant", "user", "assistant", "user"))]
    answer = chat(server, messages, tools=TOOLS).choices[0]
    assert (answer.message.content, answer.finish_reason, answer.message.tool_calls) == (BAD, "stop", None)


def test_thinking_is_apart_from_the_answer(server: Running) -> None:
    messages = [*ASKED, *({"role": role, "content": "x"} for role in ("assistant", "user") * 3)]
    message = chat(server, messages).choices[0].message
    assert (message.content, message.reasoning_content) == ("Yes.", "Hm.")
    deltas = [chunk.choices[0].delta for chunk in chat(server, messages, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == "Yes."
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Hm."


OTHER: Any = {"type": "function", "function": {"name": "other", "parameters": {}}}


def noise() -> Model:
    """A model that never says anything of use."""
    settings = GenerationConfig(stop_token_ids=(TOKENIZER.token_id("<|im_end|>"),))
    return Model(name="noise", runner=HashRunner(TOKENIZER.vocab_size), tokenizer=TOKENIZER, settings=settings)


def test_a_call_that_must_be_made_is_made_whatever_the_model_would_say(serve: Serve) -> None:
    client = serve(noise()).openai()
    names = set()
    for seed in range(6):
        for choice in ("required", {"type": "function", "function": {"name": "add"}}):
            options: Any = {"tools": [*TOOLS, OTHER], "tool_choice": choice, "seed": seed, "temperature": 1}
            answer = client.chat.completions.create(
                model="noise", messages=ASKED, max_tokens=300, parallel_tool_calls=seed % 2 == 0, **options
            ).choices[0]
            assert answer.finish_reason == "tool_calls"
            assert not answer.message.content
            calls = answer.message.tool_calls or []
            assert len(calls) == 1 or (seed % 2 == 0 and choice == "required")
            for call in calls:
                names.add((call.function.name, choice == "required"))
                if call.function.name == "add":
                    assert {type(v) for v in json.loads(call.function.arguments).values()} <= {int, float}
    print(names)
    assert names == {("add", False), ("add", True), ("other", True)}
    free = client.chat.completions.create(model="noise", messages=ASKED, max_tokens=30, tools=TOOLS, seed=0)
    assert not free.choices[0].message.tool_calls


def test_a_forced_call_comes_behind_the_thinking_that_a_prompt_has_opened(serve: Serve) -> None:
    template = next(iter(TOKENIZER.chat_templates.values())) + "{{- '<think>' -}}"
    tokenizer = copy.copy(TOKENIZER)
    tokenizer._templates = {"default": template}
    script = scripted(f"<think>Hm.</think>{CALL}")
    model = Model(name="script", runner=script.runner, tokenizer=tokenizer, settings=script.settings)
    answer = chat(serve(model), ASKED, tools=TOOLS, tool_choice="required").choices[0]
    assert answer.message.reasoning_content == "Hm."
    assert json.loads(answer.message.tool_calls[0].function.arguments) == {"a": 2, "b": 3}


def test_a_model_whose_calls_have_no_known_form_cannot_be_forced(serve: Serve) -> None:
    class Without(type(TOKENIZER)):  # type: ignore[misc]
        def token_id(self, token: str) -> int | None:
            return None if token.startswith("<|tool_") else super().token_id(token)

    tokenizer = copy.copy(TOKENIZER)
    tokenizer.__class__ = Without
    model = Model(name="script", runner=scripted("a").runner, tokenizer=tokenizer, settings=scripted("a").settings)
    with pytest.raises(openai.BadRequestError, match="tool_choice: a call cannot be forced on this model"):
        chat(serve(model), ASKED, tools=TOOLS, tool_choice="required")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\]: .* is not a function"),
        ({"tools": [{"type": "function", "function": {}}]}, r"tools\[0\].function.name: is missing"),
        (
            {"tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "bogus"}}}]},
            r"tools\[0\].function.parameters: type 'bogus': arguments are an \"object\"",
        ),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice: 'sometimes' is neither"),
        ({"tool_choice": "required"}, "tool_choice: there is no tool to choose"),
        ({"tools": "add"}, "tools: give a list"),
    ],
)
def test_wrong_tools_are_named(server: Running, options: dict[str, Any], fault: str) -> None:
    with pytest.raises(openai.BadRequestError, match=fault):
        chat(server, ASKED, **options)
