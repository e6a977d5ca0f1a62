"""A function's schema: from its type hints and docstring, or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Optional, Union

import pytest

from lfm2_export.errors import ConfigError
from lfm2_export.terminal.signatures import described


def weather(
    city: str,
    days: int = 1,
    unit: Literal["C", "K"] = "C",
    places: list[tuple[float, float]] | None = None,
    *,
    extra: dict[str, int | str] = {},  # noqa: B006
    anything: Any = None,
    noted: Annotated[Optional[bool], "a note"] = None,  # noqa: UP045
    many: Sequence[Mapping[str, float]] = (),
    old: Union[int, float] = 0,  # noqa: UP007
) -> str:
    """Tells the weather.

    Of every city.

    Args:
        city (str): its name,
            with its country
        days: how many: 1 to 9

    Returns:
        city: no argument of this.
    """
    return city


def test_a_schema_says_what_the_function_takes() -> None:
    function = described(weather, "tools.py")["function"]
    parameters = function["parameters"]
    assert (function["name"], function["description"]) == ("weather", "Tells the weather.\n\nOf every city.")
    assert (parameters["required"], parameters["additionalProperties"]) == (["city"], False)
    assert parameters["properties"] == {
        "city": {"type": "string", "description": "its name, with its country"},
        "days": {"type": "integer", "description": "how many: 1 to 9"},
        "unit": {"enum": ["C", "K"]},
        "places": {
            "anyOf": [{"type": "array", "items": {"type": "array", "items": {"type": "number"}}}, {"type": "null"}]
        },
        "extra": {"type": "object", "additionalProperties": {"type": ["integer", "string"]}},
        "anything": {},
        "noted": {"type": ["boolean", "null"], "description": "a note"},
        "many": {"type": "array", "items": {"type": "object", "additionalProperties": {"type": "number"}}},
        "old": {"type": ["integer", "number"]},
    }


def test_it_is_what_transformers_derives_where_both_can() -> None:
    utils = pytest.importorskip("transformers.utils")

    def add(a: float, b: int = 2, words: list[str] | None = None) -> float:
        """Adds numbers.

        Args:
            a: the first
            b: the second
            words: more
        """
        return a + b

    ours, theirs = described(add, "x")["function"], utils.get_json_schema(add)["function"]
    assert (ours["name"], ours["description"]) == (theirs["name"], theirs["description"])
    assert ours["parameters"]["required"] == theirs["parameters"]["required"]
    for name, schema in theirs["parameters"]["properties"].items():
        assert ours["parameters"]["properties"][name]["description"] == schema["description"]
        if name != "words":  # which transformers calls "nullable"
            assert ours["parameters"]["properties"][name] == schema


def no_docstring(a: int) -> None: ...


def no_type(a) -> None:  # type: ignore[no-untyped-def]
    """Does."""


def no_name(*rest: int) -> None:
    """Does."""


def no_json(a: Callable[[], int]) -> None:
    """Does."""


def no_such(a: Nowhere) -> None:  # type: ignore[name-defined] # noqa: F821
    """Does."""


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        (no_docstring, "no_docstring: has no docstring"),
        (no_type, "no_type: the argument a has no type"),
        (no_name, r"no_name: the argument \*rest: .*int.* has no name"),
        (no_json, "no_json: the argument a is of type .*, which JSON does not have"),
        (no_such, "no_such: its types cannot be read"),
    ],
)
def test_what_cannot_be_said_is_refused(function: Callable[..., object], fault: str) -> None:
    with pytest.raises(ConfigError, match=f"tools.py: {fault}"):
        described(function, "tools.py")
