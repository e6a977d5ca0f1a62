"""Rows that come and go while others are decoded get the bits that they get alone, in any order and of any length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import lfm2_export
from lfm2_export.backends.base import JoinsRows, Runner, Snapshot
from lfm2_export.backends.onnx import variants
from lfm2_export.backends.onnx.buffers import StateBuffers
from lfm2_export.backends.onnx.runner import OnnxRunner
from lfm2_export.errors import ContextLimitError, RunnerError
from tests.backends.onnx.test_independent_rows import CONFIGS, differing, open_runner
from tests.conftest import Exported

needs_library = pytest.mark.skipif(variants.own_library() is None, reason="no compiler for our operators")
KINDS = [("dense", "float"), ("dense", "int8"), ("moe", "float"), ("lfm3", "float"), ("lfm3", "int8")]
MOST_ROWS = 5
LONGEST = 70  # beyond LFM3's window of 24 tokens, its ring of 64, and the 64 positions that buffers grow by


class Alone:
    """What each row would get without any other: the logits after its tokens, each computed once."""

    def __init__(self, runner: Runner):
        self._runner, self._known = runner, dict[tuple[int, ...], tuple[np.ndarray, Snapshot]]()

    def prefilled(self, tokens: tuple[int, ...]) -> tuple[np.ndarray, Snapshot]:
        if tokens not in self._known:
            self._runner.reset()
            self._known[tokens] = self._runner.prefill([list(tokens)]), self._runner.snapshot()
        return self._known[tokens]

    def decoded(self, tokens: tuple[int, ...], new: int) -> np.ndarray:
        self._runner.restore(self.prefilled(tokens)[1])
        return self._runner.decode([new])


class Joined:
    """Rows that come and go on a runner, and what they hold. ``worst``: rows of a step that are not as alone."""

    def __init__(self, runner: Runner, alone: Alone):
        assert isinstance(runner, JoinsRows)
        self._joins, self.runner, self._alone = runner, runner.beside(), alone
        self.rows: list[tuple[int, ...]] = []
        self.steps = self.wrong = 0

    def join(self, tokens: tuple[int, ...]) -> None:
        snapshot = self._alone.prefilled(tokens)[1]
        if not self.rows:
            self.runner = self._joins.beside()
            self.runner.restore(snapshot)
        else:
            self.runner.join(snapshot)
        self.rows.append(tokens)

    def leave(self, row: int) -> None:
        if len(self.rows) > 1:
            self.runner.leave(row)
        self.rows[row] = self.rows[-1]
        self.rows.pop()

    def step(self, tokens: list[int]) -> None:
        got = self.runner.decode(tokens)
        for row, token in enumerate(tokens):
            self.steps += 1
            self.wrong += differing(got[row : row + 1], self._alone.decoded(self.rows[row], token))
            self.rows[row] += (token,)

    def check_copies(self) -> None:
        assert self.runner.lengths.tolist() == [len(row) for row in self.rows]
        for index, row in enumerate(self.rows):
            copied, (_, want) = self.runner.copy_row(index), self._alone.prefilled(row)
            for name, tensor in want.tensors.items():
                np.testing.assert_array_equal(copied.tensors[name], tensor, err_msg=name)


def play(joined: Joined, vocab_size: int, seed: int) -> None:
    """Twenty events: of three tokens decoded for each row, one row comes or goes."""
    chance = np.random.default_rng(seed)
    for _ in range(20):
        count = len(joined.rows)
        if not count or (count < MOST_ROWS and chance.random() < 0.3):
            kept = np.random.default_rng(chance.integers(4)).integers(0, vocab_size, chance.integers(1, LONGEST))
            joined.join(tuple(kept.tolist()))
        elif chance.random() < 0.2:
            joined.leave(int(chance.integers(count)))
        else:
            joined.step(chance.integers(0, vocab_size, count).tolist())


@pytest.fixture(scope="module")
def folders(random_artifact: Callable[..., Exported]) -> Callable[[str], Path]:
    return lambda name: random_artifact(CONFIGS[name], ("q4", "q8")).artifact


@needs_library
@pytest.mark.parametrize(("name", "cache"), KINDS)
def test_rows_that_come_and_go_get_the_bits_that_they_get_alone(
    folders: Callable[[str], Path], name: str, cache: str
) -> None:
    runner, lone = (open_runner(folders(name), "q4", cache, threads) for threads in (2, 1))
    alone, steps = Alone(lone), 0
    for seed in range(6):
        joined = Joined(runner, alone)
        play(joined, runner.vocab_size, seed)
        assert joined.wrong == 0
        joined.check_copies()
        steps += joined.steps
    print(f"{name} {cache}: {steps} tokens decoded beside others, all as alone")
    assert steps > 100


@needs_library
def test_twenty_rows_at_once(folders: Callable[[str], Path]) -> None:
    """More than the kernels take in their way for few tokens."""
    joined = Joined(open_runner(folders("moe"), "q4", "float", 2), Alone(open_runner(folders("moe"), "q4", "float")))
    for index in range(20):
        joined.join(tuple(np.random.default_rng(index).integers(0, 40, 3 + index * 7 % 60).tolist()))
    joined.step(list(range(20)))
    for _ in range(15):
        joined.leave(2)
    joined.step([7] * 5)
    joined.check_copies()
    assert joined.wrong == 0


@needs_library
def test_rows_that_were_swapped_are_noticed(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a join that puts a row in the place of another one."""
    joined = Joined(open_runner(folders("dense"), "q4", "float"), Alone(open_runner(folders("dense"), "q4", "float")))
    right = StateBuffers.join

    def swapped(self: StateBuffers, *args: object) -> None:
        right(self, *args)  # type: ignore[arg-type]
        for array in (*self.conv.values(), *self.kv.values()):
            array[[0, -1]] = array[[-1, 0]]

    monkeypatch.setattr(StateBuffers, "join", swapped)
    for tokens in ((1, 2, 3), (9, 8, 7)):
        joined.join(tokens)
    joined.step([5, 5])
    assert joined.wrong == 2


