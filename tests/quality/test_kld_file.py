"""llama.cpp's base files: written as its perplexity tool reads them, read as it writes them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from lfm2_export.errors import Lfm2ExportError
from lfm2_export.parity.divergence import log_softmax
from lfm2_export.quality.kld_file import read_base, write_base

VOCABULARY, CONTEXT = 11, 8


def written(path: Path, *, spread: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (3, CONTEXT))
    logits = (rng.standard_normal((3, CONTEXT - 1, VOCABULARY)) * spread).astype(np.float32)
    write_base(path, tokens, iter(logits))
    return tokens, logits


def test_what_is_written_is_read_to_16_bits(tmp_path: Path) -> None:
    tokens, logits = written(tmp_path / "a.kld")
    base = read_base(tmp_path / "a.kld", VOCABULARY)
    assert np.array_equal(base.tokens, tokens)
    for found, expected in zip(base.log_probabilities(), logits, strict=True):
        error = np.abs(found - log_softmax(expected[CONTEXT // 2 :])).max()
        assert error < 16 / 65535


def test_the_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    """One chunk of four tokens: of its positions only number 2 counts. By hand: probabilities 1/2, 1/4, 1/4."""
    values = np.log(np.array([[0.5, 0.25, 0.25]] * 3, np.float32))
    write_base(tmp_path / "a.kld", np.array([[0, 1, 2, 0]]), iter(values[None]))
    step = np.log(2) / 65535
    expected = b"_logits_" + struct.pack("<3i4i", 4, 3, 1, 0, 1, 2, 0)
    expected += struct.pack("<2f4H", step, np.log(0.25), 65535, 0, 0, 0)
    data = (tmp_path / "a.kld").read_bytes()
    assert data[:36] == expected[:36]
    assert np.allclose(np.frombuffer(data[36:44], "<f4"), np.frombuffer(expected[36:44], "<f4"), rtol=1e-6)
    assert data[44:] == expected[44:]


def test_what_is_far_below_the_likeliest_is_cut_off_at_16_nats(tmp_path: Path) -> None:
    _, logits = written(tmp_path / "a.kld", spread=40.0)
    found = next(read_base(tmp_path / "a.kld", VOCABULARY).log_probabilities())
    assert np.allclose(found.max(axis=1) - found.min(axis=1), 16, atol=1e-3)
    assert np.array_equal(found.argmax(axis=1), logits[0, CONTEXT // 2 :].argmax(axis=1))


def header(context: int, vocabulary: int, chunks: int) -> bytes:
    return b"_logits_" + struct.pack("<3i", context, vocabulary, chunks)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is truncated"),
        (b"_logit5_" + bytes(99), "is no file of llama-perplexity"),
        (header(8, 12, 1) + bytes(99), "is of a vocabulary of 12 tokens, and the checkpoint has 11"),
        (header(2**30, 11, 2**30) + bytes(99), "states 1073741824 chunks"),
        (header(8, 11, -1) + bytes(99), "states -1 chunks"),
        (header(0, 11, 1) + bytes(99), "states 1 chunks of 0 tokens"),
        (header(8, 11, 1) + bytes(40), "is truncated"),
        (header(4, 11, 1) + struct.pack("<4i", 0, 1, 2, 11) + bytes(99), "not in the vocabulary"),
    ],
    ids=["empty", "other magic", "another vocabulary", "huge", "negative", "no context", "short", "a token beyond"],
)
def test_a_file_that_lies_is_refused(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.kld").write_bytes(data)
    with pytest.raises(Lfm2ExportError, match=words):
        read_base(tmp_path / "a.kld", VOCABULARY)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Lfm2ExportError, match="cannot be written"):
        written(tmp_path / "missing" / "a.kld")
    assert list(tmp_path.iterdir()) == []
