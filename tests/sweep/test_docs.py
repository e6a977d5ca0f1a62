"""The page on sweeps: the plans that it shows are plans."""

from __future__ import annotations

import re
from pathlib import Path

from lfm2_export.sweep.cells import make_cells
from lfm2_export.sweep.plan import read_plan

PAGE = Path(__file__).parents[2] / "docs" / "sweep.md"


def test_plans_that_the_page_shows_can_be_read(tmp_path: Path) -> None:
    for name in ("my-model", "my-adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "held-out.txt").write_text("a text")
    plans = re.findall(r"```yaml\n(.*?)```|<<END\n(.*?)END", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(plans) == 2
    for index, parts in enumerate(plans):
        path = tmp_path / f"plan{index}.yaml"
        path.write_text("".join(parts))
        cells = make_cells(read_plan(path))
        print(*(f"{cell.name}: {cell.skipped or dict(cell.settings)}" for cell in cells), sep="\n")
        assert any(not cell.skipped for cell in cells)
