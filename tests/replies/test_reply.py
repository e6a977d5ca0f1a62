"""What a reply says is told apart the same way however its text was cut, and no character of it is lost."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_export.replies import Called, Event, ReplyParser, Said, Thought, ToolCall, Tools, opens_thinking

SCHEMA = {
    "type": "object",
    "properties": {
        "word": {"type": "string"},
        "count": {"type": "integer"},
        "unit": {"enum": ["a", "b"]},
        "from": {"type": ["array", "null"]},
    },
    "required": ["word"],
}
TOOLS = Tools({"look": SCHEMA, "my.go-to": {}, "strict": {"additionalProperties": False}})
LOOK = ToolCall(name="look", arguments={"word": "a"})
# What a text is likely to be made of where a parser goes wrong.
PARTS = (
    *("<think>", "</think>", "<|tool_call_start|>", "<|tool_call_end|>", "<tool_call>", "</tool_call>", "<", "\n", "x"),
    *(
        '[look(word="a")]',
        "[look(1)]",
        '{"name": "look", "arguments": {"word": "a"}}',
        "look(",
        "<|tool_call_",
        "</thi",
    ),
    "<function=look><parameter=word>a</parameter></function>",
)


def parsed(pieces: list[str], **options: Any) -> list[Event]:
    """The events, text beside text as one."""
    parser = ReplyParser(**options)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(event, Said | Thought) and type(event) is type(last):
            merged[-1] = type(event)(text=last.text + event.text)  # type: ignore[union-attr]
        else:
            merged.append(event)
    return merged


def one(text: str, **options: Any) -> list[Event]:
    return parsed([text], tools=TOOLS, **options)


texts = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)


@settings(max_examples=400, deadline=None)
@given(text=texts, cuts=st.lists(st.integers(0, 200), max_size=20), tools=st.booleans(), thinking=st.booleans())
def test_any_cut_of_a_stream_gives_the_same_events(text: str, cuts: list[int], tools: bool, thinking: bool) -> None:
    options = {"tools": TOOLS if tools else None, "thinking": thinking}
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[start:end] for start, end in pairwise(places)]
    assert parsed(pieces, **options) == parsed([text], **options) == parsed(list(text), **options)


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_without_calls_all_of_a_text_is_given_out_but_the_marks_of_thinking(text: str) -> None:
    """Only ``<think>`` and ``</think>`` may go, and white space beside them."""
    given_out = "".join(event.text for event in parsed([text]) if not isinstance(event, Called))
    rest = iter(text)
    assert all(character in rest for character in given_out), "in another order"
    lost = len(text) - len(given_out) - text.count("\n")
    assert lost <= len("<think></think>") * ("<think>" in text)


def test_calls_as_lfm2_writes_them() -> None:
    text = """On it. <|tool_call_start|>[look(word='it\\'s "q"', count=-3, **)]<|tool_call_end|>"""
    assert one(text) == [Said(text=text)]
    text = text.replace(", **", ', from=[True, null, {"k": (1.5,)}]')
    call = ToolCall(name="look", arguments={"word": 'it\'s "q"', "count": -3, "from": [True, None, {"k": [1.5]}]})
    assert one(text) == [Said(text="On it. "), Called(calls=(call,))]
    assert call.arguments_json == '{"word": "it\'s \\"q\\"", "count": -3, "from": [true, null, {"k": [1.5]}]}'


@pytest.mark.parametrize(
    "block",
    [
        '<|tool_call_start|>[look(word="a")]<|tool_call_end|>',
        '<|tool_call_start|>look(word="a",)<|tool_call_end|>',
        '<|tool_call_start|>[{"name": "look", "arguments": {"word": "a"}}]<|tool_call_end|>',
        '<|tool_call_start|>{"name": "look", "parameters": "{\\"word\\": \\"a\\"}"}<|tool_call_end|>',
        "<tool_call>\n<function=look>\n<parameter=word>\na\n</parameter>\n</function>\n</tool_call>",
        '<tool_call><invoke name="look"><parameter name="word">a</parameter></invoke></tool_call>',
        '<|tool_call_start|>[look(word="a")]',  # the end marker never came
    ],
)
def test_one_call_in_every_form(block: str) -> None:
    assert one(block) == [Called(calls=(LOOK,))]
    assert parsed([block]) == [Said(text=block)], "without tools it is text"


def test_values_of_xml_are_what_the_schema_says() -> None:
    text = (
        "<tool_call><function=look><parameter=word>1</parameter><parameter=count>2</parameter>"
        "<parameter=from>null</parameter></function></tool_call>"
    )
    assert one(text) == [Called(calls=(ToolCall(name="look", arguments={"word": "1", "count": 2, "from": None}),))]


@pytest.mark.parametrize(
    "block",
    [
        "<|tool_call_start|>[look(word='a', count={})]<|tool_call_end|>",
        '<|tool_call_start|>[{{"name": "look", "arguments": {{"word": "a", "count": {}}}}}]<|tool_call_end|>',
        "<tool_call><function=look><parameter=word>a</parameter><parameter=count>{}</parameter></function></tool_call>",
    ],
    ids=["python", "json", "xml"],
)
def test_an_integer_beyond_a_floats_range_is_an_integer(block: str) -> None:
    count = 10**330
    call = ToolCall(name="look", arguments={"word": "a", "count": count})
    assert one(block.format(count)) == [Called(calls=(call,))]
    assert call.arguments_json == f'{{"word": "a", "count": {count}}}'


@pytest.mark.parametrize("required", [[["word"]], [{}, 1, None, "word"], "word"])
def test_what_is_no_name_is_required_of_no_call(required: object) -> None:
    tools = Tools({"look": {"required": required}})
    assert parsed(['<|tool_call_start|>[look(word="a")]<|tool_call_end|>'], tools=tools) == [Called(calls=(LOOK,))]


@pytest.mark.parametrize(
    "inside",
    [
        "[look(word=1)]",  # the wrong type
        "[look(count=1)]",  # without what is required
        '[look(word="a", count=True)]',  # a bool is no integer
        '[look(word="a", unit="c")]',  # not in the enum
        '[strict(other="a")]',  # an argument too many
        '[nobody(word="a")]',  # no such tool
        '[look("a")]',  # without a name
        '[look(word="a"), nobody()]',  # one of two
        '[look(word="a", word="b")]',
        '[look(word=open("/etc/passwd"))]',  # no literal
        '[look(word="a" if True else "b")]',
        '[look(word="a", count=1e999)]',  # infinite
        '[look(word="\\ud800")]',  # half of a surrogate pair
        "[]",
        "",
        "[" * 5000,
        '[look(word="a", from=' + "[" * 200 + "]" * 200 + ")]",
        "-" * 60_000,
        '{"name": "look", "arguments": [1]}',
        '[{"name": "look"}, 1]',
    ],
)
def test_what_is_no_call_of_these_tools_is_text_with_its_markers(inside: str) -> None:
    text = f"<|tool_call_start|>{inside}<|tool_call_end|>"
    assert one(text) == [Said(text=text)]


def test_a_block_without_end_is_not_held_back_for_ever() -> None:
    parser = ReplyParser(tools=TOOLS)
    given_out = sum(len(event.text) for _ in range(90) for event in parser.push("x" * 1000) if isinstance(event, Said))
    parser = ReplyParser(tools=TOOLS)
    parser.push("<|tool_call_start|>")
    pieces = [event.text for _ in range(90) for event in parser.push("x" * 1000) if isinstance(event, Said)]
    print(f"{sum(map(len, pieces))} of 90,000 characters given out before the end, {given_out} without a marker")
    assert sum(map(len, pieces)) == 90_000 + len("<|tool_call_start|>")


def test_one_call_a_reply_where_parallel_ones_are_not_wanted() -> None:
    block = '<|tool_call_start|>[look(word="a")]<|tool_call_end|>'
    assert one(block * 2) == [Called(calls=(LOOK,))] * 2
    assert one(block * 2, parallel=False) == [Called(calls=(LOOK,)), Said(text=block)]


def test_thinking() -> None:
    assert one("<think>\nhm </think>\n\nYes") == [Thought(text="hm "), Said(text="Yes")]
    assert one("hm</think>Yes", thinking=True) == [Thought(text="hm"), Said(text="Yes")]
    assert one("hm", thinking=True) == [Thought(text="hm")], "never ended"
    assert one("the <think> tag") == [Said(text="the <think> tag")], "not at the beginning"
    assert one('<think>a</think><|tool_call_start|>[look(word="a")]<|tool_call_end|>')[1:] == [Called(calls=(LOOK,))]
    assert opens_thinking("<|im_start|>assistant\n<think>\n")
    assert not opens_thinking("<think></think>")
