"""Every seed, every input that once did harm, and changes of both go through their readers and do none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.fuzz import campaign, replay
from tests.fuzz.targets import FOLDER, TARGETS, kept

# As many as take a second or so: a graph is opened by onnxruntime, a manifest's weights are all read.
_MUTATIONS = {"onnx_graph": 40, "weights": 80, "checkpoint": 150, "artifact": 150}
_MOST_BYTES = 320_000
# Readers with findings that are not fixed yet.
_PENDING: tuple[str, ...] = ()
_ALL = [
    pytest.param(target, marks=pytest.mark.xfail(reason="pending") if target in _PENDING else ()) for target in TARGETS
]


@pytest.mark.parametrize("target", _ALL)
def test_a_reader_refuses_in_a_line_or_reads(target: str, tmp_path: Path) -> None:
    ran, harmful = replay.in_child(target, tmp_path / "found", "--mutations", str(_MUTATIONS.get(target, 250)))
    print(f"{target}: {ran} inputs")
    assert not harmful, "\n".join(harmful)
    assert ran > len(kept(target)) > 0


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is for Linux on x86-64")
@pytest.mark.parametrize("target", _ALL)
def test_the_fuzzer_starts_reaches_the_reader_and_finds_nothing_at_once(target: str, tmp_path: Path) -> None:
    found = campaign.fuzz(target, 1, tmp_path, "-seed=1", "-runs=300")
    said = (tmp_path / "log.txt").read_text(encoding="utf-8", errors="replace")[-3000:]
    assert not found, f"{found}\n{said}"
    assert campaign.statuses(tmp_path / "log.txt")[-1].coverage > 20, said


def test_the_corpus_stays_small() -> None:
    folders = [FOLDER / kind for kind in ("base", "corpus", "crashes")]
    sizes = [path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()]
    print(f"{sum(sizes)} bytes in {len(sizes)} files")
    assert sum(sizes) < _MOST_BYTES
