"""The support table says what tests showed: each is there and shows it, and how it ended is written down."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from lfm2_export import backends
from lfm2_export.backends import BACKENDS
from lfm2_export.families import FAMILIES
from lfm2_export.tested import (
    FAILED,
    FEATURES,
    NOT_TESTED,
    PASSED,
    RESULTS,
    RUNTIMES,
    SKIPPED,
    Cell,
    Result,
    Results,
    opened_by,
    results,
)
from tests.recording import INTO
from tests.shows import cells_of
from tests.support_table import PAGE, added, compact, read, render, stale, whole, written

ROOT = Path(__file__).parents[1]
CELL = Cell(runtime="genai", family="lfm2", scheme="q4", feature="greedy")
# More tests than these are all there are: those of the suite, and those that show something.
WHOLE, MARKED = 5_000, 200
RAN = {"date": "2026-01-01", "system": "here"}


def run_pytest(folder: Path, into: Path, *words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), INTO: str(into)}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    return done.stdout + done.stderr


def collected(files: Iterable[str], into: Path) -> Results:
    """What the tests of some modules show, without running any."""
    said = run_pytest(ROOT, into, "--collect-only", *sorted(files))
    assert into.is_file(), said[-2000:]
    return read(into)


def test_every_test_of_the_table_is_there_and_shows_it(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A run of the whole suite has collected them all; else the modules of the others are."""
    there = {item.nodeid: cells_of(item) for item in request.session.items}
    whole = len(there) > WHOLE
    skipped: set[str] = set()
    if missing := {name.partition("::")[0] for name in results().tests if name not in there}:
        files = {file for file in missing if (ROOT / file).is_file()}
        if files:
            found = collected(files, tmp_path / "there.json")
            there |= {name: test.cells for name, test in found.tests.items()}
            skipped = {name for name, test in found.tests.items() if test.outcome == SKIPPED}
    left = {name: test for name, test in results().tests.items() if name.partition("::")[0] not in skipped}
    print(f"{len(left)} tests show {len(results().by_cell)} cells; not installed here: {sorted(skipped)}")
    assert left
    assert stale(replace(results(), tests=left), there) == [], "refresh it: python -m tests.support_table"
    if whole and not skipped:  # a runtime or a feature that no test names would only be a wish
        cells = {cell for cells in there.values() for cell in cells}
        assert set(RUNTIMES) - {cell.runtime for cell in cells} == set()
        assert set(FEATURES) - {cell.feature for cell in cells} == set()


def test_a_test_that_is_gone_or_shows_something_else_is_noticed() -> None:
    """The control."""
    found = Results(tests={"a.py::test[x]": Result(outcome=PASSED, cells=(CELL,))}, ran=RAN)
    assert stale(found, {"a.py::test[x]": (CELL,)}) == []
    assert stale(found, {"a.py::test[y]": (CELL,)}) == ["a.py::test[x]: there is no such test"]
    other = replace(CELL, scheme="q8")
    assert stale(found, {"a.py::test[x]": (other,)}) == ["a.py::test[x]: does not show genai lfm2 q4 greedy"]


def test_the_page_and_the_file_are_current() -> None:
    assert RESULTS.read_text(encoding="utf-8") == written(results())
    page = PAGE.read_text(encoding="utf-8")
    assert render(page, results()) == page, "run `python -m tests.support_table`"
    assert render(page, Results(tests={}, ran=RAN)) != page


def test_a_cell_is_as_good_as_its_tests_and_nothing_is_guessed() -> None:
    def outcome(*outcomes: str) -> str:
        tests = {f"test{i}": Result(outcome=one, cells=(CELL,)) for i, one in enumerate(outcomes)}
        return Results(tests=tests, ran=RAN).outcome(CELL)

    assert outcome() == NOT_TESTED
    assert outcome(SKIPPED) == SKIPPED
    assert outcome(SKIPPED, PASSED) == PASSED
    assert outcome(PASSED, FAILED, SKIPPED) == FAILED
    found = Results(tests={"test": Result(outcome=PASSED, cells=(CELL,))}, ran=RAN)
    assert found.passed("lfm2", "q4") == ("genai",)
    assert found.passed("lfm2", "q8") == found.passed("lfm3", "q4") == found.passed("lfm2", "q4", ["padding"]) == ()
    page = whole(replace(found, tests={"a.py::test_x": Result(outcome=SKIPPED, cells=(CELL,), reason="no | og")}))
    assert (
        "| onnxruntime-genai | greedy tokens of the reference | not tested | not tested | not tested | skipped |"
        in page
    )
    assert "| `a.py::test_x` | no / og |" in page


