"""The support table: runtimes × families × schemes × features, of what a run of the tests showed.

In: ``build/shown.json``, which every run writes (``tests.recording``). Out: ``lfm2_export/assets/tested.json``, which
the program and model cards read, and docs/support.md.

    python -m tests.support_table build/shown.json    what a run of the whole suite showed, and nothing else
    python -m tests.support_table --add build/shown.json    what a run of some tests showed, in place of what those had
    python -m tests.support_table    the page again, of what is there
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple
from pathlib import Path

from lfm2_export.backends import BACKENDS
from lfm2_export.families import DRAFTERS, FAMILIES
from lfm2_export.models import ENCODERS
from lfm2_export.support import schemes_by_runtime
from lfm2_export.tested import FEATURES, RESULTS, RUNTIMES, SKIPPED, Cell, Results

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
_PART = re.compile(r"(<!-- tested:begin[^>]*-->\n).*?(\n<!-- tested:end -->)", re.DOTALL)


def read(path: Path) -> Results:
    """What a run showed."""
    return Results.from_json(json.loads(path.read_text(encoding="utf-8")))


def added(before: Results, new: Results) -> Results:
    """``before`` with the tests of ``new``."""
    return Results(tests={**before.tests, **new.tests}, ran=new.ran)


def written(found: Results) -> str:
    """The committed file: a line for each test, so that changes can be read."""
    value = found.to_json()
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(test)}" for name, test in value["tests"].items())
    return f'{{"ran": {json.dumps(value["ran"])},\n"tests": {{\n{lines}\n}}}}\n'


def stale(found: Results, there: Mapping[str, tuple[Cell, ...]]) -> list[str]:
    """What of ``found`` the tests that are ``there``, with the cells that they show, do not bear out."""
    lines = []
    for name, test in found.tests.items():
        if name not in there:
            lines.append(f"{name}: there is no such test")
            continue
        shown = set(there[name])
        lines += [f"{name}: does not show {' '.join(astuple(cell))}" for cell in test.cells if cell not in shown]
    return lines


def compact() -> str:
    """A line for each runtime: the schemes that it opened, by family; for a page that has no room for more."""
    return _table(("Runtime", *(f"`{name}`" for name in (*FAMILIES, *DRAFTERS))), schemes_by_runtime())


def whole(found: Results) -> str:
    """Every cell, and the tests behind them."""
    parts = [_ran(found)]
    for family in (*FAMILIES, *DRAFTERS):
        for backend in BACKENDS:
            if rows := list(_rows(found, family, backend)):
                schemes = [f"`{scheme}`" for scheme in _schemes(family, backend)]
                parts += [f"### {family}: {backend}", _table(("Runtime", "Feature", *schemes), rows)]
    parts += ["## The tests behind them", _table(("Runtime", "Feature", "Tests"), _tests(found))]
    if skipped := [(f"`{name}`", test.reason or "") for name, test in found.tests.items() if test.outcome == SKIPPED]:
        parts += ["## Skipped in that run", _table(("Test", "Because"), skipped)]
    return "\n\n".join(parts)


def _ran(found: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found.ran.items() if name not in ("date", "system"))
    return f"Run on {found.ran['date']}, {found.ran['system']}; {versions}; {len(found.tests)} tests."


def _schemes(family: str, backend: str) -> tuple[str, ...]:
    made = BACKENDS[backend]
    return made.DRAFTER_SCHEMES if family in DRAFTERS else tuple(made.SCHEMES)


def _kind(family: str) -> str:
    return "drafter" if family in DRAFTERS else "encoder" if family in ENCODERS else "decoder"


def _rows(found: Results, family: str, backend: str) -> Iterator[tuple[str, ...]]:
    """What any family of its kind shows is a line of each, so that what is missing is seen."""
    alike = {(cell.runtime, cell.feature) for cell in found.by_cell if _kind(cell.family) == _kind(family)}
    for runtime in (name for name in RUNTIMES if RUNTIMES[name].backend == backend):
        for feature in (name for name in FEATURES if (runtime, name) in alike):
            cells = (
                Cell(runtime=runtime, family=family, scheme=scheme, feature=feature)
                for scheme in _schemes(family, backend)
            )
            yield (RUNTIMES[runtime].title, FEATURES[feature], *map(found.outcome, cells))


def _tests(found: Results) -> Iterator[tuple[str, ...]]:
    functions: dict[tuple[str, str], set[str]] = {}
    for cell, names in found.by_cell.items():
        functions.setdefault((cell.runtime, cell.feature), set()).update(name.partition("[")[0] for name in names)
    for runtime in RUNTIMES:
        for feature in FEATURES:
            if names := functions.get((runtime, feature)):
                tests = "<br>".join(f"`{name}`" for name in sorted(names))
                yield RUNTIMES[runtime].title, FEATURES[feature], tests


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(head)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def render(page: str, found: Results) -> str:
    """The page with its generated part made anew."""
    page, count = _PART.subn(lambda match: match[1] + whole(found) + match[2], page)
    assert count == 1, f"{PAGE.name} has {count} parts named tested"
    return page


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support_table", description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, help="what a run wrote: build/shown.json")
    parser.add_argument("--add", action="store_true", help="keep what other tests showed before")
    options = parser.parse_args(words)
    if options.results is not None:
        found = read(options.results)
        if options.add and RESULTS.is_file():
            found = added(read(RESULTS), found)
        RESULTS.write_text(written(found), encoding="utf-8")
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), read(RESULTS)), encoding="utf-8")


if __name__ == "__main__":
    main()
