"""The templates of this package, filled in: HTML pages, and the model card.

In: a template's name (``templates/``) and its values. Out: text. What goes into HTML is escaped; a name that a template
uses and nobody gave is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm2_export.errors import Lfm2ExportError, ResourceError
from lfm2_export.resources import is_disk_full

if TYPE_CHECKING:
    import jinja2

_TEMPLATES = Path(__file__).parent / "templates"
# Of a cell that holds a verdict (parity/figures.py, sweep/report.py), and of one with a number in it.
_KINDS = {"ok": "verdict good", "FELL SHORT": "verdict bad", "failed": "verdict bad"}
_NUMBER = "number"


def fill_in(
    template: str, values: Mapping[str, Any], *, filters: Mapping[str, Callable[[Any], str]] | None = None
) -> str:
    """The text of ``templates/<template>``; ``filters``: what ``| name`` does in it, beside jinja2's own."""
    environment = _environment().overlay(autoescape=template.endswith(".html"))
    environment.filters = {**environment.filters, **(filters or {})}
    return environment.get_template(template).render(values)


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


@dataclass(frozen=True, kw_only=True)
class Cell:
    """``kind``: its class in style.css."""

    text: str
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a page; the macro is in ``macros.html``."""

    head: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @classmethod
    def of(cls, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
        """The first column is a name; others whose cells are all numbers stand to the right."""
        found = [tuple(row) for row in rows]
        kinds = [
            _NUMBER if index > 0 and all(_is_number(row[index]) for row in found) else "" for index in range(len(head))
        ]
        lines = [
            tuple(Cell(text=text, kind=_KINDS.get(text, kind)) for text, kind in zip(row, kinds, strict=True))
            for row in (head, *found)
        ]
        return cls(head=lines[0], rows=tuple(lines[1:]))


def _is_number(text: str) -> bool:
    return not text or text[0].isdigit() or text.startswith(("≤", "≥", ">", "not finite"))


def write_page(page: str, path: str | Path) -> None:
    """Writes a page.

    Raises:
        ResourceError: the disk is full.
        Lfm2ExportError: the file cannot be written.
    """
    try:
        # Names may hold bytes that are no text; they are shown as escapes.
        Path(path).write_bytes(page.encode("utf-8", "backslashreplace"))
    except OSError as error:
        kind = ResourceError if is_disk_full(error) else Lfm2ExportError
        raise kind(f"{path}: the report cannot be written ({error.strerror}); give another file") from error
