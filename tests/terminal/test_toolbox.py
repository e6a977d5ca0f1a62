"""Tools from files: a list in JSON, or the functions of a Python file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lfm2_export.errors import ConfigError
from lfm2_export.replies import ToolCall
from lfm2_export.terminal.toolbox import Toolbox, open_toolbox

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
MODULE = '''
from os.path import join
from dataclasses import dataclass

@dataclass
class Point:
    x: int

def add(a: int, b: int = 1) -> int:
    """Adds."""
    return a + b

def place(x: int) -> Point:
    """A place."""
    return Point(x)

def leave() -> None:
    """Leaves."""
    raise SystemExit("no")

def _helper(a):
    pass
'''


def put(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("value", [[WEATHER], {"tools": [WEATHER]}])
def test_a_json_file_names_tools_that_a_person_answers_for(tmp_path: Path, value: object) -> None:
    toolbox = open_toolbox(put(tmp_path, "tools.json", json.dumps(value)))
    assert (toolbox.tools.names, dict(toolbox.functions)) == (["weather"], {})


def test_the_public_functions_of_a_file_run(tmp_path: Path) -> None:
    toolbox = open_toolbox(put(tmp_path, "tools.py", MODULE))
    assert toolbox.tools.names == ["add", "place", "leave"]
    assert toolbox.run(ToolCall(name="add", arguments={"a": 2, "b": 3})) == "5"
    assert toolbox.run(ToolCall(name="place", arguments={"x": 2})) == '"Point(x=2)"'
    assert toolbox.run(ToolCall(name="leave", arguments={})) == "Error: SystemExit: no"
    assert toolbox.run(ToolCall(name="add", arguments={"c": 1})).startswith("Error: TypeError: ")


class Unwilling(Exception):
    """It cannot say what it is."""

    def __str__(self) -> str:
        raise Unwilling


def unwilling() -> None:
    raise Unwilling


CIRCLE: list[object] = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda: {("a", "b"): 1}, "Error: TypeError: keys must be "),
        (lambda: CIRCLE, "Error: ValueError: Circular reference"),
        (Unwilling, "Error: Unwilling"),
        (unwilling, "Error: Unwilling"),
    ],
    ids=["keys", "circle", "unwilling result", "unwilling error"],
)
def test_a_result_that_cannot_be_written_out_is_told_as_an_error(function: Callable[[], object], told: str) -> None:
    toolbox = Toolbox(described=[WEATHER], functions={"weather": function})
    assert toolbox.run(ToolCall(name="weather", arguments={})).startswith(told)


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("a.json", "{", "give OpenAI's list of tools, or a .py file"),
        ("a.json", "5", "holds 5; give OpenAI's list"),
        ("a.json", "[]", "has 0 tools; give 1 to 128"),
        ("a.json", json.dumps([{"name": "f"}]), "tool 0 is {'name': 'f'}; give {\"type\""),
        ("a.json", json.dumps([WEATHER, WEATHER]), "two tools have one name among weather"),
        (
            "a.json",
            json.dumps([{"type": "function", "function": {"name": "f", "parameters": [1]}}]),
            r"tool 0: parameters are \[1\]",
        ),
        ("a.py", "x = (", r"cannot be imported \(SyntaxError: "),
        ("a.py", "import no_such_module", "ModuleNotFoundError: No module named"),
        ("a.py", "raise SystemExit(3)", r"cannot be imported \(SystemExit: 3\)"),
        ("a.py", "x = 1", "has 0 tools"),
        ("a.py", "async def f():\n    'Does.'", "f is async; give a plain function"),
        ("a.py", "def f():\n    pass", "f: has no docstring"),
    ],
)
def test_what_is_no_list_of_tools_is_refused(tmp_path: Path, name: str, text: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault) as caught:
        open_toolbox(put(tmp_path, name, text))
    print(caught.value)
    with pytest.raises(ConfigError, match=r"no such file; pass --tools FILE\.json or --tools module\.py"):
        open_toolbox(tmp_path / "none.json")
