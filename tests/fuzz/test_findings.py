"""The harness sees what it is there for: each rule that a reader can break is broken once, and found."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.fuzz import campaign, replay
from tests.fuzz.targets import broken

# What is said of each; None where nothing may be.
_SAID = {
    "nothing": None,
    "refuse well": None,
    "refuse at length": "a message of 381 characters",
    "refuse in two lines": "a message of 3 characters",
    "refuse with control characters": "a message of 5 characters",
    "refuse without a word": "a message of 0 characters",
    "print": "printed 'a word",
    "raise": "KeyError in the harness: 'key'",
    "warn": "RuntimeWarning in the harness: overflow",
    "write beside": "beside' for writing",
    "write and say nothing": "os.mkdir of ",
    "follow a link": "outside', outside of its input",
    "follow a link to its end": "outside', outside of its input",
    "unpickle": "pickle.find_class",
    "run": "subprocess.Popen 'true'",
    "allocate": "MemoryError",
    "hang": "in fuzz_one",
    "hang once": None,
    "abort": "ended the process (-6)",
}
_FATAL = ("hang", "hang once", "abort")


def _inputs(folder: Path, *words: str) -> list[Path]:
    folder.mkdir()
    for word in words:
        (folder / word).write_text(word)
    return [folder / word for word in words]


def test_every_rule_has_its_fault() -> None:
    assert _SAID.keys() == broken.FAULTS.keys()


def test_faults_that_raise_are_told_apart_from_refusals(tmp_path: Path) -> None:
    files = _inputs(tmp_path / "in", *(word for word in _SAID if word not in _FATAL))
    ran, harmful = replay.in_child("broken", tmp_path / "found", files=files)
    assert ran == len(files)
    by_word = {Path(line.partition(": ")[0]).name: line for line in harmful}
    for word, said in _SAID.items():
        print(f"{word}: {by_word.get(word, 'no finding')}")
        if word not in _FATAL:
            assert (said in by_word[word]) if said else word not in by_word


@pytest.mark.parametrize("word", ["hang", "abort"])
def test_a_fault_that_ends_the_process_is_laid_to_its_input(word: str, tmp_path: Path) -> None:
    _, (line,) = replay.in_child(
        "broken", tmp_path / "found", "--seconds", "1", files=_inputs(tmp_path / "in", "nothing", word)
    )
    print(line)
    assert line.startswith(str(tmp_path / "in" / word))
    assert _SAID[word] in line
    assert (tmp_path / "found" / "at").read_text() == word


def test_an_input_that_is_late_once_is_run_again_alone(tmp_path: Path) -> None:
    """On a busy machine anything may be late: what is not so twice does no harm, and the inputs behind it are run."""
    files = _inputs(tmp_path / "in", "nothing", "hang once", "raise")
    ran, harmful = replay.in_child("broken", tmp_path / "found", "--seconds", "1", files=files)
    print(harmful)
    assert ran == len(files)
    assert [Path(line.partition(": ")[0]).name for line in harmful] == ["raise"]


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is for Linux on x86-64")
@pytest.mark.parametrize("word", ["raise", "abort"])
def test_the_fuzzer_keeps_the_input_that_did_harm(word: str, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    _inputs(tmp_path / "corpus" / "seeds", word)
    found = campaign.fuzz("broken", 0.1, tmp_path, "-runs=2")
    assert word in [path.read_text() for path in found], (tmp_path / "log.txt").read_text()[-3000:]
