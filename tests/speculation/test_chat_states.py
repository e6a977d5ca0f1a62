"""A conversation with a drafter is the one without, whatever is asked of it: replies that are cut short, said again or
taken back, states that are saved and come back, and another user of the runner in between. By hypothesis.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import lfm2_export
from lfm2_export.backends.base import Runner
from lfm2_export.backends.onnx import variants
from lfm2_export.backends.onnx.runner import OnnxRunner
from lfm2_export.chat import Chat
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.speculation import Report, SpeculativeRunner, StreamDrafter
from lfm2_export.speculation.controller import Always
from lfm2_export.text import Tokenizer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(variants.own_library() is None, reason="no compiler for our operators"),
]

TEXTS = ("The list of files", "Once upon a time there", "Why?")
SHORT = GenerationConfig(max_new_tokens=12)


class Conversations(RuleBasedStateMachine):
    """``play`` sets these. Every rule does the same to both conversations and compares what they say."""

    plain: Runner
    speculating: SpeculativeRunner
    tokenizer: Tokenizer
    folder: Path
    numbers = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.chats = [Chat(runner, self.tokenizer, SHORT) for runner in (self.plain, self.speculating)]
        self.saved: list[tuple[Path, Path]] = []

    def both(self, say: Callable[[Chat], object]) -> None:
        plain, ours = (say(chat) for chat in self.chats)
        assert ours == plain

    @rule(text=st.sampled_from(TEXTS), pieces=st.sampled_from([2, 5, 100]))
    def send(self, text: str, pieces: int) -> None:
        if self.chats[0].held_tokens < 600:
            self.both(lambda chat: cut_short(chat.send(text), pieces))

    @precondition(lambda self: self.has("assistant"))
    @rule()
    def say_again(self) -> None:
        self.both(lambda chat: list(chat.regenerate()))

    @precondition(lambda self: self.has("user"))
    @rule(text=st.sampled_from(TEXTS))
    def edit(self, text: str) -> None:
        self.both(lambda chat: list(chat.edit(text)))

    @precondition(lambda self: self.has("user"))
    @rule()
    def undo(self) -> None:
        self.both(lambda chat: chat.undo())

    @rule()
    def clear(self) -> None:
        self.both(lambda chat: chat.clear())

    @precondition(lambda self: self.has("user"))
    @rule()
    def save(self) -> None:
        number = next(self.numbers)
        paths = (self.folder / f"{number}.plain", self.folder / f"{number}.ours")
        for chat, path in zip(self.chats, paths, strict=True):
            chat.save_state(path)
        self.saved = [*self.saved[-2:], paths]

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        """Either's file serves either."""
        paths = data.draw(st.sampled_from(self.saved))
        swapped = data.draw(st.booleans())
        for chat, path in zip(self.chats, reversed(paths) if swapped else paths, strict=True):
            chat.load_state(path)

    @rule(new=st.lists(st.integers(3, 200), min_size=1, max_size=5))
    def another_user(self, new: list[int]) -> None:
        """Takes the runner, and leaves it somewhere else."""
        for runner in (self.plain, self.speculating):
            runner.reset()
            runner.prefill([new])
            runner.decode([int(runner.decode([5])[0].argmax())])

    @invariant()
    def they_are_alike(self) -> None:
        plain, ours = self.chats
        assert ours.messages == plain.messages
        assert ours.held_tokens == plain.held_tokens
        assert ours.prefilled_tokens == plain.prefilled_tokens

    def has(self, role: str) -> bool:
        return any(message["role"] == role for message in self.chats[0].messages)


def cut_short(reply, pieces: int) -> list[str]:
    said = list(itertools.islice(reply, pieces))
    reply.close()
    return said


@pytest.fixture
def play(artifact: Callable[[str], Path], taught: Path, tmp_path: Path) -> Callable[..., Report]:
    """Conversations on q4 of tiny-dense, with and without its drafter."""
    folder = artifact("tiny-dense")
    runners = [lfm2_export.load_runner(folder, scheme="q4", kernels="lfm2", threads=1) for _ in range(2)]

    def played(*, wrong: bool = False) -> Report:
        drafting = StreamDrafter(lfm2_export.load_drafter(taught, threads=1))
        report = Report(drafter="drafter")
        ours = SpeculativeRunner(runners[1], drafting, controller=Always(most=5, report=report))
        attributes = {
            "plain": runners[0],
            "speculating": ours,
            "tokenizer": Tokenizer.from_dir(folder),
            "folder": tmp_path,
        }
        run_state_machine_as_test(
            type("Played", (Conversations,), attributes),
            settings=settings(
                max_examples=100 if wrong else 10,
                stateful_step_count=12,
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
        return ours.report

    return played


def test_any_conversation_is_that_without_a_drafter(play: Callable[..., Report]):
    report = play()
    print(report.summary())
    assert 5 < report.accepted < report.drafted  # 20: it was taught other texts


def test_one_whose_blocks_leave_something_behind_is_seen(play: Callable[..., Report], monkeypatch: pytest.MonkeyPatch):
    """The control: conv states that stay where a block ended."""

    def accept(self: OnnxRunner, kept: np.ndarray, length: int, place: object) -> None:
        self._state.set_place(np.array([length + len(kept)]), {})

    monkeypatch.setattr(OnnxRunner, "_accept", accept)
    with pytest.raises(AssertionError):
        play(wrong=True)
