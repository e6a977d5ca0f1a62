"""verify and accept: a runner that took some of a block's tokens back is one that never saw them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import lfm2_export
from lfm2_export.backends.base import Runner
from lfm2_export.backends.eager import EagerRunner
from lfm2_export.backends.onnx import variants
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.errors import ContextLimitError, RunnerError
from lfm2_export.models.loading import load_model
from tests.backends.onnx.test_independent_rows import CONFIGS
from tests.conftest import Exported

BLOCK = 7
needs_library = pytest.mark.skipif(variants.own_library() is None, reason="no compiler for our operators")


def tokens_of(runner: Runner, count: int) -> list[int]:
    return np.random.default_rng(count).integers(0, runner.vocab_size, count).tolist()


def worst(runner: Runner, *, held: tuple[int, ...]) -> float:
    """The largest difference of the next two tokens' logits, for each number of tokens that stay."""
    found = 0.0
    for before in held:
        ids = tokens_of(runner, before + BLOCK)
        for kept in range(BLOCK + 1):
            runner.reset()
            if before:
                runner.prefill([ids[:before]])
            scores = runner.verify(ids[before:])
            runner.accept(kept)
            assert runner.lengths.tolist() == [before + kept]
            got = np.stack([runner.decode([3])[0], runner.decode([4])[0]])
            runner.reset()
            fed = [runner.prefill([[token]])[0] for token in ids[: before + kept]]
            want = np.stack([runner.decode([3])[0], runner.decode([4])[0]])
            if kept:
                found = max(found, float(np.abs(scores[:kept] - np.stack(fed[before:])).max()))
            found = max(found, float(np.abs(got - want).max()))
    return found


@needs_library
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cache", ["float", "int8"])
def test_on_our_operators_to_the_last_bit(random_artifact: Callable[..., Exported], name: str, cache: str):
    folder = random_artifact(CONFIGS[name], ("q4", "q8")).artifact
    runner = lfm2_export.load_runner(folder, scheme="q4", kv_cache=cache, kernels="lfm2", threads=1)
    assert runner.verifies_exactly
    assert worst(runner, held=(0, 1, 2, 30)) == 0.0  # of LFM3's window, 24 tokens, both sides


def test_elsewhere_by_going_back(random_artifact: Callable[..., Exported]):
    exported = random_artifact(CONFIGS["dense"], ("q4", "q8"))
    stock = lfm2_export.load_runner(exported.artifact, scheme="q4", kernels="stock", threads=1)
    eager = EagerRunner(load_model(open_checkpoint(exported.checkpoint)))
    for runner, bound in ((stock, 0.2), (eager, 2e-5)):
        assert not runner.verifies_exactly
        error = worst(runner, held=(0, 5))
        print(f"{type(runner).__name__}: {error:.1e}")
        assert error < bound


@needs_library
def test_marks_and_blocks(random_artifact: Callable[..., Exported]):
    runner = lfm2_export.load_runner(random_artifact(CONFIGS["moe"], ("q4", "q8")).artifact, scheme="q4", threads=1)
    ids = tokens_of(runner, 20)
    runner.prefill([ids[:5]])
    early = runner.mark()
    runner.verify(ids[5:12])
    late = runner.mark()
    runner.accept(3)
    assert (runner.is_valid(early), runner.is_valid(late)) == (True, False)
    runner.decode([1])
    runner.rewind(early)
    got = runner.decode([ids[5]])
    runner.reset()
    runner.prefill([ids[:5]])
    np.testing.assert_array_equal(got, runner.decode([ids[5]]))
    before = runner.lengths
    with pytest.raises(RunnerError, match="call verify first"):
        runner.accept(1)
    runner.verify(ids[:4])
    for wrong in (-1, 5, 1.5, "2"):
        with pytest.raises(RunnerError, match="give a number from 0 to 4"):
            runner.accept(wrong)
    runner.decode([2])
    with pytest.raises(RunnerError, match="something else came between"):
        runner.accept(2)
    runner.reset(2)
    with pytest.raises(RunnerError, match="takes one row, this state has 2"):
        runner.verify([1, 2])
    runner.reset()
    with pytest.raises(ContextLimitError):
        runner.verify([1] * (runner.context_length + 1))
    runner.verify([1] * runner.context_length)  # up to the last position
    runner.accept(runner.context_length - 1)
    assert runner.decode([1]).shape == (1, runner.vocab_size)
    assert before.tolist() == [6]


def test_a_pte_goes_back_too(pte_artifact: Callable[[str, str], Path]):
    runner = lfm2_export.load_runner(pte_artifact("tiny-dense", "8da4w"), threads=1)
    assert not runner.verifies_exactly
    error = worst(runner, held=(0, 4))
    print(f"{error:.1e}")
    assert error < 0.5
