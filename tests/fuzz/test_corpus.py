"""Every seed, every input that once did harm, and changes of both go through their readers and do none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.fuzz import campaign, replay
from tests.fuzz.targets import FOLDER, TARGETS, kept

# As many as take two seconds of a core or less: a graph is opened by onnxruntime, a manifest's weights are all read,
# and a tokenizer or template that is stopped takes its process along.
_MUTATIONS = {
    "artifact": 80,
    "chat_template": 80,
    "checkpoint": 80,
    "foreign": 60,
    "lora": 80,
    "onnx_graph": 40,
    "tokenizer": 40,
    "tokenizer_config": 40,
    "weights": 40,
}
_MOST_BYTES = 400_000


@pytest.mark.parametrize("target", TARGETS)
def test_a_reader_refuses_in_a_line_or_reads(target: str, tmp_path: Path) -> None:
    ran, harmful = replay.in_child(target, tmp_path / "found", "--mutations", str(_MUTATIONS.get(target, 150)))
    print(f"{target}: {ran} inputs")
    assert not harmful, "\n".join(harmful)
    assert ran > len(kept(target)) > 0


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is for Linux on x86-64")
@pytest.mark.parametrize("target", TARGETS)
def test_the_fuzzer_starts_reaches_the_reader_and_finds_nothing_at_once(target: str, tmp_path: Path) -> None:
    found = campaign.fuzz(target, 1, tmp_path, "-seed=1", "-runs=60")
    said = (tmp_path / "log.txt").read_text(encoding="utf-8", errors="replace")[-3000:]
    assert not found, f"{found}\n{said}"
    assert campaign.statuses(tmp_path / "log.txt")[-1].coverage > 20, said


def test_the_corpus_stays_small() -> None:
    folders = [FOLDER / kind for kind in ("base", "corpus", "crashes")]
    sizes = [path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()]
    print(f"{sum(sizes)} bytes in {len(sizes)} files")
    assert sum(sizes) < _MOST_BYTES
