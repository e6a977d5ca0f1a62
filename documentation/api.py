"""The page of the public names.

In: ``lfm2_export.__all__``. Out: Markdown in which mkdocstrings writes each of them, from its signature and docstring.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import lfm2_export

_HEAD = """# Python names

All that `import lfm2_export` offers; each name is loaded when it is first used.
How they work together: [In Python](../python.md).
"""
_GROUPS = ("Functions", "Classes", "Errors", "Choices")


def page() -> str:
    """Every public name, in groups."""
    named = {name: getattr(lfm2_export, name) for name in lfm2_export.__all__ if name != "__version__"}
    lines = [_HEAD]
    for group in _GROUPS:
        found = [name for name, value in named.items() if _group(value) == group]
        lines += [f"## {group}", "", *_entries(found, group)]
    return "\n".join(lines)


def _entries(names: list[str], group: str) -> Iterator[str]:
    for name in names:
        if group == "Choices":
            words = ", ".join(f"`{word}`" for word in getattr(lfm2_export, name).__args__)
            yield f"`{name}`{{ #lfm2_export.{name} }}\n:   {words}\n"
        else:
            yield f"::: lfm2_export.{name}\n"


def _group(value: object) -> str:
    if not inspect.isclass(value):
        return "Functions" if inspect.isroutine(value) else "Choices"
    return "Errors" if issubclass(value, Exception) else "Classes"
