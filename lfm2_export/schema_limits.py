"""How large a JSON schema or a grammar may be before llguidance compiles it.

In: what a stranger wrote. Out: nothing, or one error that says the limit. llguidance follows references by recursion on
the stack, without a bound (a chain of some hundred ends the process), and its work grows faster than an object's
properties. Recursive schemas are no fault: on its way it enters a reference that it is in already no second time.
"""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from lfm2_export.errors import GenerationError
from lfm2_export.messages import shown

# Subschemas, names and list items of one schema: 2,000 properties take half a second to compile, 10,000 take 27.
MOST_PARTS = 2_000
# Of all tools from which a call must be chosen: 128 with twenty arguments each.
MOST_TOOL_PARTS = 3_000
# Schemas within schemas, references followed: 5 KB of stack each.
DEEPEST = 256
# Characters of a schema as JSON: a constant of 1 MB takes seconds at the first token.
LONGEST = 256 << 10
# Characters of its patterns: 30,000 take 0.3 s at the first token, 120,000 take 8 s.
LONGEST_PATTERNS = 16 << 10
# Rules of a grammar, and those that lead from one to the next: 3.3 KB of stack each.
MOST_RULES, DEEPEST_RULES = 30_000, 2_500

_Role = Literal["schema", "names", "value"]
# Keywords whose value is an object of schemas under free names, or data in which nothing is a schema.
_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_VALUES = ("const", "enum", "default", "examples")
_IDENTIFIERS = ("$id", "id", "$anchor", "$dynamicAnchor")
_RULE = re.compile(r"^\??([a-zA-Z_]\w*)[^:\n]*:(.*)$", re.MULTILINE)
_QUOTED = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_WORD = re.compile(r"[a-zA-Z_]\w*")
_EMBEDDED = re.compile(r"%json\s*")

Node = TypeVar("Node", bound=Hashable)


