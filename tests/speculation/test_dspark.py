"""A drafter that reads its target's residual streams: the tokens are those of plain decoding, whatever it proposes and
wherever the target's state goes; what is trained on a text proposes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import lfm2_export
from lfm2_export.artifact import Artifact
from lfm2_export.backends.drafter import ProposedBlock
from lfm2_export.backends.onnx import variants
from lfm2_export.errors import ArtifactError, RunnerError
from lfm2_export.generation import complete
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.speculation import Report, SpeculativeRunner, StreamDrafter, speculating
from lfm2_export.speculation.controller import Always
from lfm2_export.text import Tokenizer
from tests.drafters import NEW, PROMPTS
from tests.hash_runner import HashRunner
from tests.shows import of, shows

needs_own = pytest.mark.skipif(variants.own_library() is None, reason="no compiler for our operators")


@dataclass
class Recording:
    """A DraftRunner that keeps what it was told and proposes the next numbers."""

    target: str = ""
    target_name: str = ""
    layers: tuple[int, ...] = (0,)
    width: int = 1
    block_size: int = 4
    confidence: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
    says: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self.rows = np.empty((0, 1), np.float32)

    @property
    def held(self) -> int:
        return len(self.rows)

    def cut(self, count: int) -> None:
        self.rows = self.rows[:count]

    def propose(self, streams: np.ndarray, anchor: int) -> ProposedBlock:
        assert len(streams) >= 1
        self.rows = np.concatenate([self.rows, streams])
        tokens = anchor + 1 + np.arange(self.block_size) if self.says is None else np.array(self.says)
        return ProposedBlock(tokens=tokens, confidence=np.array(self.confidence, np.float32))


def streams(*places: int) -> np.ndarray:
    return np.array(places, np.float32)[:, None]


def test_the_cache_follows_the_text():
    inner = Recording()
    drafter = StreamDrafter(inner)
    drafter.hear(0, streams(0, 1, 2))
    assert drafter.propose([7] * 4, 3).tokens == (8, 9, 10)
    drafter.hear(3, streams(3, 4, 5, 6))  # a verified block, of which two tokens stay
    assert drafter.propose([7] * 6, 9).tokens == (8, 9, 10, 11)
    assert inner.rows[:, 0].tolist() == [0, 1, 2, 3, 4]
    drafter.hear(2, streams(20, 30))  # the target went back
    drafter.propose([7] * 5, 1)
    assert inner.rows[:, 0].tolist() == [0, 1, 20, 30]
    assert drafter.propose([7] * 5, 1).tokens == ()  # nothing new was heard
    assert drafter.propose([7] * 9, 1).tokens == ()  # something was not heard


def test_after_another_state_it_starts_anew_from_there():
    inner = Recording()
    drafter = StreamDrafter(inner)
    drafter.hear(0, streams(0, 1))
    drafter.propose([7] * 3, 1)
    drafter.forget()
    drafter.hear(10, streams(10, 11))
    assert drafter.propose([7] * 13, 2).tokens == (8, 9)
    assert inner.rows[:, 0].tolist() == [10, 11]
    drafter.hear(5, streams(5))  # before all that it knows
    drafter.propose([7] * 7, 2)
    assert inner.rows[:, 0].tolist() == [5]


def test_a_prompt_goes_through_at_once_but_for_its_last_token():
    inner = Recording()
    drafter = StreamDrafter(inner)
    drafter.hear(0, streams(*range(200)))
    assert inner.held == 199
    drafter.propose([7] * 201, 1)
    assert inner.held == 200


def test_the_block_is_cut_where_it_is_in_doubt():
    drafter = StreamDrafter(Recording(confidence=(0.9, 0.5, 0.05, 0.9)))
    drafter.hear(0, streams(0))
    assert drafter.propose([7, 7], 8).tokens == (8, 9)


def compared(folder: Path, drafter: Path, scheme: str, kernels: str, **settings: object) -> Report:
    """Every prompt with and without the drafter, on one runner; what came of it."""
    runner = lfm2_export.load_runner(folder, scheme=scheme, kernels=kernels, threads=1)
    tokenizer, report = Tokenizer.from_dir(folder), Report(drafter="drafter")
    config = GenerationConfig(max_new_tokens=NEW, **settings)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)[:4]
        (plain,) = complete(runner, [ids], config)
        drafting = StreamDrafter(lfm2_export.load_drafter(drafter, scheme="q4", kernels=kernels, threads=1))
        controller = Always(most=5, report=report)
        ours = SpeculativeRunner(runner, drafting, inexact=not runner.verifies_exactly, controller=controller)
        (found,) = complete(ours, [ids], config)
        assert found == plain
        ours.release()
    return report


@shows("ours-own", "speculation", family="lfm2", scheme=of("scheme"))
@shows("ours-own", "speculation", family="lfm2_dspark", scheme="q4")
@needs_own
@pytest.mark.parametrize("scheme", ["q4", "q8"])
def test_greedy_text_is_that_of_plain_decoding(artifact: Callable[[str], Path], taught: Path, scheme: str):
    report = compared(artifact("tiny-dense"), taught, scheme, "lfm2")
    print(report.summary())
    assert report.tokens_per_step > 1.3  # 1.5 of q4, whose text is not quite what it was taught; 3.5 of q8
    sampled = compared(artifact("tiny-dense"), taught, scheme, "lfm2", do_sample=True, temperature=0.7, seed=2)
    print(sampled.summary())


@shows("ours", "speculation", family="lfm2", scheme="fp32")
@shows("ours", "speculation", family="lfm2_dspark", scheme="q4")
def test_it_serves_floats_on_stock_kernels_too(artifact: Callable[[str], Path], taught: Path):
    """Which may differ in a token, but seldom do."""
    report = compared(artifact("tiny-dense"), taught, "fp32", "stock")
    print(report.summary())
    assert report.tokens_per_step > 1.5


@needs_own
def test_a_state_that_comes_and_goes_changes_no_token(artifact: Callable[[str], Path], taught: Path):
    """Snapshots, marks and other rows between blocks, as a chat and a server make them."""
    folder = artifact("tiny-dense")
    runner = lfm2_export.load_runner(folder, scheme="q4", kernels="lfm2", threads=1)
    ids = Tokenizer.from_dir(folder).encode(PROMPTS[0])[:4]
    config = GenerationConfig(max_new_tokens=40)
    (plain,) = complete(runner, [ids], config)
    drafting = StreamDrafter(lfm2_export.load_drafter(taught, threads=1))
    ours = SpeculativeRunner(runner, drafting, controller=Always(most=5, report=Report(drafter="drafter")))

    def follow(tokens: Sequence[int]) -> list[int]:
        """What is likeliest after each."""
        return [int(ours.decode([token])[0].argmax()) for token in tokens]

    ours.reset()
    ours.prefill([ids])
    assert follow(plain.tokens[:9]) == list(plain.tokens[1:10])
    snapshot, mark = ours.snapshot(), ours.mark()
    follow([5, 6, 7])
    ours.rewind(mark)
    assert follow(plain.tokens[9:20]) == list(plain.tokens[10:21])
    ours.reset(2)
    ours.prefill([ids, ids[:2]])
    ours.restore(snapshot)
    assert follow(plain.tokens[9:30]) == list(plain.tokens[10:31])
    assert ours.report.accepted > 5


def test_a_drafter_of_another_model_is_refused(artifact: Callable[[str], Path], taught: Path):
    folder = artifact("tiny-moe")
    runner = lfm2_export.load_runner(folder, scheme="fp32", threads=1)
    with pytest.raises(ArtifactError, match=r"drafts for 'tiny-dense', not for tiny-moe as it is here"):
        speculating(
            runner,
            taught,
            tokenizer=Tokenizer.from_dir(folder),
            inexact=True,
            target=Artifact.open(folder).manifest.checkpoint,
        )


def test_a_model_that_gives_no_streams_is_refused(taught: Path):
    runner = HashRunner()
    runner.can_score = True
    with pytest.raises(RunnerError, match="this program gives no residual streams, which the drafter reads"):
        SpeculativeRunner(runner, StreamDrafter(lfm2_export.load_drafter(taught, threads=1)))


def test_a_drafter_that_reads_other_widths_is_refused(artifact: Callable[[str], Path]):
    runner = lfm2_export.load_runner(artifact("tiny-dense"), scheme="fp32", threads=1)
    for drafter, text in (
        (Recording(layers=(0, 2), width=5), "residual streams of 512 numbers, the drafter reads 5; export the drafter"),
        (Recording(layers=(0, 6)), "does not give the residual stream behind layer 6"),
    ):
        with pytest.raises(RunnerError, match=text):
            SpeculativeRunner(runner, StreamDrafter(drafter), inexact=True)


def test_what_is_no_token_is_not_verified(artifact: Callable[[str], Path]):
    """A drafter may be anybody's: what it says must not stop the text."""
    folder = artifact("tiny-dense")
    runner = lfm2_export.load_runner(folder, scheme="fp32", threads=1)
    vocab, ids = runner.vocab_size, Tokenizer.from_dir(folder).encode(PROMPTS[0])[:4]
    wild = Recording(layers=(0,), width=256, says=[vocab - 1, vocab, -1, 5])
    wild.rows = np.empty((0, 256), np.float32)
    config = GenerationConfig(max_new_tokens=8)
    (plain,) = complete(runner, [ids], config)
    report = Report(drafter="wild")
    ours = SpeculativeRunner(runner, StreamDrafter(wild), inexact=True, controller=Always(most=4, report=report))
    (found,) = complete(ours, [ids], config)
    assert found.tokens == plain.tokens
    assert report.drafted == report.verified_steps > 0
