"""What is wrong with the links of a built site.

In: its folder. Out: a line for each page, place in a page or file that is not there, and for whatever a page would load
from elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes that a browser follows by itself; an <a> only leads somewhere.
_LOADS = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src"), ("use", "href")}


def faults(site: Path) -> list[str]:
    """Every broken link of every page, and every load from another place."""
    return [f"{page.relative_to(site)}: {fault}" for page in sorted(site.rglob("*.html")) for fault in _of(page, site)]


def _of(page: Path, site: Path) -> Iterator[str]:
    for tag, attribute, target in _read(page).links:
        parts = urlsplit(target)
        if parts.scheme or parts.netloc:
            if (tag, attribute) in _LOADS and parts.scheme != "data":
                yield f"<{tag}> loads {target}"
        elif not (page.name == "404.html" and target.startswith("/")):
            yield from _local(page, site, target, unquote(parts.path), unquote(parts.fragment))


def _local(page: Path, site: Path, target: str, path: str, fragment: str) -> Iterator[str]:
    found = (page.parent / path).resolve() if path else page
    if found.is_dir():
        found /= "index.html"
    if not found.is_relative_to(site.resolve()) or not found.is_file():
        yield f"{target}: there is no such file"
    elif fragment and found.suffix == ".html" and fragment not in _read(found).places:
        yield f"{target}: there is no such place in it"


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[tuple[str, str, str]] = []
        self.places: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("id", "name"):
                self.places.add(value)
            if value and name in ("href", "src"):
                self.links.append((tag, name, value))


@functools.cache
def _read(page: Path) -> _Page:
    found = _Page()
    found.feed(page.read_text(encoding="utf-8"))
    return found
