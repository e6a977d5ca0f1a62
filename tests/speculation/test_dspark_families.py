"""Drafters for mixtures of experts and for LFM3: the tokens are those of plain decoding, and what a drafter hears is
what its target computed of the tokens that stayed, bit for bit, whatever was taken back: conv windows, and the rings of
sliding layers, which have room for some blocks and none for longer ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lfm2_export
from lfm2_export.backends.base import Runner
from lfm2_export.backends.drafter import ProposedBlock
from lfm2_export.backends.onnx import runner as onnx_runner
from lfm2_export.backends.onnx import variants
from lfm2_export.backends.onnx.runner import OnnxRunner
from lfm2_export.cache import RING_ROOM
from lfm2_export.generation import complete
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.speculation import Report, SpeculativeRunner, StreamDrafter
from lfm2_export.speculation.controller import Always
from tests.checkpoints import tiny_config
from tests.conftest import Once
from tests.drafters import NEW

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(variants.own_library() is None, reason="no compiler for our operators"),
]

# A ring of LFM3's holds 64 positions here: the texts go round it.
TARGETS = {
    "moe, untied": tiny_config("lfm2_moe", num_experts=12, num_experts_per_tok=3, tie_word_embeddings=False),
    "lfm3": tiny_config("lfm3", sliding_window=24),
}
PROMPTS = np.random.default_rng(3).integers(3, 131, (2, 4)).tolist()
SAMPLED = {"do_sample": True, "temperature": 0.7, "seed": 2}


@dataclass(frozen=True, kw_only=True)
class Taught:
    """An artifact (q4) with a drafter (q4) that was trained on its greedy answers to ``PROMPTS``."""

    target: Path
    drafter: Path

    def runner(self, **options: Any) -> Runner:
        return lfm2_export.load_runner(self.target, kernels="lfm2", threads=1, **options)

    def drafting(self) -> StreamDrafter:
        return StreamDrafter(lfm2_export.load_drafter(self.drafter, kernels="lfm2", threads=1))


@pytest.fixture(scope="module", params=TARGETS)
def taught(request: pytest.FixtureRequest, once: Once, random_artifact: Callable[..., Any]) -> Taught:
    target = random_artifact(TARGETS[request.param], ("q4",)).artifact

    def make(folder: Path) -> None:
        from tests.drafters import teach_for

        teach_for(target, folder / "checkpoint", PROMPTS)
        lfm2_export.export(folder / "checkpoint", output=folder / "artifact", target=target, algorithm="round")

    return Taught(target=target, drafter=once(f"taught-{request.param}", make) / "artifact")


@dataclass
class PartlyRight:
    """A DraftRunner that hears and says what plain decoding chose, each token right with probability ``rate``."""

    text: list[int]
    layers: tuple[int, ...] = (0, 1, 4)
    width: int = 3 * 64
    rate: float = 0.8
    block_size: int = 9
    target: str = ""
    target_name: str = ""
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def __post_init__(self) -> None:
        self.rows = np.empty((0, self.width), np.float32)

    @property
    def held(self) -> int:
        return len(self.rows)

    def cut(self, count: int) -> None:
        self.rows = self.rows[:count]

    def propose(self, streams: np.ndarray, anchor: int) -> ProposedBlock:
        self.rows = np.concatenate([self.rows, streams])
        after = np.array([*self.text, *[0] * self.block_size])[self.held + 1 :][: self.block_size]
        wrong = self.random.random(len(after)) > self.rate
        return ProposedBlock(tokens=(after + wrong) % 131, confidence=np.ones(len(after), np.float32))


def speculative(runner: Runner, drafting: StreamDrafter, most: int, report: Report) -> SpeculativeRunner:
    return SpeculativeRunner(runner, drafting, controller=Always(most=most, report=report))


@pytest.mark.parametrize("cache", ["float", "int8"])
def test_text_is_that_of_plain_decoding(taught: Taught, cache: str):
    runner, report = taught.runner(kv_cache=cache), Report(drafter="drafter")
    for prompt, settings in ((PROMPTS[0], {}), (PROMPTS[1], {}), (PROMPTS[0], SAMPLED)):
        config = GenerationConfig(max_new_tokens=NEW, **settings)
        (plain,) = complete(runner, [prompt], config)
        ours = speculative(runner, taught.drafting(), 5, report)
        assert complete(ours, [prompt], config) == [plain]
        ours.release()
    print(report.summary())
    # With keys and values in int8 the text is soon another one than it was taught.
    assert report.accepted > (report.tokens / 5 if cache == "float" else 10)


Heard = tuple[list[int], list[int], np.ndarray, np.ndarray]


def heard_and_wanted(runner: Runner, block: int, report: Report) -> Heard:
    """Greedy tokens with and without proposals in blocks of that size, of which many are taken back; what the drafter
    has heard at the end, and what it hears where the same tokens are one prompt."""
    prompt, config = PROMPTS[0], GenerationConfig(max_new_tokens=120)
    (plain,) = complete(runner, [prompt], config)
    inner = PartlyRight([*prompt, *plain.tokens], block_size=block)
    ours = speculative(runner, StreamDrafter(inner), block, report)
    (found,) = complete(ours, [prompt], config)
    ours.release()
    rows: list[np.ndarray] = []
    runner.tap(inner.layers, lambda before, streams: rows.append(streams))
    runner.reset()
    runner.prefill([[*prompt, *plain.tokens]])
    runner.tap((), None)
    return found.tokens, plain.tokens, inner.rows, np.concatenate(rows)[: inner.held]


@pytest.mark.parametrize("block", [9, RING_ROOM - 1, RING_ROOM + 4])
def test_what_was_taken_back_leaves_no_trace(taught: Taught, block: int):
    report = Report(drafter="drafter")
    found, plain, heard, wanted = heard_and_wanted(taught.runner(), block, report)
    assert found == plain
    assert 20 < report.accepted < report.drafted
    assert len(heard) > 100
    np.testing.assert_array_equal(heard, wanted)
    assert np.abs(heard[1:] - wanted[:-1]).max() > 1.0  # the control: a token too many


def test_conv_states_that_stay_where_a_block_ended_are_seen(taught: Taught, monkeypatch: pytest.MonkeyPatch):
    """A control."""
    monkeypatch.setattr(
        OnnxRunner,
        "_accept",
        lambda self, kept, length, place: self._state.set_place(np.array([length + len(kept)]), {}),
    )
    is_seen(taught, block=9)


@pytest.mark.parametrize("taught", ["lfm3"], indirect=True)
def test_blocks_for_which_a_ring_has_no_room_are_seen(taught: Taught, monkeypatch: pytest.MonkeyPatch):
    """A control: they are written over what the ring still has to hold."""
    monkeypatch.setattr(onnx_runner, "RING_ROOM", 64)
    is_seen(taught, block=60)


def is_seen(taught: Taught, block: int) -> None:
    found, plain, heard, wanted = heard_and_wanted(taught.runner(), block, Report(drafter="drafter"))
    assert found != plain or (heard != wanted).any()
