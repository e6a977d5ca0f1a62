"""What the pages say of the program is what the program says, and every page can be reached."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lfm2_export
from documentation import api, commands, manifest, pages
from lfm2_export.commands.parser import CommandLine
from tests.readme import PARTS, render
from tests.readme import pages as pages_with_parts

NAMES = {str(path.relative_to(pages.ROOT)): path for path in pages_with_parts()}


@pytest.mark.parametrize("name", NAMES)
def test_generated_parts_are_current(name: str) -> None:
    text = NAMES[name].read_text(encoding="utf-8")
    assert render(text) == text, "run `python -m tests.readme`"


def test_control_a_part_that_is_not_current_is_seen() -> None:
    text = (pages.DOCS / "executorch.md").read_text(encoding="utf-8")
    assert render(text.replace("| Vulkan |", "| Volcano |")) == text
    with pytest.raises(AssertionError, match="a page has 0 parts named delegates"):
        render("<!-- delegates:begin -->\nof which the end is lost\n")


def test_every_part_that_is_made_is_on_a_page() -> None:
    """Or its table would be lost with a slip in the comment's name."""
    text = "".join(path.read_text(encoding="utf-8") for path in NAMES.values())
    assert {name: len(re.findall(f"<!-- {name}:begin", text)) for name in PARTS} == dict.fromkeys(PARTS, 1)


def test_no_placeholder_is_left() -> None:
    for name, path in pages.sources().items():
        assert not re.search(r"@@|TODO|FIXME", path.read_text(encoding="utf-8")), name


def test_the_readme_is_read_in_five_minutes() -> None:
    lines = (pages.ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 250


def test_the_navigation_leads_to_every_page(tmp_path: Path) -> None:
    assert not pages.misplaced()
    (tmp_path / "lost.md").write_text("# Lost\n")
    assert pages.misplaced(tmp_path) == ["docs/lost.md: is not in the navigation of zensical.toml"]


def test_the_page_of_commands_has_every_option() -> None:
    text = commands.page()
    for name, parser in CommandLine().verbs.items():
        _, _, section = text.partition(f"\n## {name}\n")
        section = section.partition("\n## ")[0]
        for action in commands.own_arguments(parser):
            for word in action.option_strings or [str(action.metavar)]:
                assert f"`{word}`" in section, f"{name}: {word}"
    assert "`--no-such-option`" not in text


def test_the_page_of_names_has_every_one() -> None:
    text = api.page()
    for name in lfm2_export.__all__:
        assert name == "__version__" or re.search(rf"(::: |#)lfm2_export\.{name}\b", text), name


def test_the_page_of_the_manifest_has_every_field() -> None:
    text = manifest.page()
    for kind, field in (
        ("Manifest", "adopted_files"),
        ("Program", "own_cache"),
        ("StoredTensor", "granularity"),
        ("StateTensor", "past_name"),
        ("FileEntry", "sha256"),
        ("TensorSpec", "shape"),
        ("CheckpointRecord", "shards"),
    ):
        section = text.partition(f"\n## {kind}\n")[2].partition("\n## ")[0]
        assert f"| `{field}` |" in section, kind