def check_schema(schema: Mapping[str, Any]) -> int:
    """How many parts it has.

    Raises:
        GenerationError: it is too large, too deep with its references followed, or names a type twice.
    """
    tree = _walked(schema)
    try:
        length = len(json.dumps(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise GenerationError(f"schema: is not JSON ({shown(str(error), 80)}); change it") from error
    if length > LONGEST:
        raise GenerationError(f"schema: has {length} characters, more than {LONGEST}; shorten its texts")
    if tree.references and _depth(schema, tree) > DEEPEST:
        raise _too_deep()
    return tree.parts


def check_tools(schemas: Iterable[Mapping[str, Any]]) -> None:
    """Of the arguments of all tools that one grammar has.

    Raises:
        GenerationError: as ``check_schema``, or they are too large together.
    """
    parts = sum(check_schema(schema) for schema in schemas)
    if parts > MOST_TOOL_PARTS:
        raise GenerationError(f"schema: the tools have {parts} parts, more than {MOST_TOOL_PARTS}; offer fewer tools")


def check_grammar(lark: str) -> None:
    """Raises:
    GenerationError: its rules are too many, lead too deep, or a schema in it is as ``check_schema`` says.
    """
    for start in _EMBEDDED.finditer(lark):
        schema = _json_at(lark, start.end())
        if isinstance(schema, dict):
            check_schema(schema)
    rules = _RULE.findall(lark)
    if len(rules) > MOST_RULES:
        raise GenerationError(f"grammar: has {len(rules)} rules, more than {MOST_RULES}; simplify the schemas")
    names = {name for name, _ in rules}
    leads: dict[str, list[str]] = {name: [] for name in names}
    for name, body in rules:
        leads[name] += [word for word in _WORD.findall(_QUOTED.sub("", body)) if word in names]
    if _heaviest_path(leads, dict.fromkeys(names, 1)) > DEEPEST_RULES:
        raise GenerationError(
            f"grammar: leads through more than {DEEPEST_RULES} rules; give an object fewer properties"
        )


def _json_at(text: str, start: int) -> Any:
    """The value that begins there; None where there is none, which llguidance says better."""
    try:
        return json.JSONDecoder().raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        return None


@dataclass(kw_only=True)
class _Tree:
    """A schema without what its references lead to. ``levels``: schemas within schemas, or data within data.
    ``patterns``: characters of its regular expressions. ``identified``: parts have names of their own below its root.
    """

    levels: int = 0
    parts: int = 0
    patterns: int = 0
    references: list[str] = field(default_factory=list)
    identified: bool = False


def _walked(schema: object) -> _Tree:
    tree, waiting = _Tree(), [(schema, 1, _role(""))]
    while waiting:
        node, level, role = waiting.pop()
        tree.levels = max(tree.levels, level)
        inner = list(_inner(node, role))
        tree.parts += len(node) if role != "schema" and isinstance(node, Mapping) else len(inner)
        if tree.parts > MOST_PARTS:
            raise GenerationError(f"schema: has more than {MOST_PARTS} properties, choices and items; ask for less")
        if level > DEEPEST:
            raise _too_deep()
        if role == "schema" and isinstance(node, Mapping):
            _note(tree, node, is_root=level == 1)
        for value, kind in inner:
            is_level = kind == "value" or (kind == "schema" and isinstance(value, Mapping))
            waiting.append((value, level + is_level, kind))
    return tree


def _role(key: object) -> _Role:
    """What the value of a schema's keyword is."""
    return "names" if key in _NAMES else "value" if key in _VALUES else "schema"


def _inner(node: object, role: _Role) -> Iterator[tuple[object, _Role]]:
    """What a walk goes on with: all items of a list, all values behind names, of a schema those that hold more."""
    below: _Role = "value" if role == "value" else "schema"
    if isinstance(node, list | tuple):
        yield from ((item, below) for item in node)
    elif isinstance(node, Mapping) and role != "schema":
        yield from ((value, below) for value in node.values())
    elif isinstance(node, Mapping):
        for key, value in node.items():
            if isinstance(value, Mapping | list | tuple):
                kind = _role(key)
                yield value, "schema" if kind == "names" and not isinstance(value, Mapping) else kind


def _note(tree: _Tree, schema: Mapping[str, Any], *, is_root: bool) -> None:
    kinds = schema.get("type")
    if isinstance(kinds, list) and len({str(kind) for kind in kinds}) < len(kinds):
        raise GenerationError(f"schema: type {shown(kinds, 60)} names one twice; leave it out")  # each is compiled
    patterns = schema.get("patternProperties")
    written = [schema.get("pattern"), *(patterns if isinstance(patterns, Mapping) else ())]
    tree.patterns += sum(len(one) for one in written if isinstance(one, str))
    if tree.patterns > LONGEST_PATTERNS:
        raise GenerationError(f"schema: its patterns have more than {LONGEST_PATTERNS} characters; shorten them")
    if isinstance(reference := schema.get("$ref"), str):
        tree.references.append(reference)
    tree.identified |= not is_root and any(isinstance(schema.get(name), str) for name in _IDENTIFIERS)


def _too_deep() -> GenerationError:
    return GenerationError(
        f"schema: is more than {DEEPEST} levels deep with each $ref followed; merge definitions or flatten it"
    )


def _depth(schema: Mapping[str, Any], tree: _Tree) -> int:
    """At most so many schemas llguidance is in at once, in whatever order it follows the references: it enters each
    only once, but takes one that is spelled otherwise (``%24defs``) for another."""
    trees, edges, weights = {id(schema): tree}, dict[Hashable, list[Hashable]](), dict[Hashable, int]()
    waiting: list[object] = [schema]
    while waiting:
        place = id(waiting.pop())
        edges[place], weights[place] = list(trees[place].references), 0
        for reference in set(trees[place].references) - weights.keys():
            target = _target(schema, reference)
            if tree.identified or target is None:
                return 2 * tree.levels * (len(tree.references) + 1)  # nobody here knows where it leads
            if id(target) not in trees:
                trees[id(target)] = _walked(target)
                waiting.append(target)
            edges[reference], weights[reference] = [id(target)], trees[id(target)].levels
    return tree.levels + _heaviest_path(edges, weights)


def _target(schema: object, reference: str) -> object | None:
    """What a JSON pointer (``#/$defs/a``) leads to; None where it is none, or leads nowhere."""
    if reference not in ("#", "#/") and not reference.startswith("#/"):
        return None
    node = schema
    for word in urllib.parse.unquote(reference[1:]).split("/")[1:] if reference != "#/" else []:
        key = word.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping) and key in node:
            node = node[key]
        elif isinstance(node, list | tuple) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            return None
    return node


def _heaviest_path(edges: Mapping[Node, Sequence[Node]], weights: Mapping[Node, int]) -> int:
    """At least the weight of every path that visits a node once: all nodes of a circle count. In linear time, by
    Tarjan's algorithm, which is done with a circle after all that it leads to."""
    order: dict[Node, int] = {}
    lowest: dict[Node, int] = {}
    done: dict[Node, int] = {}
    trail: list[Node] = []
    work: list[tuple[Node, Iterator[Node]]] = []

    def enter(node: Node) -> None:
        order[node] = lowest[node] = len(order)
        trail.append(node)
        work.append((node, iter(edges[node])))

    def leave(node: Node) -> None:
        circle = [trail.pop()]
        while circle[-1] != node:
            circle.append(trail.pop())
        behind = max((done[after] for one in circle for after in edges[one] if after in done), default=0)
        done.update(dict.fromkeys(circle, behind + sum(weights[one] for one in circle)))

    for start in edges:
        if start not in order:
            enter(start)
        while work:
            node, rest = work[-1]
            for after in rest:
                if after not in order:
                    enter(after)
                    break
                if after not in done:
                    lowest[node] = min(lowest[node], order[after])
            else:
                work.pop()
                if work:
                    lowest[work[-1][0]] = min(lowest[work[-1][0]], lowest[node])
                if lowest[node] == order[node]:
                    leave(node)
    return max(done.values(), default=0)
