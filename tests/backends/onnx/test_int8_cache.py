"""Keys and values in int8: how close logits stay, what a position costs, and that every use of a state still works."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest

import lfm2_export
from lfm2_export.backends.base import Runner
from lfm2_export.backends.onnx import variants
from lfm2_export.errors import RunnerError
from lfm2_export.text import Tokenizer
from tests.graphs import kl_divergence
from tests.shows import of, shows

TEXT = Path(lfm2_export.__file__).parent / "assets" / "heldout.txt"
TOKENS = 160
CASES = [(checkpoint, scheme) for checkpoint in ("tiny-moe", "tiny-dense") for scheme in ("q4", "q8")]

FAMILY, SCHEME = (of("case", itemgetter(index)) for index in (0, 1))  # for ``shows``

# Mean KL divergence in nats from the same kernels with a float cache, over the text: 5e-5 to 3.4e-4 measured.
KL_BOUND = 7e-4
# Logits of the same row by another way: a share of their spread. The same numbers enter, so only a last bit can differ;
# that can push an activation over a rounding step.
SAME = 0.05

pytestmark = pytest.mark.skipif(variants.own_library() is None, reason="our operators cannot be had here")


class Case:
    def __init__(self, folder: Path, scheme: str):
        self.folder, self.scheme = folder, scheme
        self.tokens = Tokenizer.from_dir(folder).encode(TEXT.read_text(encoding="utf-8")[:4000])[:TOKENS]
        self.runner = self.open()

    def open(self, kv_cache: str = "int8") -> Runner:
        return lfm2_export.load_runner(self.folder, scheme=self.scheme, threads=1, kv_cache=kv_cache)

    def alone(self, row: list[int]) -> np.ndarray:
        """Logits after a row of its own."""
        kept = self.runner.snapshot()
        self.runner.reset()
        logits = self.runner.prefill([row])[0]
        self.runner.restore(kept)
        return logits

    def check(self, rows: list[list[int]], logits: np.ndarray) -> None:
        expected = np.stack([self.alone(row) for row in rows])
        worst = float(np.abs(logits - expected).max() / np.ptp(expected))
        print(f"largest difference {worst:.1e} of the logits' spread")
        assert worst <= SAME


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, artifact: Callable[[str], Path]) -> Case:
    checkpoint, scheme = request.param
    return Case(artifact(checkpoint), scheme)


def step_by_step(runner: Runner, tokens: list[int], prompt: int = 32) -> np.ndarray:
    """Logits [T, V] after the prompt and after each token behind it."""
    runner.reset()
    return np.concatenate([runner.prefill([tokens[:prompt]]), *(runner.decode([t]) for t in tokens[prompt:])])


@shows("ours-own", "int8-kv", family=FAMILY, scheme=SCHEME)
def test_logits_stay_close_to_those_of_a_float_cache(case: Case) -> None:
    floats = step_by_step(case.open("float"), case.tokens)
    ints = step_by_step(case.runner, case.tokens)
    found = kl_divergence(floats, ints)
    agree = (floats.argmax(-1) == ints.argmax(-1)).mean()
    print(f"{case.scheme}: KL {found:.1e} nats over {len(ints)} positions, the same next token at {agree:.3f}")
    assert found > 0, "both kept floats"
    assert found <= KL_BOUND
    assert agree >= 0.95


def test_a_coarser_cache_is_noticed(case: Case) -> None:
    """The control: of each code only the upper 2 bits are kept."""
    runner, prompt, rest = case.runner, case.tokens[:120], case.tokens[120:]
    runner.reset()
    runner.prefill([prompt])
    snapshot = runner.snapshot()
    clean = np.concatenate([runner.decode([token]) for token in rest])
    for rows in snapshot.tensors.values():
        if rows.dtype == np.uint8:
            rows[..., :-4] = rows[..., :-4] & 0xC0 | 0x20
    runner.restore(snapshot)
    found = kl_divergence(clean, np.concatenate([runner.decode([token]) for token in rest]))
    print(f"{case.scheme}: KL {found:.1e} nats with codes of 2 bits")
    assert found > KL_BOUND


def test_a_position_costs_a_byte_a_feature_and_a_scale(case: Case) -> None:
    """2 attention layers, keys and values of 2 heads of 32."""
    assert case.runner.cache.bytes_per_token() == 2 * 2 * 2 * (32 + 4)
    assert case.open("float").cache.bytes_per_token() == 2 * 2 * 2 * 32 * 4
    case.runner.reset()
    case.runner.prefill([case.tokens[:50]])
    tensors = case.runner.snapshot().tensors
    assert {(a.dtype.name, a.shape) for a in tensors.values()} == {
        ("float32", (1, 2, 256)),
        ("uint8", (1, 2, 50, 36)),
    }


@shows("ours-own", "int8-kv", family=FAMILY, scheme=SCHEME)
def test_chunks_give_what_one_prefill_gives(case: Case) -> None:
    row = case.tokens[:100]
    case.runner.reset()
    case.check([row], case.runner.prefill([row], chunk_size=17))


@shows("ours-own", "int8-kv", family=FAMILY, scheme=SCHEME)
def test_rows_of_different_length_and_their_order(case: Case) -> None:
    rows = [case.tokens[:40], case.tokens[7:10], case.tokens[50:51]]
    case.runner.reset(3)
    case.check(rows, case.runner.prefill(rows))
    rows = [[*row, token] for row, token in zip(rows, (20, 21, 22), strict=True)]
    case.check(rows, case.runner.decode([20, 21, 22]))
    case.runner.reorder([2, 0, 0, 1])
    rows = [[*rows[i], token] for i, token in zip((2, 0, 0, 1), (30, 31, 32, 33), strict=True)]
    case.check(rows, case.runner.decode([30, 31, 32, 33]))


@shows("ours-own", "int8-kv", family=FAMILY, scheme=SCHEME)
def test_earlier_places_can_be_gone_back_to(case: Case) -> None:
    start, other = case.tokens[:30], case.tokens[60:90]
    case.runner.reset()
    case.runner.prefill([start])
    snapshot, mark = case.runner.snapshot(), case.runner.mark()
    expected = case.runner.decode([25])
    case.runner.prefill([other])
    case.runner.rewind(mark)
    np.testing.assert_array_equal(case.runner.decode([25]), expected)
    case.runner.reset(2)
    case.runner.prefill([other, other[:3]])
    for runner in (case.runner, case.open()):
        runner.restore(snapshot)
        np.testing.assert_array_equal(runner.decode([25]), expected)
    case.runner.reset()
    case.runner.prefill([start])
    np.testing.assert_array_equal(case.runner.decode([25]), expected)


def test_a_snapshot_fits_only_the_kind_of_cache_that_made_it(case: Case) -> None:
    floats = case.open("float")
    for source, target in ((case.runner, floats), (floats, case.runner)):
        source.reset()
        source.prefill([case.tokens[:5]])
        with pytest.raises(RunnerError, match="a state only fits the program that made it"):
            target.restore(source.snapshot())


def test_every_position_is_scored_as_steps_score_it(case: Case) -> None:
    tokens = case.tokens[:5]
    (scored,) = case.runner.score([tokens])
    case.runner.reset()
    np.testing.assert_array_equal(scored, np.concatenate([case.runner.prefill([[token]]) for token in tokens]))


@pytest.mark.parametrize("options", [{"scheme": "fp32"}, {"scheme": "q4f16"}, {"scheme": "q4", "kernels": "stock"}])
def test_programs_without_such_a_cache_say_for_which_it_is(artifact: Callable[[str], Path], options) -> None:
    with pytest.raises(
        RunnerError, match=r"--kv-cache int8 is for q4 and q8 on our kernels; .*without --kernels stock"
    ):
        lfm2_export.load_runner(artifact("tiny-moe"), **options, kv_cache="int8")
