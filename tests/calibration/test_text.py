"""What a model is calibrated on: read, refused, or written by the model itself."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest

from lfm2_export.calibration import text as texts
from lfm2_export.calibration.text import DEFAULT_TEXT, LEAST_TOKENS, TOKENS, read_text
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.errors import CalibrationError, ResourceError
from lfm2_export.parity.sample import HELD_OUT
from lfm2_export.source import ASSETS
from lfm2_export.text import Tokenizer
from tests.checkpoints import tiny_config, with_a_token_too_many, write_random_checkpoint


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("tiny-moe")


def test_the_text_that_comes_with_this_fills_its_rows(checkpoint) -> None:
    text = read_text(checkpoint, "default")
    assert text.rows_BT.shape == (TOKENS // 512, 512)
    assert np.all(text.rows_BT[:, 0] == checkpoint.config.bos_token_id)
    assert text.sha256 == hashlib.sha256(DEFAULT_TEXT.read_bytes()).hexdigest()
    assert text.describe() == {"source": "default", "sha256": text.sha256, "tokens": TOKENS}
    expected = Tokenizer.from_dir(checkpoint.path).encode(DEFAULT_TEXT.read_text(), add_special_tokens=False)
    assert text.rows_BT[:, 1:].reshape(-1).tolist() == expected[: TOKENS // 512 * 511]


def test_no_paragraph_of_it_is_in_the_text_that_parity_measures_on() -> None:
    held_out = " ".join(HELD_OUT.read_text().split())
    paragraphs = [" ".join(part.split()) for part in DEFAULT_TEXT.read_text().split("\n\n")]
    long = [part for part in paragraphs if len(part) > 40]
    print(f"{len(long)} paragraphs, {DEFAULT_TEXT.stat().st_size:,} bytes")
    assert len(long) > 300
    assert [part for part in long if part in held_out] == []


def test_a_file_is_taken_as_far_as_it_goes(checkpoint, tmp_path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(DEFAULT_TEXT.read_text()[:20_000])
    text = read_text(checkpoint, str(path))
    assert text.source == "mine.txt"
    assert LEAST_TOKENS < text.tokens < 20_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty.txt: is empty; --calibrate needs 2,048 tokens of text"),
        (b" \n", "empty.txt: is empty; --calibrate needs 2,048 tokens of text"),
        (b"A few words.", "needs 2,048 and takes up to 20,480; give a longer text, or --calibrate default"),
        (b"caf\xe9 " * 9000, "empty.txt: is not UTF-8 text (invalid continuation byte at byte 3); convert it"),
    ],
)
def test_what_is_no_text_or_too_short_is_refused(checkpoint, tmp_path, content, message) -> None:
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(CalibrationError) as error:
        read_text(checkpoint, str(path))
    assert message in str(error.value)


def test_a_file_that_is_not_there_or_too_large_is_refused(checkpoint, tmp_path, monkeypatch) -> None:
    with pytest.raises(CalibrationError, match=r"nothing\.txt: no such file; give --calibrate one that is there"):
        read_text(checkpoint, str(tmp_path / "nothing.txt"))
    monkeypatch.setattr(texts, "TEXT_LIMIT", 10)
    with pytest.raises(CalibrationError, match="more than the 10 bytes of text that are read; cut a piece"):
        read_text(checkpoint, "default")


def test_a_checkpoint_without_a_tokenizer_can_only_write_its_own(tmp_path) -> None:
    folder = write_random_checkpoint(tmp_path / "checkpoint", tiny_config("lfm2"), seed=0)
    with pytest.raises(CalibrationError, match=r"has no tokenizer\.json to read a text with; pass --calibrate self"):
        read_text(open_checkpoint(folder), "default")


def test_a_tokenizer_of_another_model_is_refused(tmp_path) -> None:
    opened = open_checkpoint(with_a_token_too_many(tmp_path / "checkpoint"))
    with pytest.raises(CalibrationError, match=r"its tokenizer gives token 5000, config\.json knows 2660; bring back"):
        read_text(opened, "default")


def test_a_context_without_room_for_a_text_is_refused(tmp_path) -> None:
    folder = shutil.copytree(ASSETS / "tiny-dense", tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1}))
    with pytest.raises(CalibrationError, match="a context of 1 tokens, 1 of which begin every text, leaves none"):
        read_text(open_checkpoint(folder), "default")


def test_what_the_model_writes_is_the_same_every_time_and_never_ends(tmp_path, one_thread) -> None:
    pytest.importorskip("torch")
    opened = open_checkpoint(write_random_checkpoint(tmp_path / "checkpoint", tiny_config("lfm2"), seed=0))
    one, other = (texts.sample(opened, tokens=128) for _ in range(2))
    assert one.rows_BT.shape == (1, 128)
    assert np.array_equal(one.rows_BT, other.rows_BT)
    assert one.sha256 == other.sha256
    assert (one.source, one.rows_BT[0, 0]) == ("self", 1)
    assert not {0, 2} & set(one.rows_BT.reshape(-1).tolist()), "neither padding nor the end of a text"
    assert len(set(one.rows_BT.reshape(-1).tolist())) > 30


def test_a_model_that_does_not_fit_the_memory_is_not_asked_to_write(checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(texts, "_SAMPLING_BASE", 10**15)
    with pytest.raises(ResourceError, match="pass --calibrate default, which needs one layer at a time"):
        texts.check_sampling(checkpoint)
