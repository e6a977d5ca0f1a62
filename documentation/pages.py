"""Which Markdown files the site is made of, and its navigation.

In: ``docs/``, README.md, CONTRIBUTING.md and CHANGELOG.md, the program. Out: a folder of Markdown in which the
program's own pages are written, and the settings for zensical: ``zensical.toml`` with what is only known now.
"""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from documentation import api, commands, manifest
from documentation.blocks import with_reasons_shown

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SETTINGS = ROOT / "zensical.toml"

# Files beside docs/ that are pages too, by their page.
OUTSIDE: Mapping[str, str] = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
GENERATED: Mapping[str, Callable[[], str]] = {
    "reference/commands.md": commands.page,
    "reference/api.md": api.page,
    "reference/manifest.md": manifest.page,
}
IMAGES = ROOT / "benchmarks" / "results"


def sources(docs: Path = DOCS) -> dict[str, Path]:
    """Every page that somebody wrote, by its name on the site."""
    written = {str(path.relative_to(docs)): path for path in sorted(docs.rglob("*.md"))}
    return written | {name: ROOT / path for name, path in OUTSIDE.items()}


def write(folder: Path, docs: Path = DOCS) -> None:
    """The pages, with the pictures and the style that they show."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(docs, folder, ignore=shutil.ignore_patterns("*.md"))
    for name, source in sources(docs).items():
        text = source.read_text(encoding="utf-8")
        _put(folder / name, with_reasons_shown(_as_a_page(text) if name in OUTSIDE else text))
    for name, made in GENERATED.items():
        _put(folder / name, made())
    (folder / "images").mkdir(exist_ok=True)
    for picture in IMAGES.glob("*.png"):
        shutil.copy(picture, folder / "images")


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _as_a_page(text: str) -> str:
    """Links from the checkout's folder, as links from the site's."""
    for page, source in OUTSIDE.items():
        text = text.replace(f"]({source}", f"]({page}")
    return re.sub(r"\]\((?:docs|benchmarks/results)/([^)]+?)\)", _moved, text)


def _moved(link: re.Match[str]) -> str:
    return f"](images/{link[1]})" if link[1].endswith(".png") else f"]({link[1]})"


def settings(docs: Path = DOCS) -> dict[str, Any]:
    """zensical's, for a file in the folder above the pages'. The navigation's pages that are not there are left out."""
    project: dict[str, Any] = tomllib.loads(SETTINGS.read_text(encoding="utf-8"))["project"]
    there = sources(docs).keys() | GENERATED.keys()
    return project | {"docs_dir": "pages", "site_dir": "site", "nav": list(_there(project["nav"], there))}


def _there(entries: list[Any], there: Any) -> Iterator[Any]:
    for entry in entries:
        ((title, value),) = entry.items()
        if isinstance(value, list):
            yield {title: list(_there(value, there))}
        elif value in there:
            yield entry


def in_navigation() -> set[str]:
    """Every page that zensical.toml names, there or not."""
    return set(_names(tomllib.loads(SETTINGS.read_text(encoding="utf-8"))["project"]["nav"]))


def _names(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        ((_, value),) = entry.items()
        yield from _names(value) if isinstance(value, list) else [value]


def misplaced(docs: Path = DOCS) -> list[str]:
    """What is wrong with the navigation: a page that it does not lead to."""
    return [
        f"docs/{name}: is not in the navigation of zensical.toml"
        for name in sorted(sources(docs))
        if name not in in_navigation()
    ]


def missing(docs: Path = DOCS) -> list[str]:
    """Pages of the navigation that nobody has written."""
    return sorted(in_navigation() - sources(docs).keys() - GENERATED.keys())


def write_settings(path: Path, docs: Path = DOCS) -> None:
    """As JSON, which is YAML."""
    path.write_text(json.dumps(settings(docs), indent=1), encoding="utf-8")
