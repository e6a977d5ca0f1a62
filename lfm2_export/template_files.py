"""The chat templates of a checkpoint or an artifact by name, read as transformers 5.23 reads them.

In: a folder and its tokenizer_config.json. Out: Jinja sources by name, that of a lone template "default". They lie in
chat_template.jinja and ``additional_chat_templates/<name>.jinja``; where there is neither, in tokenizer_config.json, as
one text or as a list of names and texts. Names and texts are a stranger's: plain names, so many and so large as a
person would make them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lfm2_export import paths
from lfm2_export.errors import ArtifactError, Lfm2ExportError
from lfm2_export.files import TEXT_LIMIT, read_text
from lfm2_export.messages import listed

logger = logging.getLogger(__name__)

TEMPLATE, FOLDER = "chat_template.jinja", "additional_chat_templates"
DEFAULT, WITH_TOOLS = "default", "tool_use"
MOST_TEMPLATES = 16
# Characters of all of them: they go into one JSON file, which has a limit of its own.
_TOTAL_LIMIT = 2 * TEXT_LIMIT

_SUFFIX = ".jinja"
_NAME = re.compile(r"\w[\w.+ -]{0,63}")


def read(folder: Path, config: Mapping[str, Any], kind: type[Lfm2ExportError] = ArtifactError) -> dict[str, str]:
    """The templates by name; none where there are none.

    Args:
        folder: of the checkpoint or artifact.
        config: tokenizer_config.json, whose templates count where no file has one.
        kind: what is raised.

    Raises:
        kind: a file is damaged, too large, no regular file or a link that leaves the folder; a text is no Unicode; or
            there are too many, or too large ones.
    """
    found = read_files(folder, kind)
    if not found:
        place = folder / "tokenizer_config.json"
        stated = dict(_stated(config.get("chat_template")))
        plain = _plain_names(stated, place)
        found = _bounded({name: stated[name] for name in plain}, place, kind)
        for name, template in found.items():
            _check(name, template, place, kind)
    return found


def read_files(folder: Path, kind: type[Lfm2ExportError]) -> dict[str, str]:
    """The templates that have files of their own; raises as ``read``."""
    found: dict[str, str] = {}
    if paths.exists(folder / TEMPLATE, kind):
        found[DEFAULT] = read_text(folder / TEMPLATE, folder, kind)
    for name, path in additional(folder, kind).items():  # transformers lets a second default win
        found[name] = read_text(path, folder, kind)
    return _bounded(found, folder / FOLDER, kind)


def additional(folder: Path, kind: type[Lfm2ExportError]) -> dict[str, Path]:
    """The files of additional_chat_templates by the names of their templates; those with odd names are left out, and
    said.

    Raises:
        kind: the folder may not be read, or holds too many templates.
    """
    place = folder / FOLDER
    if not paths.is_folder(place, kind):
        return {}
    names = [name.removesuffix(_SUFFIX) for name in paths.names(place, kind, lambda name: name.endswith(_SUFFIX))]
    chosen = _plain_names(names, place)
    if len(chosen) > MOST_TEMPLATES:
        raise kind(f"{paths.shown(place)}: holds {len(chosen)} chat templates, more than {MOST_TEMPLATES}; remove some")
    return {name: place / (name + _SUFFIX) for name in chosen}


def file_name(name: str) -> str:
    """Where the template of this name lies in its folder."""
    return TEMPLATE if name == DEFAULT else f"{FOLDER}/{name}{_SUFFIX}"


def _plain_names(names: Iterable[str], place: Path) -> list[str]:
    """Those that a file may have anywhere; a warning says which others there are."""
    names = list(names)
    if odd := [name for name in names if not _NAME.fullmatch(name)]:
        _warn_of_names(paths.shown(place), listed(odd))
    return [name for name in names if _NAME.fullmatch(name)]


@cache
def _warn_of_names(place: str, names: str) -> None:
    logger.warning("%s: these are no names of chat templates; left out: %s", place, names)


def _stated(value: object) -> Iterator[tuple[str, str]]:
    """What tokenizer_config.json says: a text, a list of names and texts, or texts by name."""
    if isinstance(value, str):
        yield DEFAULT, value
    elif isinstance(value, Mapping):
        yield from ((name, text) for name, text in value.items() if isinstance(text, str))
    elif isinstance(value, list):
        for entry in value:
            name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, Mapping) else (None, None)
            if isinstance(name, str) and isinstance(text, str):
                yield name, text


def _bounded(found: dict[str, str], place: Path, kind: type[Lfm2ExportError]) -> dict[str, str]:
    if len(found) > MOST_TEMPLATES:
        raise kind(f"{paths.shown(place)}: holds {len(found)} chat templates, more than {MOST_TEMPLATES}; remove some")
    total = sum(map(len, found.values()))
    if total > _TOTAL_LIMIT:
        raise kind(
            f"{paths.shown(place)}: its chat templates have {total} characters, more than {_TOTAL_LIMIT}; remove some"
        )
    return found


def _check(name: str, template: str, place: Path, kind: type[Lfm2ExportError]) -> None:
    what = "chat_template" if name == DEFAULT else f"chat_template {name[:40]!a}"
    try:
        template.encode("utf-8")
    except UnicodeEncodeError as error:
        raise kind(
            f"{paths.shown(place)}: {what} has no Unicode text at character {error.start}; bring back the original"
        ) from error
    if len(template) > TEXT_LIMIT:
        raise kind(
            f"{paths.shown(place)}: {what} has {len(template)} characters, more than {TEXT_LIMIT}; bring back the "
            "original"
        )
