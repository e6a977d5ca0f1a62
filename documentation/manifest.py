"""The page of the manifest's fields. In: the dataclasses that read and write ``lfm2_export.json``. Out: Markdown."""

from __future__ import annotations

import dataclasses
import inspect

from lfm2_export import manifest
from lfm2_export.cache import StateTensor

_HEAD = f"""# The manifest

`{manifest.MANIFEST}` says what a folder holds: JSON, schema version {manifest.SCHEMA_VERSION},
at most {manifest.MANIFEST_LIMIT >> 20} MB. Every object below has exactly these fields: one that is unknown,
missing or of another type is refused by name. They change with the schema's version only; a field with a default may be
absent, so that older manifests are read.
"""


def page() -> str:
    """Every object of the file, the whole first."""
    found = _reached(manifest.Manifest)
    return "\n".join([_HEAD, *(_section(one) for one in found)])


def _reached(first: type) -> list[type]:
    """The dataclasses that lie within, each once."""
    everything = {name: value for name, value in vars(manifest).items() if dataclasses.is_dataclass(value)}
    everything["CacheSpec"] = StateTensor  # which is written as the list of its tensors
    found = [first]
    for one in found:
        for field in dataclasses.fields(one):
            found += [v for n, v in everything.items() if n in str(field.type) and v not in found]
    return found


def _section(one: type) -> str:
    lines = [f"## {one.__name__}", "", " ".join((inspect.getdoc(one) or "").replace("``", "`").split()), ""]
    lines += ["| Field | Type | Default |", "|---|---|---|"]
    for field in dataclasses.fields(one):
        lines.append(f"| `{field.name}` | `{_type(field)}` | {_default(field)} |")
    return "\n".join([*lines, ""])


def _type(field: dataclasses.Field[object]) -> str:
    return (
        str(field.type)
        .replace("|", r"\|")
        .replace("Mapping", "object")
        .replace("tuple", "array")
        .replace("CacheSpec", "array[StateTensor]")
    )


def _default(field: dataclasses.Field[object]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()!r}`"
    if field.default is dataclasses.MISSING:
        return "must be there"
    return "null" if field.default is None else f"`{field.default!r}`"
