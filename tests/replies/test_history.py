"""Messages in OpenAI's form as templates want them."""

from __future__ import annotations

import pytest

from lfm2_export.errors import GenerationError
from lfm2_export.replies import for_template

CALLING = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"word": "a\'b"}'}}],
}


def test_calls_are_written_out_where_a_template_does_not_know_them() -> None:
    (message,) = for_template([CALLING], ["{{ messages }}"])
    assert message == {"role": "assistant", "content": """<|tool_call_start|>[look(word="a'b")]<|tool_call_end|>"""}


def test_a_template_that_knows_calls_is_given_their_arguments_as_an_object() -> None:
    (message,) = for_template([CALLING], ["{% for c in m.tool_calls %}"])
    assert message["content"] == ""
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "look", "arguments": {"word": "a'b"}}}]


def test_parts_of_text_are_lines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (message,) = for_template([{"role": "developer", "content": parts}], [])
    assert message == {"role": "system", "content": "a\nb"}


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"role": "user", "content": [{"type": "image_url"}]}, r"messages\[0\].content\[0\]: is 'image_url'"),
        ({"role": "user", "content": 3}, r"messages\[0\].content: is 3; give text"),
        ({"role": "assistant", "tool_calls": [{}]}, r"messages\[0\].tool_calls\[0\]: is {}; give a function"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            r"arguments: is not JSON .*; give a JSON object as text",
        ),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}, "give a JSON object"),
    ],
)
def test_what_a_template_cannot_be_given_is_named(message: dict[str, object], fault: str) -> None:
    with pytest.raises(GenerationError, match=fault):
        for_template([message], [])
