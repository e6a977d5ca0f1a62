"""``--speculate`` on exported programs: the same text, what is said of it, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lfm2_export import cli
from lfm2_export.backends.onnx import variants

pytestmark = pytest.mark.skipif(variants.own_library() is None, reason="no compiler for our operators")

PROMPT = ("--prompt", "Say it twice: a.txt, b.txt, c.txt, d.txt. a.txt, b.txt,", "--raw", "--max-new-tokens", "60")
Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    def run(command: str, folder: Path, *arguments: str) -> tuple[int, str, str]:
        code = cli.main([command, str(folder), *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def dense(artifact: Callable[[str], Path]) -> Path:
    return artifact("tiny-dense")


@pytest.mark.parametrize("sampled", [("--temperature", "0"), ("--temperature", "0.8", "--seed", "4")])
def test_the_text_is_that_of_plain_decoding(say: Say, dense: Path, artifact, sampled):
    plain = say("run", dense, *PROMPT, *sampled)
    for choice in ("lookup", str(artifact("tiny-moe"))):
        code, out, err = say("run", dense, *PROMPT, *sampled, "--speculate", choice, "--draft-tokens", "4")
        assert (code, out) == (0, plain[1])
        assert "speculation, " in err
    assert "speculation" not in plain[2]


def test_json_says_what_came_of_it(say: Say, dense: Path):
    plain = json.loads(say("run", dense, *PROMPT, "--temperature", "0", "--json")[1])
    found = json.loads(say("run", dense, *PROMPT, "--temperature", "0", "--json", "--speculate", "lookup")[1])
    assert found["tokens"] == plain["tokens"]
    assert "speculation" not in plain
    report = found["speculation"]
    print(report)
    assert report["tokens"] == len(plain["tokens"]) - 1
    assert 0 <= report["acceptance"] <= 1
    assert report["plain_steps"] + report["verified_steps"] >= 2


def test_a_scheme_that_may_differ_has_to_be_asked_for(say: Say, dense: Path):
    code, out, err = say("run", dense, *PROMPT, "--scheme", "fp32", "--speculate", "lookup")
    assert (code, out) == (2, "")
    assert "may change tokens here" in err.splitlines()[-1]
    code, out, _ = say("run", dense, *PROMPT, "--scheme", "fp32", "--speculate", "lookup", "--speculate-inexact")
    assert code == 0
    assert out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--draft-tokens", "3"), "--draft-tokens: is for --speculate"),
        (("--speculate-inexact",), "--speculate-inexact: is for --speculate"),
        (("--speculate", "lookup", "--draft-tokens", "0"), "draft tokens 0: give a number from 1 to 64"),
        (("--speculate", "nowhere"), "nowhere: no such directory"),
    ],
)
def test_what_cannot_be_is_one_line(say: Say, dense: Path, arguments, message):
    for command in ("run", "chat"):
        code, out, err = say(command, dense, *(PROMPT if command == "run" else ()), *arguments)
        assert (code, out) == (2, "")
        assert message in err.splitlines()[-1]


def test_a_drafter_with_another_vocabulary_is_refused(say: Say, dense: Path, artifact, tmp_path: Path):
    other = shutil.copytree(artifact("tiny-moe"), tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [token for token, place in vocabulary.items() if place in (900, 901)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    code, out, err = say("run", dense, *PROMPT, "--speculate", str(other))
    assert (code, out) == (2, "")
    assert "has another vocabulary than the model that it is to draft for" in err.splitlines()[-1]


def test_a_drafter_of_the_model_proposes_and_changes_nothing(say: Say, dense: Path, taught: Path):
    prompt = ("--prompt", "Once upon a time there", "--raw", "--max-new-tokens", "40")
    for sampled in (("--temperature", "0"), ("--temperature", "0.8", "--seed", "4")):
        plain = say("run", dense, *prompt, *sampled)
        code, out, err = say("run", dense, *prompt, *sampled, "--speculate", str(taught))
        assert (code, out) == (0, plain[1])
        assert "speculation, drafter onnx q4: " in err


def test_a_drafter_is_for_its_own_model(say: Say, dense: Path, taught: Path, artifact: Callable[[str], Path]):
    code, out, err = say("run", artifact("tiny-moe"), *PROMPT, "--speculate", str(taught))
    assert (code, out) == (2, "")
    assert "drafts for 'tiny-dense', not for tiny-moe as it is here" in err.splitlines()[-1]
    code, out, err = say("run", taught, *PROMPT)
    assert (code, out) == (2, "")
    assert "is a drafter, which generates no text by itself" in err.splitlines()[-1]
    code, out, err = say("inspect", taught)
    assert (code, err) == (0, "")
    assert "lfm2_dspark" in out
