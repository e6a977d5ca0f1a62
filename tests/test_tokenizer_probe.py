"""Tokenizers of strangers: tried in another process, refused in one line, and tried once."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import psutil
import pytest

import lfm2_export
from lfm2_export import tokenizer_files, tokenizer_probe
from lfm2_export.cli import main
from lfm2_export.errors import ArtifactError, CheckpointError, GenerationError, ResourceError
from lfm2_export.isolated.process import Limits
from lfm2_export.messages import MESSAGE_LIMIT
from lfm2_export.text import Tokenizer
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.crafted import with_file
from tests.crafted_tokenizers import BROKEN, PATTERNS, WORKING, bpe, split, tokenizer

BUNDLED = Path(lfm2_export.__file__).parent / "assets" / "tiny-moe"

# Low, so that the tests end soon; what is tested is that there is a limit.
LOW = Limits(seconds=1.0, memory=256 << 20, reply=1 << 16)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def folder_with(folder: Path, content: str | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


@pytest.mark.parametrize("name", BROKEN)
def test_a_tokenizer_that_breaks_its_library_is_one_line(tmp_path, capfd, name):
    folder = folder_with(tmp_path / "tokenizer", BROKEN[name])
    own, started = psutil.Process().memory_info().rss, time.monotonic()
    with pytest.raises(ArtifactError) as info:
        Tokenizer.from_dir(folder, tokenizer_limits=LOW)
    message = str(info.value)
    assert time.monotonic() - started < 10
    assert psutil.Process().memory_info().rss - own < 256 << 20
    assert message.startswith(f"{folder / 'tokenizer.json'}: not a readable tokenizer (")
    assert message.endswith("; restore it or export again")
    assert message.isprintable()
    assert len(message) <= MESSAGE_LIMIT
    assert capfd.readouterr() == ("", "")
    print(message)


@pytest.mark.parametrize("name", WORKING)
def test_a_tokenizer_that_works_for_some_texts_is_opened(tmp_path, name):
    ours = Tokenizer.from_dir(folder_with(tmp_path / "tokenizer", WORKING[name]), tokenizer_limits=LOW)
    refused = 0
    for text in ("", "ab", "aé😀", "a" * 5000):
        try:
            ours.decode(ours.encode(text))
        except GenerationError as error:
            print(error)
            refused += "text: this tokenizer cannot encode it (" not in str(error) or "unk" not in str(error).lower()
    assert not refused, "other than for a character without a token"


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_of_published_models_pass(tmp_path, name):
    started = time.monotonic()
    Tokenizer.from_dir(folder_with(tmp_path / "tokenizer", tokenizer(bpe(), pre_tokenizer=split(PATTERNS[name]))))
    print(f"{time.monotonic() - started:.2f} s")


def test_the_limits_that_hold_where_none_are_given(tmp_path):
    """Slower than any tokenizer that is published: tens of thousands of alternatives for each character."""
    pattern = "|".join(f".x{index}" for index in range(100_000))
    folder = folder_with(tmp_path / "tokenizer", tokenizer(bpe(), pre_tokenizer=split(pattern)))
    started = time.monotonic()
    with pytest.raises(ArtifactError, match=r"\(opening it takes more than 4 s\)"):
        Tokenizer.from_dir(folder)
    print(f"{time.monotonic() - started:.2f} s")


def test_a_verdict_is_remembered(tmp_path, monkeypatch):
    folder = folder_with(tmp_path / "tokenizer", WORKING["bpe"])
    Tokenizer.from_dir(folder)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert Tokenizer.from_dir(folder).encode("ab") == [2], "no process was needed"
    folder_with(folder, WORKING["unigram"])
    with pytest.raises(ResourceError, match="did not start"):
        Tokenizer.from_dir(folder)
    folder_with(folder, WORKING["bpe"])
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(ResourceError, match="did not start"):
        Tokenizer.from_dir(folder)


def test_a_bad_verdict_is_not(tmp_path):
    folder = folder_with(tmp_path / "tokenizer", WORKING["bpe"])
    none = Limits(seconds=0.001, memory=1 << 30, reply=1 << 16)
    with pytest.raises(ArtifactError, match=r"opening it takes more than 0\.001 s"):
        Tokenizer.from_dir(folder, tokenizer_limits=none)
    Tokenizer.from_dir(folder)


@pytest.mark.parametrize("cache", ["a file", "none"])
def test_without_a_cache_it_is_tried_each_time(tmp_path, monkeypatch, cache):
    folder = folder_with(tmp_path / "tokenizer", WORKING["bpe"])
    if cache == "none":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        (tmp_path / "cache").write_text("in the way")
    for _ in range(2):
        assert Tokenizer.from_dir(folder).encode("ab") == [2]


def test_a_record_that_is_damaged_is_made_again(tmp_path):
    folder = folder_with(tmp_path / "tokenizer", WORKING["bpe"])
    Tokenizer.from_dir(folder)
    (record,) = (tmp_path / "cache" / "lfm2-export" / "tokenizers").iterdir()
    good = record.read_bytes()
    record.write_bytes(b"")
    Tokenizer.from_dir(folder)
    assert record.read_bytes() == good


def test_a_known_tokenizer_costs_its_hash(tmp_path):
    files = tokenizer_files.read(BUNDLED)
    tried = (files.data, files.additions, tokenizer_probe.DEFAULT_LIMITS)
    started = time.perf_counter()
    assert tokenizer_probe.fault(*tried) is None
    first = time.perf_counter() - started
    known = min(_seconds(lambda: tokenizer_probe.fault(*tried)) for _ in range(9))
    print(f"{1e3 * first:.0f} ms once, then {1e3 * known:.2f} ms")
    assert known < 0.01


def _seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@pytest.mark.parametrize(
    "name", ["a prefix that ends in a character", "a regex without end", "a decoder that strips twice"]
)
def test_export_refuses_it_before_any_weight_is_read(tmp_path, name):
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", tiny_config("lfm2"), seed=3)
    folder_with(checkpoint, BROKEN[name])
    with pytest.raises(
        CheckpointError, match=r"tokenizer.json: not a readable tokenizer \(.*; download it again"
    ) as info:
        lfm2_export.export(checkpoint, scheme="fp32", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(str(info.value)) <= MESSAGE_LIMIT


@pytest.mark.parametrize(
    "name", ["a prefix that ends in a character", "a charsmap that is larger than it is", "nothing"]
)
def test_run_says_it_and_ends_with_2(artifact, tmp_path, capfd, name):
    content = BROKEN[name].encode() if isinstance(BROKEN[name], str) else BROKEN[name]
    folder = with_file(artifact("tiny-moe"), tmp_path / "artifact", "tokenizer.json", content)
    started = time.monotonic()
    assert main(["run", str(folder), "--scheme", "q4", "--prompt", "Hi", "--max-new-tokens", "1"]) == 2
    assert time.monotonic() - started < 10
    (line,) = capfd.readouterr().err.splitlines()
    print(line)
    assert line.startswith(f"lfm2-export: {folder / 'tokenizer.json'}: not a readable tokenizer (")
    assert len(line) < 400


def test_the_bundled_tokenizers_pass(tmp_path):
    for name in ("tiny-moe", "tiny-dense"):
        shutil.copytree(BUNDLED.parent / name, tmp_path / name)
        assert Tokenizer.from_dir(tmp_path / name).vocab_size > 100
