"""A conversation's state on disk: it goes on without a prefill, and only where it was made."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from lfm2_export import Chat, GenerationConfig, load_runner
from lfm2_export.backends.base import Runner
from lfm2_export.errors import ContextLimitError, GenerationError
from lfm2_export.speculation import SpeculativeRunner
from lfm2_export.speculation.drafters import Draft
from lfm2_export.states import METADATA, read_state
from tests.hash_runner import TOKENIZER
from tests.shows import shows

SHORT = GenerationConfig(max_new_tokens=6)


def opened(folder: Path) -> Runner:
    return load_runner(folder, threads=1, kernels="stock")


@pytest.fixture(scope="module")
def folder(artifact: Callable[[str], Path]) -> Path:
    return artifact("tiny-dense")


@pytest.fixture(scope="module")
def runner(folder: Path) -> Runner:
    return opened(folder)


def talked(runner: Runner, *texts: str) -> Chat:
    chat = Chat(runner, TOKENIZER, SHORT, system="Be brief. " * 8)
    for text in texts:
        list(chat.send(text))
    return chat


@pytest.fixture
def saved(runner: Runner, tmp_path: Path) -> Path:
    path = tmp_path / "one.state"
    talked(runner, "One", "Two").save_state(path)
    return path


def go_on(folder: Path, path: Path) -> tuple[Chat, str]:
    chat = Chat(opened(folder), TOKENIZER, SHORT)
    chat.load_state(path)
    return chat, "".join(chat.send("Three"))


@shows("ours", "state-files", family="lfm2", scheme="q4")
def test_a_conversation_goes_on_from_a_file_as_if_it_had_not_been_left(
    folder: Path, runner: Runner, tmp_path: Path
) -> None:
    whole = talked(runner, "One", "Two")
    started = time.perf_counter()
    whole.save_state(tmp_path / "a")
    saved_s = time.perf_counter() - started
    expected = "".join(whole.send("Three"))
    chat, reply = go_on(folder, tmp_path / "a")
    assert (chat.messages, reply) == (whole.messages, expected)
    assert chat.prefilled_tokens == whole.prefilled_tokens < 20
    new = Chat(opened(folder), TOKENIZER, SHORT)
    started = time.perf_counter()
    new.load_state(tmp_path / "a")
    print(f"saved in {saved_s * 1e3:.1f} ms, opened in {(time.perf_counter() - started) * 1e3:.1f} ms")
    assert new.system == "Be brief. " * 8


@shows("pte", "state-files", family="lfm2", scheme="8da4w")
def test_a_pte_program_has_states_too(pte_artifact: Callable[[str, str], Path], tmp_path: Path) -> None:
    folder = pte_artifact("tiny-dense", "8da4w")
    whole = talked(opened(folder), "One")
    whole.save_state(tmp_path / "a")
    expected = "".join(whole.send("Three"))
    chat, reply = go_on(folder, tmp_path / "a")
    assert (reply, chat.prefilled_tokens) == (expected, whole.prefilled_tokens)


def test_a_system_message_alone_has_a_state(folder: Path, runner: Runner, tmp_path: Path) -> None:
    talked(runner).save_state(tmp_path / "a")
    chat, reply = go_on(folder, tmp_path / "a")
    whole = talked(opened(folder))
    assert reply == "".join(whole.send("Three"))
    print(f"{chat.prefilled_tokens} tokens prefilled instead of {whole.prefilled_tokens}")
    assert chat.prefilled_tokens < whole.prefilled_tokens / 2
    with pytest.raises(GenerationError, match="nothing was said yet"):
        Chat(runner, TOKENIZER, SHORT).save_state(tmp_path / "b")


def test_a_state_is_its_owners_alone_and_replaces_only_a_state(runner: Runner, saved: Path) -> None:
    assert stat.S_IMODE(os.stat(saved).st_mode) == 0o600
    talked(runner, "One").save_state(saved)
    (notes := saved.with_name("notes.txt")).write_text("mine", encoding="utf-8")
    for path, fault in (
        (notes, "is there already and no saved state"),
        (saved.parent, "is a folder"),
        (saved.parent / "none" / "a", "there is no folder"),
    ):
        with pytest.raises(GenerationError, match=fault):
            talked(runner, "One").save_state(path)
    assert notes.read_text(encoding="utf-8") == "mine"
    assert sorted(os.listdir(saved.parent)) == ["notes.txt", "one.state"]


class Recorder:
    """A drafter that proposes nothing and keeps what it was told."""

    name, costs = "recorder", False

    def __init__(self) -> None:
        self.told: list[list[int]] = []

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        self.told.append(list(tokens))
        return Draft()


def test_speculation_knows_the_tokens_of_a_state(folder: Path, saved: Path) -> None:
    drafter = Recorder()
    speculative = SpeculativeRunner(opened(folder), drafter, inexact=True)
    chat = Chat(speculative, TOKENIZER, SHORT)
    chat.load_state(saved)
    list(chat.send("One"))
    state = read_state(saved, speculative, TOKENIZER)
    assert drafter.told[0][: len(state.tokens)] == state.tokens
    drafter.told.clear()
    speculative.restore(state.snapshot)
    speculative.decode([1])
    assert drafter.told == []


def changed(path: Path, change: Callable[[dict], object], cut: int = 0) -> Path:
    """A copy with another header, and ``cut`` bytes less."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    copy = path.with_name("changed.state")
    copy.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length : len(data) - cut])
    return copy


