"""Which tokens may come next: a schema's, and only behind a marker where there is one."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from lfm2_export.constraints import After, Constraint, Grammars
from lfm2_export.errors import GenerationError
from lfm2_export.generation import continue_from
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.schema_limits import DEEPEST, check_tools
from tests.hash_runner import TOKENIZER, HashRunner

END = TOKENIZER.token_id("<|im_end|>")
SCHEMA = {"type": "array", "items": {"enum": ["yes", "no", 1]}, "minItems": 2, "maxItems": 3}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKENIZER, TOKENIZER.vocab_size, (END,))


def written(constraint: Constraint | None, seed: int, new: int = 60) -> str:
    """By a runner whose logits are noise."""
    runner = HashRunner(TOKENIZER.vocab_size)
    runner.reset()
    prompt = [[3, seed]]
    config = GenerationConfig(max_new_tokens=new, stop_token_ids=(END,), do_sample=seed % 2 == 1, seed=seed)
    events = continue_from(runner, runner.prefill(prompt), prompt, config, constraint=constraint)
    return TOKENIZER.decode([event.token for event in events], stop_tokens=(END,))


def test_noise_becomes_json_of_the_schema(grammars: Grammars) -> None:
    texts = {written(grammars.of_schema(SCHEMA), seed) for seed in range(8)}
    print(texts)
    assert len(texts) > 1
    for text in texts:
        assert 2 <= len(json.loads(text)) <= 3
        assert set(json.loads(text)) <= {"yes", "no", 1}
    with pytest.raises(json.JSONDecodeError):
        json.loads(written(None, 0))


def test_a_constraint_behind_a_marker_lets_all_tokens_come_before(grammars: Grammars) -> None:
    constraint = After("</think>", grammars.of_schema(SCHEMA), TOKENIZER)
    for token in TOKENIZER.encode("so {] </thi", add_special_tokens=False):
        assert constraint.allowed() is None
        constraint.accept(token)
    for token in TOKENIZER.encode("nk>", add_special_tokens=False):
        assert constraint.allowed() is None
        constraint.accept(token)
    allowed = constraint.allowed()
    assert allowed is not None
    assert "[" in (texts := [TOKENIZER.decode([token]) for token in np.flatnonzero(allowed)])
    assert all(text.startswith("[") for text in texts)


def test_without_a_stop_token_json_would_never_end() -> None:
    with pytest.raises(GenerationError, match="has no stop token"):
        Grammars(TOKENIZER, TOKENIZER.vocab_size, ()).of_schema(SCHEMA)


def chain(count: int, *, ends: bool = True) -> dict[str, Any]:
    """Definitions, each of an object that refers to the next; without an end the last one to the first."""
    links = {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{(i + 1) % (count + ends)}"}}} for i in range(count)}
    return {"$defs": links | ({f"d{count}": {"type": "integer"}} if ends else {}), "$ref": "#/$defs/d0"}


def references(count: int) -> dict[str, Any]:
    links: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(count)}
    return {"$defs": links | {f"d{count}": {}}, "$ref": "#/$defs/d0"}


def spellings(count: int) -> dict[str, Any]:
    """One definition that refers to itself by one name spelled in many ways, each of which llguidance enters."""
    spelled = ["".join("%21" if index >> bit & 1 else "!" for bit in range(9)) for index in range(count)]
    inner = {f"p{index}": {"$ref": f"#/$defs/{name}"} for index, name in enumerate(spelled)}
    return {"$defs": {"!" * 9: {"properties": inner}}, "$ref": f"#/$defs/{spelled[0]}"}


def anchors(count: int) -> dict[str, Any]:
    links = {f"d{i}": {"$anchor": f"x{i}", "properties": {"a": {"$ref": f"#x{i + 1}"}}} for i in range(count)}
    return {"$defs": links | {"end": {"$anchor": f"x{count}"}}, "$ref": "#x0"}


def nested(depth: int) -> dict[str, Any]:
    return {"properties": {"a": nested(depth - 1)}} if depth else {}


def wide(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"a{index}": {} for index in range(count)}}


def multiplied(count: int) -> dict[str, Any]:
    """Each choice with all properties."""
    return wide(900) | {"anyOf": [{"properties": {f"b{index}": {}}} for index in range(count)]}


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        (chain(600), "more than 256 levels deep with each \\$ref followed"),
        (chain(600, ends=False), "more than 256 levels deep"),
        (references(1000), "more than 256 levels deep"),
        (spellings(400), "more than 256 levels deep"),
        (anchors(200), "more than 256 levels deep"),
        (nested(400), "more than 256 levels deep"),
        (wide(10_000), "more than 2000 properties, choices and items"),
        ({"enum": list(range(10_000))}, "more than 2000 properties"),
        ({"const": {str(index): index for index in range(10_000)}}, "more than 2000 properties"),
        (multiplied(40), "compiles to more than 20000 symbols"),
        ({"pattern": "(a|b)?" * 20_000}, "patterns have more than 16384 characters"),
        ({"const": "c" * 1_000_000}, "more than 262144; shorten its texts"),
        ({"type": ["array"] * 10}, "names one twice"),
    ],
)
def test_a_schema_that_would_take_the_stack_or_minutes_is_refused(
    grammars: Grammars, schema: dict[str, Any], fault: str
) -> None:
    with pytest.raises(GenerationError, match=fault):
        grammars.of_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        wide(200),
        nested(20),
        chain(60),
        chain(60, ends=False),
        references(200),
        spellings(20),
        anchors(5),
        {"properties": {"$ref": {"type": "string"}, "enum": {"type": "integer"}, "id": {"type": "string"}}},
        {"$defs": {"n": {"properties": {"l": {"$ref": "#/$defs/n"}, "r": {"$ref": "#"}}}}, "$ref": "#/$defs/n"},
        {"default": {"$ref": "#/nowhere"}, "type": "object"},
    ],
)
def test_large_and_recursive_schemas_are_taken(grammars: Grammars, schema: dict[str, Any]) -> None:
    assert grammars.of_schema(schema).allowed() is not None


def test_the_bounds_of_depth_fit_the_stack_that_there_is(grammars: Grammars) -> None:
    """Asked for in a thread with as little of it as some systems give."""
    usual = threading.stack_size(512 << 10)
    try:
        for largest in (lambda: grammars.of_schema(references(DEEPEST - 4)), lambda: grammars.of_grammar(rules(2400))):
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(largest).result().allowed() is not None
    finally:
        threading.stack_size(usual)


def rules(count: int) -> str:
    return "start: r0\n" + "".join(f'r{i}: "a" r{i + 1}\n' for i in range(count)) + f'r{count}: "b"\n'


@pytest.mark.parametrize(
    ("lark", "fault"),
    [
        (rules(20_000), "leads through more than 2500 rules"),
        ("start: r0\n" + 'r0: "b"\n' * 40_000, "has 40001 rules"),
        (f"start: %json {json.dumps(chain(600))}", "more than 256 levels deep"),
    ],
)
def test_a_grammar_that_would_take_the_stack_is_refused(grammars: Grammars, lark: str, fault: str) -> None:
    with pytest.raises(GenerationError, match=fault):
        grammars.of_grammar(lark)


def test_tools_are_bounded_together() -> None:
    check_tools([wide(20)] * 128)
    with pytest.raises(GenerationError, match="the tools have 3802 parts, more than 3000; offer fewer tools"):
        check_tools([wide(1900)] * 2)