@needs_library
def test_the_runtimes_own_kernels_say_that_rows_depend_on_each_other(folders: Callable[[str], Path]) -> None:
    stock = lfm2_export.load_runner(folders("dense"), scheme="q4", kernels="stock", threads=1)
    assert isinstance(stock, OnnxRunner)
    assert not stock.rows_are_independent
    joined = Joined(stock, Alone(lfm2_export.load_runner(folders("dense"), scheme="q4", kernels="stock", threads=1)))
    for index in range(6):
        joined.join(tuple(np.random.default_rng(index).integers(0, 40, 9 * index + 2).tolist()))
    for token in range(3):
        joined.step([token] * 6)
    print(f"{joined.wrong} of {joined.steps} differ")
    assert joined.wrong > 0


def test_what_cannot_be_joined_is_refused(folders: Callable[[str], Path]) -> None:
    runner = lfm2_export.load_runner(folders("dense"), scheme="q4", threads=1)
    assert isinstance(runner, OnnxRunner)
    other = runner.beside()
    assert other.program_id == runner.program_id
    runner.prefill([[1, 2]])
    kept, mark = runner.snapshot(), runner.mark()
    for wrong in (-1, 1, 0.5, None):
        with pytest.raises(RunnerError, match="of a state that has 1; count from 0"):
            runner.copy_row(wrong)  # type: ignore[arg-type]
    with pytest.raises(RunnerError, match="a state needs at least one row"):
        runner.leave(0)
    with pytest.raises(RunnerError, match="is not a snapshot"):
        runner.join([1])  # type: ignore[arg-type]
    q8 = lfm2_export.load_runner(folders("dense"), scheme="q8", threads=1)
    with pytest.raises(RunnerError, match="a state only fits the program that made it"):
        runner.join(q8.snapshot())
    short = OnnxRunner(
        runner._path, cache=runner.cache, context_length=1, program_id=runner.program_id, sessions=runner._sessions
    )
    with pytest.raises(ContextLimitError):
        short.join(kept)
    assert runner.is_valid(mark)
    assert other.lengths.tolist() == [0], "a state of its own"
    runner.join(kept)
    assert not runner.is_valid(mark)
    assert runner.lengths.tolist() == [2, 2]
    runner.leave(0)
    assert runner.lengths.tolist() == [2]