def told(**values: object) -> Callable[[dict], None]:
    def change(header: dict) -> None:
        header["__metadata__"][METADATA] = json.dumps(json.loads(header["__metadata__"][METADATA]) | values)

    return change


@pytest.mark.parametrize(
    ("change", "cut", "fault"),
    [
        (told(), 1, "is truncated"),
        (told(version=2), 0, "it is of version 2, and 1 is read"),
        (told(program="onnx/q4@0"), 0, "is a state of onnx/q4@0, but this program is onnx/q4@"),
        (told(vocabulary="0"), 0, "was made with another tokenizer.json"),
        (told(messages=[]), 0, "its messages are none"),
        (told(messages=[{"role": "user"}]), 0, "its messages are none"),
        (told(text=None), 0, "text is None, no text"),
        (told(content="0"), 0, "its values are not those that were saved"),
        (lambda header: header.pop("__metadata__"), 0, "is no saved state"),
        (lambda header: header["tokens"].update(dtype="F32"), 0, "it has no list of tokens"),
        (lambda header: header.update(odd=header.pop("past_conv.0")), 0, "odd is unknown"),
        (lambda header: header["past_conv.0"].update(shape=header["past_conv.0"]["shape"][::-1]), 0, "is F32 "),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    runner: Runner, saved: Path, change: Callable[[dict], object], cut: int, fault: str
) -> None:
    before = runner.lengths.tolist()
    with pytest.raises(GenerationError) as caught:
        Chat(runner, TOKENIZER, SHORT).load_state(changed(saved, change, cut))
    print(caught.value)
    assert fault in str(caught.value)
    assert runner.lengths.tolist() == before


def test_tokens_outside_of_the_vocabulary_and_too_many_of_them_are_refused(
    runner: Runner, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(saved.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start : start + 4] = np.int32(TOKENIZER.vocab_size).tobytes()
    (odd := saved.with_name("odd")).write_bytes(data)
    with pytest.raises(GenerationError, match=f"not among the {TOKENIZER.vocab_size}"):
        read_state(odd, runner, TOKENIZER)
    monkeypatch.setattr(runner, "_context_length", 8)
    with pytest.raises(ContextLimitError):
        read_state(saved, runner, TOKENIZER)


def test_one_changed_bit_is_noticed(runner: Runner, saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    data[-1000] ^= 1  # in a tensor of floats: another number, and a good one
    (odd := saved.with_name("flipped")).write_bytes(data)
    with pytest.raises(GenerationError, match="its values are not those that were saved"):
        read_state(odd, runner, TOKENIZER)


def test_a_missing_file_is_named(runner: Runner, tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="no such file; make it with --save-state"):
        read_state(tmp_path / "none", runner, TOKENIZER)
