"""A YAML file that a person wrote, as values that know their lines.

In: a path. Out: a ``Value`` whose parts are ``Value``s, or one of our errors with the line of the fault. What YAML can
do beyond lists, mappings and plain values is refused (anchors and aliases, by which nine lines become a billion; tags,
keys that are given twice), and so is a file beyond any plan's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm2_export import files, paths
from lfm2_export.errors import ConfigError
from lfm2_export.messages import named, shown, shown_reason
from lfm2_export.spelling import did_you_mean

if TYPE_CHECKING:
    import yaml

_LIMIT = 256 << 10
# Of values, and of lists in lists; the largest plans that make sense have some hundred, three deep.
_MOST_VALUES, _DEEPEST = 10_000, 12
_TAG = "tag:yaml.org,2002:"
_LONGEST_NUMBER = 40


@dataclass(frozen=True, kw_only=True)
class Value:
    """What stands at a ``line`` of a file. ``content``: None, a truth value, a number, a text, a tuple of values, or a
    mapping of them by their keys; ``key_lines`` are those of the keys."""

    path: Path
    line: int
    content: Any
    key_lines: Mapping[str, int]

    def error(self, message: str, *, line: int | None = None) -> ConfigError:
        """``message``, with the place before it."""
        return ConfigError(f"{paths.shown(self.path)}:{line or self.line}: {message}")

    def mapping(self, what: str, known: Iterable[str]) -> Mapping[str, Value]:
        """Its entries, all of which are among ``known``.

        Raises:
            ConfigError: it is no mapping, or has a key that there is not.
        """
        entries = self.entries(what)
        names = list(known)
        for key in entries:
            if key not in names:
                raise self.error(
                    f"{what} has no key {named(key)}{did_you_mean(key, names)}; its keys: {', '.join(names)}",
                    line=self.key_lines[key],
                )
        return entries

    def entries(self, what: str) -> Mapping[str, Value]:
        """Those of a mapping whose keys are names that the plan gives.

        Raises:
            ConfigError: it is no mapping.
        """
        if not isinstance(self.content, dict):
            raise self._wrong(what, "a mapping (key: value)")
        return self.content

    def items(self, what: str) -> tuple[Value, ...]:
        """The entries of a list; a single value is a list of one.

        Raises:
            ConfigError: it is empty.
        """
        found = self.content if isinstance(self.content, tuple) else (self,)
        if not found or self.content is None:
            raise self.error(f"{what} is empty; list at least one, or leave the key out")
        return found

    def text(self, what: str) -> str:
        """A text that is not empty.

        Raises:
            ConfigError: it is none.
        """
        if isinstance(self.content, str) and self.content.strip():
            return self.content
        raise self._wrong(what, "a name", "; put digits, true or null in quotes" if _is_plain(self.content) else "")

    def integer(self, what: str, *, least: int, most: int) -> int:
        """Raises ConfigError where it is none between ``least`` and ``most``."""
        if type(self.content) is not int or not least <= self.content <= most:
            raise self._wrong(what, f"an integer from {least} to {most}")
        return self.content

    def number(self, what: str, *, least: float, most: float) -> float:
        """Raises ConfigError where it is none between ``least`` and ``most``. YAML takes 1e-3 for a text."""
        value = self.content
        if isinstance(value, str):
            try:
                value = float(value[:_LONGEST_NUMBER])
            except ValueError:
                value = None
        if type(value) not in (int, float) or not least <= value <= most:
            raise self._wrong(what, f"a number from {least:g} to {most:g}")
        return float(value)

    def truth(self, what: str) -> bool:
        """Raises ConfigError where it is neither true nor false."""
        if not isinstance(self.content, bool):
            raise self._wrong(what, "true or false")
        return self.content

    def choice(self, what: str, known: Iterable[str]) -> str:
        """A name that there is; raises ConfigError where it is another."""
        name, names = self.text(what), list(known)
        if name not in names:
            raise self.error(f"{what} {shown(name)} is unknown{did_you_mean(name, names)}; known: {', '.join(names)}")
        return name

    def _wrong(self, what: str, expected: str, more: str = "") -> ConfigError:
        return self.error(f"{what}: {expected} expected, found {self._shown()}{more}")

    def _shown(self) -> str:
        if isinstance(self.content, dict):
            return "a mapping"
        return "a list" if isinstance(self.content, tuple) else shown(self.content)


def _is_plain(content: Any) -> bool:
    return content is None or isinstance(content, bool | int | float)


def read(path: Path) -> Value:
    """The one document of a file.

    Raises:
        ConfigError: there is none, or it is not YAML of the kind above.
    """
    import yaml

    text = files.read_own_text(path, ConfigError, limit=_LIMIT, option="sweep")
    try:
        _check_events(path, yaml.parse(text, yaml.SafeLoader))
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f":{mark.line + 1}"
        raise ConfigError(f"{paths.shown(path)}{line}: is not YAML ({shown_reason(_first_line(error))})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{paths.shown(path)}: is not YAML ({shown_reason(_first_line(error))})") from error
    if node is None:
        raise ConfigError(f"{paths.shown(path)}: is empty; `lfm2-export sweep --help` shows a plan")
    return _value(path, node)


def _first_line(error: Exception) -> Exception:
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    return ValueError(problem)


def _check_events(path: Path, events: Iterable[Any]) -> None:
    """Before a value is made of any: the bounds, and no aliases."""
    import yaml

    depth = 0
    for count, event in enumerate(events):
        place = f"{paths.shown(path)}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError(f"{place}: anchors and aliases (&, *) are not read; write it out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEEPEST or count > _MOST_VALUES:
            raise ConfigError(
                f"{place}: the plan has more than {_MOST_VALUES:,} values, or is nested more than {_DEEPEST} levels "
                "deep; split it"
            )


def _value(path: Path, node: yaml.Node) -> Value:
    import yaml

    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        return _mapping(path, node, line)
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        return Value(path=path, line=line, content=tuple(_value(path, one) for one in node.value), key_lines={})
    if isinstance(node, yaml.ScalarNode):
        return Value(path=path, line=line, content=_scalar(path, node, line), key_lines={})
    raise ConfigError(
        f"{paths.shown(path)}:{line}: {shown(node.tag)} is no kind of value for a plan; leave the tag out"
    )


def _mapping(path: Path, node: yaml.MappingNode, line: int) -> Value:
    entries: dict[str, Value] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        key_line = key_node.start_mark.line + 1
        key = getattr(key_node, "value", None)
        if node.tag != f"{_TAG}map" or not isinstance(key, str) or not key.strip():
            raise ConfigError(f"{paths.shown(path)}:{key_line}: {shown(key)} is no key; give it a name")
        if key in entries:
            raise ConfigError(
                f"{paths.shown(path)}:{key_line}: {named(key)} is there already, in line {lines[key]}; give it once"
            )
        entries[key], lines[key] = _value(path, value_node), key_line
    return Value(path=path, line=line, content=entries, key_lines=lines)


def _scalar(path: Path, node: yaml.ScalarNode, line: int) -> Any:
    """By YAML 1.1, whose dates and octal or sixty-based numbers are texts here."""
    import yaml

    kind = node.tag.removeprefix(_TAG)
    if kind in ("str", "timestamp", "merge", "value"):
        return node.value
    if kind not in ("int", "float", "bool", "null") or len(node.value) > _LONGEST_NUMBER:
        raise ConfigError(f"{paths.shown(path)}:{line}: {shown(node.value)} is no kind of value for a plan")
    if kind in ("int", "float") and (
        ":" in node.value or (node.value[:1] == "0" and node.value.isdigit() and node.value != "0")
    ):
        return node.value
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{paths.shown(path)}:{line}: {shown(node.value)} is no {kind}") from error
