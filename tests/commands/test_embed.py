"""``lfm2-export embed``, and what the other commands say of an encoder."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import lfm2_export
from lfm2_export.cli import main
from tests.conftest import Exported
from tests.encoder_checkpoints import COLBERT, EMBEDDING, MASKED_LM, WIDTH, write_encoder

Encoders = Callable[..., Exported]


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a refusal."""
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    return error


def lines_of(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_a_vector_a_line(encoder: Encoders, capsys: pytest.CaptureFixture[str]) -> None:
    folder = encoder(EMBEDDING).artifact
    assert main(["embed", str(folder), "--text", "hello", "--text", "world", "--query"]) == 0
    rows = [[float(number) for number in line.split()] for line in capsys.readouterr().out.splitlines()]
    expected = lfm2_export.load_encoder(folder).encode(["hello", "world"], query=True)
    assert np.abs(np.array(rows) - expected).max() < 1e-6


def test_json(encoder: Encoders, capsys: pytest.CaptureFixture[str]) -> None:
    folder = encoder(COLBERT).artifact
    assert main(["embed", str(folder), "--text", "hello", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["query"] is False
    (one,) = found["embeddings"]
    assert one["text"] == "hello"
    assert np.abs(np.array(one["embedding"]) - lfm2_export.load_encoder(folder).encode("hello")[0]).max() < 1e-6


def test_lines_of_standard_input(
    encoder: Encoders, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ColBERT's vectors: a token a line, and an empty line behind each text."""
    lines_of("hello, you\nnaïve\r\n\n  \n".encode(), monkeypatch)
    assert main(["embed", str(encoder(COLBERT).artifact)]) == 0
    texts = [block.splitlines() for block in capsys.readouterr().out.strip("\n").split("\n\n")]
    expected = lfm2_export.load_encoder(encoder(COLBERT).artifact).encode(["hello, you", "naïve"])
    assert [len(rows) for rows in texts] == [len(vectors) for vectors in expected]
    assert {len(row.split()) for rows in texts for row in rows} == {WIDTH}


def test_a_line_ends_at_a_line_feed_alone(
    encoder: Encoders, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own ``splitlines`` knows nine ends more, some of which are in texts of the web and of old printers."""
    lines = ["one\u2028two\u2029three", "four\x85five\x0bsix\x0cseven", "\x1ceight\x1d\x1enine", "ten\releven\r"]
    lines_of("\n".join([*lines, "end"]).encode(), monkeypatch)
    assert main(["embed", str(encoder(EMBEDDING).artifact), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["embeddings"]
    assert [one["text"] for one in found] == [*lines[:3], "ten\releven", "end"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\n  \n", "standard input: holds no text"),
        (b"a\xff\n", "text 0: character 1"),
        (b"", "holds no text"),
        (b"a\n\nb\n", "standard input: line 2 is blank, which has no vector; take it out"),
        (b"\r\na\r\n", "standard input: line 1 is blank"),
        (b"a\nb\n \t\nc", "standard input: line 3 is blank"),
    ],
)
def test_standard_input_that_is_no_text(
    encoder: Encoders, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: bytes, expected: str
) -> None:
    lines_of(data, monkeypatch)
    assert expected in said(["embed", str(encoder(EMBEDDING).artifact)], capsys)


def test_what_is_no_retriever(
    encoder: Encoders, artifact: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "is a decoder, which gives no embeddings; use `lfm2-export run`" in said(
        ["embed", str(artifact("tiny-dense")), "--text", "a"], capsys
    )
    assert "has no head for embeddings" in said(["embed", str(encoder(MASKED_LM).artifact), "--text", "a"], capsys)
    assert "lfm2_export.json" in said(["embed", str(tmp_path), "--text", "a"], capsys)
    assert "--batch-size 0: pass a positive integer" in said(
        ["embed", str(encoder(EMBEDDING).artifact), "--text", "a", "--batch-size", "0"], capsys
    )


@pytest.mark.parametrize("command", [["run", "--prompt", "a"], ["chat"], ["bench"]], ids=lambda words: words[0])
def test_what_generates_refuses_an_encoder(
    encoder: Encoders, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    name, *more = command
    error = said([name, str(encoder(EMBEDDING).artifact), *more], capsys)
    assert "is an encoder, which generates no text; use `lfm2-export embed`" in error


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--calibrate", "default"], "--calibrate: "),
        (["--statistics", "FILE"], "--statistics: "),
        (["--target-bits", "7", "--measure", __file__], "--measure: "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_looks_at_the_next_token_refuses_an_encoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    folder = write_encoder(tmp_path / "c", EMBEDDING)
    arguments = ["export", str(folder), "--scheme", "q4", "--output", str(tmp_path / "out"), *options]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    print(error)
    assert expected in error
    assert "is an encoder, which predicts no next token; leave it out" in error
    assert not (tmp_path / "out").exists()


def test_quality_and_max_kl_are_for_decoders(encoder: Encoders, capsys: pytest.CaptureFixture[str]) -> None:
    made = encoder(EMBEDDING)
    error = said(["quality", str(made.artifact), "--checkpoint", str(made.checkpoint)], capsys)
    assert "is an encoder, which predicts no next token" in error
    error = said(["parity", str(made.artifact), str(made.checkpoint), "--max-kl", "1"], capsys)
    assert "--max-kl" in error
    assert "is an encoder, whose vectors are judged by cosines" in error


def test_inspect_tells_what_it_is(encoder: Encoders, capsys: pytest.CaptureFixture[str]) -> None:
    made = encoder(COLBERT)
    assert main(["inspect", str(made.checkpoint)]) == 0
    assert "encoder: a vector of 32 for each token" in capsys.readouterr().out
    assert main(["inspect", str(made.artifact), "--json"]) == 0
    (program,) = json.loads(capsys.readouterr().out)["programs"]
    assert (program["kind"], program["outputs"]) == ("encoder", ["last_hidden_state", "token_embeddings"])


def test_the_model_card_says_how_to_run_it(encoder: Encoders) -> None:
    card = (encoder(EMBEDDING).artifact / "README.md").read_text()
    assert "pipeline_tag: feature-extraction" in card
    assert 'lfm2-export embed . --text "What is C. elegans?" --query' in card
    assert "`last_hidden_state`, `sentence_embedding`" in card
    assert "sentence_transformers.load" in card
    assert "genai" not in card
    card = (encoder(MASKED_LM).artifact / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card
    assert "load_encoder" in card
    assert "embed ." not in card
    assert "max_sim" in (encoder(COLBERT).artifact / "README.md").read_text()
