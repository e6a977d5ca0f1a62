"""Calls that must be made: whatever a model without any sense writes under the grammar is a call that is accepted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lfm2_export import Chat, Tokenizer, load_runner
from lfm2_export.constraints import Constraint, Grammars
from lfm2_export.errors import GenerationError
from lfm2_export.forced_calls import forced_calls
from lfm2_export.generation import continue_from
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.replies import Called, ReplyParser, Tools
from lfm2_export.replies.call_grammar import MOST_CALLS, call_grammar
from tests.hash_runner import TOKENIZER, HashRunner

END = TOKENIZER.token_id("<|im_end|>")
KINDS = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer", "minimum": 3, "maximum": 9},
        "unit": {"enum": ["°C", "K", None, True, 7]},
        "flag": {"type": "boolean"},
        "many": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 2},
        "more": {"type": "array", "minItems": 2},
        "inner": {
            "type": "object",
            "properties": {"to": {"type": ["integer", "null"]}, "of": {"const": "x"}},
            "required": ["of"],
        },
    },
    "required": ["count", "unit"],
}
WORDS = {"kinds": KINDS, "plain": {}, "a.b": {"required": ["any"]}}
NO_WORDS = {**WORDS, "not a word": {"type": "object", "properties": {"a b": {"type": "integer"}}, "required": ["a b"]}}


def no_token(text: str) -> None:
    return None


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKENIZER, TOKENIZER.vocab_size, (END,))


def written(constraint: Constraint | None, seed: int) -> str:
    """By a runner whose logits are noise."""
    runner = HashRunner(TOKENIZER.vocab_size)
    runner.reset()
    prompt = [[3, seed]]
    config = GenerationConfig(max_new_tokens=400, stop_token_ids=(END,), do_sample=True, seed=seed)
    events = continue_from(runner, runner.prefill(prompt), prompt, config, constraint=constraint)
    return TOKENIZER.decode([event.token for event in events], stop_tokens=(END,))


def calls_in(text: str, schemas: dict[str, Any]) -> Sequence[Any]:
    parser = ReplyParser(tools=Tools(schemas))
    events = [*parser.push(text), *parser.finish()]
    assert [type(event) for event in events] == [Called], text
    return events[0].calls


@pytest.mark.parametrize(
    ("schemas", "token_id", "begins"),
    [
        (WORDS, TOKENIZER.token_id, "<|tool_call_start|>["),
        (NO_WORDS, TOKENIZER.token_id, '<|tool_call_start|>[{"name": "'),
        (WORDS, no_token, '<tool_call>[{"name": "'),
    ],
    ids=["python", "json", "no markers"],
)
def test_noise_becomes_calls_that_are_accepted(
    grammars: Grammars, schemas: dict[str, Any], token_id: Any, begins: str
) -> None:
    made, whole = set[str](), 0
    for seed in range(12):
        text = written(grammars.of_grammar(call_grammar(Tools(schemas), token_id)), seed)
        assert text.startswith(begins)
        if text.endswith(("<|tool_call_end|>", "</tool_call>")):  # a string of noise may go on to the limit
            calls = calls_in(text, schemas)
            assert 1 <= len(calls) <= MOST_CALLS
            made |= {call.name for call in calls}
            whole += 1
    print(whole, made)
    assert whole > 1
    assert len(made) > 1
    assert not written(None, 0).startswith(begins)


def test_a_named_tool_is_called_once_and_one_call_is_one(grammars: Grammars) -> None:
    for seed in range(4):
        named = call_grammar(Tools({"plain": {}, "other": {}}), TOKENIZER.token_id, name="other")
        assert written(grammars.of_grammar(named), seed) == "<|tool_call_start|>[other()]<|tool_call_end|>"
        one = call_grammar(Tools({"plain": {}, "other": {}}), TOKENIZER.token_id, parallel=False)
        assert len(calls_in(written(grammars.of_grammar(one), seed), {"plain": {}, "other": {}})) == 1


@pytest.mark.parametrize(
    ("reply", "fits"),
    [
        ("[kinds(count=3, unit='K')]", False),  # an enum is written as JSON writes it
        ('[kinds(count=3, unit="K")]', True),
        ('[kinds(text=\'a "b"\', count=9, unit=None, flag=True, many=[1, 2.5], inner={"to": null, "of": "x"})]', True),
        ('[kinds(count=2, unit="K")]', False),
        ('[kinds(unit="K", count=3)]', False),
        ("[kinds(count=3)]", False),
        ('[kinds(count=3, unit="K", many=[])]', False),
        ('[kinds(count=3, unit="K", more=[1])]', False),
        ('[kinds(count=3, unit="K", more=[1, {"a": None}, []])]', True),
        ('[kinds(count=3, unit="K", inner={"to": 1})]', False),
        ("[plain(), plain()]", True),
        ("[plain(a=1)]", False),
        ('[a.b(any={"a": [1, "b"]})]', True),
        ("[none()]", False),
        ("plain()", False),
        ("[" + ", ".join(["plain()"] * (MOST_CALLS + 1)) + "]", False),
    ],
)
def test_what_fits_is_what_the_schema_says(grammars: Grammars, reply: str, fits: bool) -> None:
    constraint = grammars.of_grammar(call_grammar(Tools(WORDS), TOKENIZER.token_id))
    text = f"<|tool_call_start|>{reply}<|tool_call_end|><|im_end|>"
    allowed = []
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        allowed.append(bool(constraint.allowed()[token]))  # type: ignore[index]
        if not allowed[-1]:
            break
        constraint.accept(token)
    assert all(allowed) == fits, (reply, len(allowed))


def test_a_schema_that_cannot_be_met_is_said(grammars: Grammars) -> None:
    wrong = {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}, "required": ["a"]}
    with pytest.raises(GenerationError, match="schema: "):
        grammars.of_grammar(call_grammar(Tools({"f": wrong}), TOKENIZER.token_id))


def test_a_pte_program_makes_the_call_that_it_must_make(pte_artifact: Callable[[str, str], Path]) -> None:
    """As the ONNX program of tests/commands/test_chat.py does: the constraint is the sampler's, not a backend's."""
    folder = pte_artifact("tiny-dense", "8da4w")
    count = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 3, "maximum": 9}}, "required": ["n"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": count}}]
    tokenizer = Tokenizer.from_dir(folder)
    chat = Chat(load_runner(folder, threads=1), tokenizer, GenerationConfig(max_new_tokens=40), tools=tools)
    chat.config = chat.config.override(stop_token_ids=(END,), seed=1, temperature=1.0)
    grammars = Grammars(tokenizer, load_runner(folder, threads=1).vocab_size, (END,))
    constrain = partial(forced_calls, grammars, tokenizer, Tools.from_openai(tools))
    text = "".join(chat.send("Go", constrain=constrain))
    print(text)
    assert {call.name for call in calls_in(text, {"f": count})} == {"f"}
    assert "<|tool_call_start|>" not in "".join(chat.send("Go"))
