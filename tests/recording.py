"""A pytest plugin: how tests ended that show something (``tests.shows``), in ``build/shown.json`` of pytest's root or
the file that ``SHOWN_INTO`` names.

In: the reports of one process or of xdist's workers. Out: what ``python -m tests.support_table`` reads; of a run that
only collects, what there is: tests as ``COLLECTED``, modules that were skipped as a whole as tests without cells.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib import metadata
from pathlib import Path

import pytest

from lfm2_export.tested import FAILED, PASSED, RUNTIMES, SKIPPED, Result, Results, cell_of
from tests.shows import MARK, cells_of

FILE, INTO = "build/shown.json", "SHOWN_INTO"
COLLECTED = "collected"
_PACKAGES = (
    "onnxruntime",
    "onnxruntime-genai",
    "executorch",
    "torch",
    "transformers",
    "sentence-transformers",
    "llama-cpp-python",
)
_JS = "examples/transformers_js/node_modules/@huggingface/transformers/package.json"


class Recorder:
    """Keeps the worst that each phase of a test came to."""

    def __init__(self, config: pytest.Config) -> None:
        self.tests: dict[str, Result] = {}
        self.only_collects = config.option.collectonly

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """The cells travel from a worker with its reports."""
        for item in items:
            if cells := cells_of(item):
                if self.only_collects:
                    self.tests[item.nodeid] = Result(outcome=COLLECTED, cells=cells)
                words = [f"{cell.runtime} {cell.family} {cell.scheme} {cell.feature}" for cell in cells]
                item.user_properties.append((MARK, words))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if self.only_collects and report.skipped:
            self.tests[report.nodeid] = Result(outcome=SKIPPED, cells=(), reason=_reason(report))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        words = dict(report.user_properties).get(MARK)
        if words is None:
            return
        before = self.tests.get(report.nodeid)
        if report.failed or (before is not None and before.outcome == FAILED):
            outcome, reason = FAILED, None
        elif report.skipped:
            outcome, reason = SKIPPED, _reason(report)
        elif before is None or before.outcome != SKIPPED:
            outcome, reason = PASSED, None
        else:
            outcome, reason = before.outcome, before.reason
        cells = tuple(map(cell_of, words))  # type: ignore[call-overload]
        self.tests[report.nodeid] = Result(outcome=outcome, cells=cells, reason=reason)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput") or not self.tests:
            return
        found = Results(tests=_without_what_did_not_run(self.tests), ran=_ran(session.config.rootpath))
        path = Path(os.environ.get(INTO) or session.config.rootpath / FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def _without_what_did_not_run(tests: dict[str, Result]) -> dict[str, Result]:
    """Where our operators cannot be had, tests that take them where they can ran on ONNX Runtime's."""
    from lfm2_export.backends.onnx.variants import own_library

    if own_library() is not None:
        return tests

    def own(test: Result) -> bool:
        return any(RUNTIMES[cell.runtime].own and RUNTIMES[cell.runtime].backend == "onnx" for cell in test.cells)

    return {
        name: Result(outcome=SKIPPED, cells=test.cells, reason="no compiler for our operators")
        if own(test) and test.outcome == PASSED
        else test
        for name, test in tests.items()
    }


def _ran(root: Path) -> dict[str, str]:
    found = {"date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    found["system"] = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if (root / _JS).is_file():
        found["Transformers.js"] = json.loads((root / _JS).read_text())["version"]
    return found


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "shows(runtime, features, family, scheme): cells of the support table")
    config.pluginmanager.register(Recorder(config), "support-recorder")
