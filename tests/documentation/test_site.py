"""The site is built of the pages, leads nowhere that is not there, and loads nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from documentation import links, pages
from documentation.__main__ import build

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("zensical") is None or importlib.util.find_spec("mkdocstrings") is None,
    reason="pip install 'lfm2-export[docs]'",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    work = tmp_path_factory.mktemp("documentation")
    return build(work), work / "site"


def test_it_builds_and_its_links_lead_somewhere(built: tuple[list[str], Path]) -> None:
    wrong, site = built
    assert not wrong
    found = {str(page.relative_to(site).with_suffix(".md")) for page in site.rglob("*.html")} - {"404.md"}
    assert found == pages.sources().keys() | pages.GENERATED.keys()
    print(f"{len(found)} pages")


def test_public_names_are_written_with_their_docstrings(built: tuple[list[str], Path]) -> None:
    text = (built[1] / "reference" / "api.html").read_text(encoding="utf-8")
    assert 'id="lfm2_export.load_runner"' in text
    assert "files are checked against the manifest first" in text


def test_readers_see_what_does_not_run(built: tuple[list[str], Path]) -> None:
    text = (built[1] / "android.html").read_text(encoding="utf-8")
    assert "Not run by the tests: needs a phone" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[there](nowhere.md)", "page does not exist"),
        ("[there](export.md#nowhere)", "anchor does not exist"),
    ],
)
def test_control_a_broken_link_fails(text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = tmp_path / "docs"
    shutil.copytree(pages.DOCS, docs)
    (docs / "limits.md").write_text(f"# Limits\n\n{text}\n")
    monkeypatch.setattr(pages, "GENERATED", {})  # nothing that takes long
    assert any(said in line and "limits.md:3" in line for line in build(tmp_path / "work", docs))


@pytest.fixture
def site(tmp_path: Path) -> Callable[[str], list[str]]:
    """``site(html)``: what is wrong with a site of one page, with a place ``here`` and a picture beside it."""

    def faults(html: str) -> list[str]:
        (tmp_path / "index.html").write_text(f'<h1 id="here">One</h1><a href="#here"></a><img src="a.png">{html}')
        (tmp_path / "a.png").write_bytes(b"")
        links._read.cache_clear()
        return links.faults(tmp_path)

    return faults


def test_control_what_is_wrong_with_a_page_is_told(site: Callable[[str], list[str]]) -> None:
    assert not site('<a href="https://example.org/"></a><img src="data:image/png;base64,">')
    assert site('<a href="gone.html">') == ["index.html: gone.html: there is no such file"]
    assert site('<a href="../gone.html">') == ["index.html: ../gone.html: there is no such file"]
    assert site('<img src="b.png">') == ["index.html: b.png: there is no such file"]
    assert site('<a href="#there">') == ["index.html: #there: there is no such place in it"]
    assert site('<script src="//cdn.example.org/a.js">') == ["index.html: <script> loads //cdn.example.org/a.js"]
    assert site('<link href="https://fonts.example.org/a.css">') == [
        "index.html: <link> loads https://fonts.example.org/a.css"
    ]
