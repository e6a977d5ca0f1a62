"""What comes with a checkpoint's weights: damaged files are refused before any weight is read."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest

import lfm2_export
from lfm2_export.artifact import Artifact
from lfm2_export.errors import CheckpointError
from lfm2_export.text import Tokenizer
from tests.checkpoints import tiny_config, write_random_checkpoint

BUNDLED = Path(lfm2_export.__file__).parent / "assets" / "tiny-moe"
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A random checkpoint with a tokenizer; its last weight is NaN, which reading it would find."""
    folder = write_random_checkpoint(tmp_path / "checkpoint", tiny_config("lfm2"), seed=3)
    for name in FILES:
        (folder / name).write_bytes((BUNDLED / name).read_bytes())
    path = folder / "model.safetensors"
    path.write_bytes(
        path.read_bytes()[:-2] + (np.array([np.nan], np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    )
    return folder


def refusal(checkpoint: Path, output: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        lfm2_export.export(checkpoint, scheme="fp32", output=output)
    assert not output.exists()
    message = str(caught.value)
    assert "\n" not in message
    print(message)
    return message


def test_the_weights_of_these_tests_are_refused_where_they_are_read(checkpoint: Path, tmp_path: Path) -> None:
    """The control: with good companions the export goes as far as the weights."""
    assert "1 of " in refusal(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", b"{", "is not JSON (Expecting property name"),
        ("generation_config.json", b"[]", "holds [], not a JSON object; bring back the original"),
        ("generation_config.json", b'{"temperature": -1}', "temperature=-1 is not usable; expected 0 (greedy) or a"),
        (
            "generation_config.json",
            b'{"eos_token_id": "x"}',
            "eos_token_id='x' is not usable; expected token ids; cor",
        ),
        (
            "generation_config.json",
            b'{"eos_token_id": [131]}',
            "eos_token_id=131 is not in the vocabulary of 131; cor",
        ),
        ("tokenizer_config.json", b"{", "is not JSON (Expecting property name"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": 3}',
            "its tokens are damaged (added_tokens_decoder=3 is no",
        ),
        ("special_tokens_map.json", b"3", "holds 3, not a JSON object; bring back the original"),
        ("chat_template.jinja", b"{{ \xff }}", "byte 3 is not UTF-8; bring back the original"),
        ("tokenizer.json", b"{}", "not a readable tokenizer"),
    ],
)
def test_a_damaged_companion_is_refused_before_any_weight_is_read(
    checkpoint: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (checkpoint / name).write_bytes(content)
    found = refusal(checkpoint, tmp_path / "out")
    assert found.startswith(f"{checkpoint / name}: {message}")
    assert found.endswith(("; download it again", "; correct the file", "; bring back the original"))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_damaged_companion_of_no_tokenizer_is_refused_too(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / name).write_bytes(b"\xff")
    assert str(checkpoint / name) in refusal(checkpoint, tmp_path / "out")


def test_what_no_json_can_hold_is_not_carried_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither from the files nor from their folder's name, which here is no UTF-8."""
    folder = write_random_checkpoint(tmp_path / os.fsdecode(b"caf\xe9"), tiny_config("lfm2"), seed=3)
    odd = '"a": NaN, "b": [{"c": -Infinity}, 1.5], "d": "\\ud800!", "e": 1e999, "f": {"g": null}'
    for name, known in (("config.json", json.dumps(tiny_config("lfm2"))), ("generation_config.json", '{"top_k": 5}')):
        (folder / name).write_text(f"{known.removesuffix('}')}, {odd}}}")
    with caplog.at_level(logging.WARNING, "lfm2_export"):
        artifact = lfm2_export.export(folder, scheme="fp32", output=tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        found = json.loads((artifact.path / name).read_bytes().decode("utf-8"), parse_constant=pytest.fail)
        expected = {"a": None, "b": [{"c": None}, 1.5], "d": "\ufffd!", "e": None, "f": {"g": None}}
        assert {key: found[key] for key in expected} == expected
        warning = f"/{name}: a, b, d, e has values that JSON cannot hold"
        assert sum(warning in record.getMessage() for record in caplog.records) == 1
    assert found["top_k"] == 5
    assert artifact.manifest.checkpoint.name == "caf\\udce9"
    assert Artifact.open(artifact.path).manifest == artifact.manifest


def test_companions_are_carried_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_random_checkpoint(tmp_path / "checkpoint", tiny_config("lfm2"), seed=3)
    with caplog.at_level(logging.WARNING, "lfm2_export"):
        artifact = lfm2_export.export(folder, scheme="fp32", output=tmp_path / "without")
    (record,) = (record for record in caplog.records if record.name.startswith("lfm2_export"))
    assert record.getMessage() == (
        f"{folder}: has no tokenizer.json, so the artifact takes token ids only; add one "
        "(for a GGUF: --config-from) to run and chat"
    )
    assert json.loads((artifact.path / "generation_config.json").read_text())["eos_token_id"] == [2]
    caplog.clear()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((BUNDLED / name).read_bytes())
    with caplog.at_level(logging.WARNING, "lfm2_export"):
        artifact = lfm2_export.export(folder, scheme="fp32", output=tmp_path / "with")
    assert not [record for record in caplog.records if record.name.startswith("lfm2_export")]
    assert Tokenizer.from_dir(artifact.path).has_chat_template