def test_what_some_tests_showed_is_added() -> None:
    old = Results(tests={n: Result(outcome=FAILED, cells=(CELL,)) for n in "ab"}, ran=RAN)
    new = Results(tests={"b": Result(outcome=PASSED, cells=(CELL,))}, ran={**RAN, "date": "2026-01-02"})
    both = added(old, new)
    assert {name: test.outcome for name, test in both.tests.items()} == {"a": FAILED, "b": PASSED}
    assert both.ran["date"] == "2026-01-02"
    assert Results.from_json(both.to_json()) == both


def test_what_cards_say_opens_a_program_was_seen_to() -> None:
    """Of what the table knows; of a run of the whole suite that is all."""
    for name, backend in BACKENDS.items():
        for family in FAMILIES:
            for scheme in backend.SCHEMES:
                said = set(backends.tested_with(backend.TESTED_WITH, family, scheme).split(", ")) - {"lfm2-export"}
                seen = set(opened_by(name, family, scheme))
                known = {RUNTIMES[cell.runtime].short for cell in results().by_cell if cell.family == family}
                unseen = said - seen if len(results().tests) > MARKED else (said & known) - seen
                assert not unseen, f"{name} {family} {scheme}: no test showed {unseen}"
    assert compact().count("\n") == len(RUNTIMES) + 1


TESTS = """
import pytest
from tests.shows import of, shows

@pytest.fixture
def broken():
    yield
    raise RuntimeError("afterwards")

@shows("genai", "greedy", family=of("checkpoint"), scheme=("q4", "q8"))
@pytest.mark.parametrize("checkpoint", ["tiny-dense", "tiny-moe"])
def test_some(checkpoint):
    assert checkpoint == "tiny-dense"

@shows("genai", "rows", family="lfm3", scheme="q4")
def test_skipped():
    pytest.skip("it rains")

@shows("genai", "chat", family="lfm3", scheme=of("scheme", {"a": "q4"}.get))
@pytest.mark.parametrize("scheme", ["a", "b"])
def test_end(scheme, broken):
    pass

def test_else():
    pass
"""


@pytest.mark.parametrize("processes", [0, 2])
def test_how_tests_end_is_written_down_by_one_process_and_by_several(tmp_path: Path, processes: int) -> None:
    (tmp_path / "test_made_up.py").write_text(TESTS)
    said = run_pytest(tmp_path, tmp_path / "shown.json", "-p", "tests.recording", f"-n{processes}")
    found = read(tmp_path / "shown.json")
    print(said[-300:])
    assert {name.partition("::")[2]: test.outcome for name, test in found.tests.items()} == {
        "test_some[tiny-dense]": PASSED,
        "test_some[tiny-moe]": FAILED,
        "test_skipped": SKIPPED,
        "test_end[a]": FAILED,
    }
    assert [test.reason for test in found.tests.values() if test.outcome == SKIPPED] == ["it rains"]
    assert set(found.by_cell) == {
        *(
            Cell(runtime="genai", family=f, scheme=s, feature="greedy")
            for f in ("lfm2", "lfm2_moe")
            for s in ("q4", "q8")
        ),
        Cell(runtime="genai", family="lfm3", scheme="q4", feature="rows"),
        Cell(runtime="genai", family="lfm3", scheme="q4", feature="chat"),
    }
    assert found.passed("lfm2", "q8") == ("genai",)
    assert found.passed("lfm2_moe", "q8") == ()


@pytest.mark.parametrize(
    ("mark", "fault"),
    [
        ('shows("ganai", "greedy", family="lfm2", scheme="q4")', "'shows' names ganai, which is none of "),
        ('shows("genai", "greedi", family="lfm2", scheme="q4")', "'shows' names greedi, which is none of "),
        ('shows("genai", "greedy", family="lfm4", scheme="q4")', "'shows' names lfm4, which is none of "),
        ('shows("genai", "greedy", family=of("name"), scheme="q4")', "has no parameter name, which its mark"),
    ],
)
def test_a_mark_that_names_nothing_stops_the_run(mark: str, fault: str, request: pytest.FixtureRequest) -> None:
    from tests import shows

    made = eval(mark, {"shows": shows.shows, "of": shows.of})
    item = request.node
    item.own_markers.append(made.mark)
    try:
        with pytest.raises(ValueError, match=fault):
            cells_of(item)
    finally:
        item.own_markers.remove(made.mark)
