"""The program that renders chat templates, in a child process.

In: a Jinja template (a stranger's program) and its variables. Out: the text. The environment, its filters, globals
and extensions are those of transformers 5.23's ``apply_chat_template``: sandboxed, immutable, and given plain JSON data
only, so that a template reaches nothing but the conversation.
"""

from __future__ import annotations

import json
import marshal
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from lfm2_export.isolated.serve import serve
from lfm2_export.isolated.wire import Refusal
from lfm2_export.messages import one_line

# Of a template's own message; what it is about stands before and after it.
_MESSAGE_LIMIT = 240


def main() -> None:
    """Each request: (template, variables, characters that the text may have) as marshal writes them."""
    _compile("{{ messages }}")  # before anyone waits: the first of all takes ten times as long as the second
    serve(_answer)


def _answer(request: bytes) -> bytes:
    template, values, limit = marshal.loads(request)
    try:
        return _rendered(_compile(template), values, limit).encode("utf-8", "surrogatepass")
    except (MemoryError, Refusal):
        raise
    except jinja2.TemplateSyntaxError as error:
        raise Refusal(f", line {error.lineno}: {one_line(str(error.message), _MESSAGE_LIMIT)}") from None
    except Exception as error:  # a template's own arithmetic, indexing and calls can raise anything
        raise Refusal(f": {_message(error)} ({one_line(type(error).__name__, 40)})") from None


def _rendered(template: jinja2.Template, values: dict[str, Any], limit: int) -> str:
    """What ``template.render`` gives, counted on the way."""
    pieces, size = list[str](), 0
    for piece in template.generate(values):
        size += len(piece)
        if size > limit:
            raise Refusal(f": gives more than {limit} characters; use a simpler template or a shorter conversation")
        pieces.append(piece)
    return "".join(pieces)


def _message(error: Exception) -> str:
    try:
        return " ".join(one_line(str(error), _MESSAGE_LIMIT).split())
    except MemoryError:
        raise
    except Exception:
        return "an error without a message"


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment.from_string(template)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what the assistant wrote, for training masks; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it this way)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """``dict`` without the class behind it, whose attributes lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """``namespace`` that takes no underscored names, which reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may set one named self
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}; rename it")
