"""The tools of a chat: from a JSON file, whose results a person gives, or functions of a Python file, which run.

In: a path. Out: what a model is told of them, and the result of a call. A Python file is the user's own program: it is
imported.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from lfm2_export import files, json_values, paths
from lfm2_export.errors import ConfigError
from lfm2_export.messages import listed, shown, shown_reason
from lfm2_export.replies import ToolCall, Tools
from lfm2_export.terminal.signatures import described

OPTION = "--tools"
_MOST_TOOLS = 128
_LIMIT = 4 << 20
_MODULE = "lfm2_export_chat_tools"


@dataclass(frozen=True, kw_only=True)
class Toolbox:
    """``described`` as OpenAI's list of tools; ``functions`` by name, none where a person gives the results."""

    described: Sequence[Mapping[str, Any]]
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    @property
    def tools(self) -> Tools:
        return Tools.from_openai(self.described)

    def run(self, call: ToolCall) -> str:
        """What a function returned, as text; what it raised, where it did. What it returned is the function's own,
        too, and may raise anything while it is written out."""
        try:
            result = self.functions[call.name](**call.arguments)
            return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        except (Exception, SystemExit) as error:
            return f"Error: {type(error).__name__}{_message(error)}"


def _message(error: BaseException) -> str:
    """An exception may fail to say what it is about."""
    try:
        return f": {error}"
    except Exception:
        return ""


def open_toolbox(path: str | Path) -> Toolbox:
    """Reads ``FILE.json``, or imports ``module.py``.

    Raises:
        ConfigError: there is no such file, or it is no list of tools.
    """
    path = Path(path)
    if not paths.is_file(path, ConfigError):
        raise ConfigError(f"{paths.shown(path)}: no such file; pass {OPTION} FILE.json or {OPTION} module.py")
    toolbox = _from_module(path) if path.suffix == ".py" else _from_json(path)
    names = toolbox.tools.names
    if len(toolbox.described) != len(names):
        raise ConfigError(f"{paths.shown(path)}: two tools have one name among {listed(names)}; rename one")
    if not 0 < len(names) <= _MOST_TOOLS:
        raise ConfigError(f"{paths.shown(path)}: has {len(names)} tools; give 1 to {_MOST_TOOLS}")
    return toolbox


def _from_json(path: Path) -> Toolbox:
    try:
        value = json_values.parse(files.read_own_text(path, ConfigError, limit=_LIMIT, option=OPTION))
    except json_values.JsonError as error:
        raise ConfigError(f"{paths.shown(path)}: {error}; give OpenAI's list of tools, or a .py file") from error
    value = value.get("tools") if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise ConfigError(f"{paths.shown(path)}: holds {shown(value, 40)}; give OpenAI's list of tools")
    for index, tool in enumerate(value):
        _check(tool, f"{paths.shown(path)}: tool {index}")
    return Toolbox(described=value)


def _check(tool: object, place: str) -> None:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ConfigError(
            f'{place} is {shown(tool, 60)}; give {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}'
        )
    if not isinstance(function.get("parameters") or {}, dict):
        raise ConfigError(f"{place}: parameters are {shown(function['parameters'], 60)}; give a JSON schema")


def _from_module(path: Path) -> Toolbox:
    module = _imported(path)
    functions = {name: one for name, one in vars(module).items() if _is_tool(name, one, module)}
    for name, function in functions.items():
        if inspect.iscoroutinefunction(function):
            raise ConfigError(f"{paths.shown(path)}: {name} is async; give a plain function")
    return Toolbox(
        described=[described(function, paths.shown(path)) for function in functions.values()], functions=functions
    )


def _is_tool(name: str, value: object, module: ModuleType) -> bool:
    """A function that is defined there, and public."""
    return inspect.isfunction(value) and not name.startswith("_") and value.__module__ == module.__name__


def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{paths.shown(path)}: is no Python file; give one")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module  # as for any import: dataclasses and pickles look there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        reason = shown_reason(ValueError(f"{type(error).__name__}: {error}"))
        raise ConfigError(f"{paths.shown(path)}: cannot be imported ({reason}); correct it") from error
    return module
