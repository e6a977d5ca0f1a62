"""On our operators a token's logits are the same bits whatever other tokens are in the call: alone, in a block that is
verified, in a prompt in one piece or in chunks. The condition for exact speculation and for chunks that change nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import lfm2_export
from lfm2_export.backends.base import Runner
from lfm2_export.backends.onnx import variants
from lfm2_export.kernels import targets
from tests.checkpoints import tiny_config
from tests.conftest import Exported
from tests.shows import of, shows

LIBRARY = variants.own_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no compiler for our operators")

TOKENS = 90
CHUNKS = (2, 3, 4, 5, 8, 9, 12, 13, 16, 17, 33, 64)
# Widths that fill no register, groups of inputs that end within a piece, heads of a size of their own, many experts.
WIDE = {"hidden_size": 160, "intermediate_size": 224, "num_attention_heads": 5, "num_key_value_heads": 1}
CONFIGS = {
    "dense": tiny_config("lfm2", **WIDE, max_position_embeddings=4096),
    "moe": tiny_config("lfm2_moe", num_experts=12, num_experts_per_tok=3),
    "lfm3": tiny_config("lfm3", sliding_window=24),
}
KINDS = [(name, scheme, cache) for name in CONFIGS for scheme, cache in (("q4", "float"), ("q8", "int8"))]
THREADS = (1, 2)


def open_runner(folder: Path, scheme: str, cache: str, threads: int = 1) -> Runner:
    return lfm2_export.load_runner(folder, scheme=scheme, kv_cache=cache, kernels="lfm2", threads=threads)


def tokens_of(runner: Runner, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, runner.vocab_size, count)


def singly(runner: Runner, ids: np.ndarray) -> np.ndarray:
    """The logits after each token, [T, V], by steps of one token."""
    runner.reset()
    return np.stack([runner.prefill([[int(token)]])[0] for token in ids])


def chunked(runner: Runner, ids: np.ndarray, size: int) -> np.ndarray:
    runner.reset()
    return runner.prefill_scored([ids], chunk_size=size)[0]


def ragged(ids: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """``ids`` in pieces of random sizes."""
    rng, at = np.random.default_rng(seed), 0
    while at < len(ids):
        size = int(rng.integers(1, 20))
        yield ids[at : at + size]
        at += size


def differing(got: np.ndarray, want: np.ndarray) -> int:
    return int((got.view(np.int32) != want.view(np.int32)).any(-1).sum())


@pytest.fixture(scope="module")
def folders(random_artifact: Callable[..., Exported]) -> Callable[[str], Path]:
    return lambda name: random_artifact(CONFIGS[name], ("q4", "q8")).artifact


@shows("ours-own", "chunks", family=of("name", lambda name: CONFIGS[name]["model_type"]), scheme=of("scheme"))
@pytest.mark.parametrize(("name", "scheme", "cache"), KINDS)
def test_a_tokens_logits_do_not_depend_on_the_others(
    folders: Callable[[str], Path], name: str, scheme: str, cache: str
):
    first = open_runner(folders(name), scheme, cache)
    ids = tokens_of(first, TOKENS)
    want = singly(first, ids)
    for threads in THREADS:
        runner = open_runner(folders(name), scheme, cache, threads)
        wrong = {size: differing(chunked(runner, ids, size), want) for size in (*CHUNKS, TOKENS)}
        runner.reset()
        pieces = [runner.prefill_scored([piece])[0] for piece in ragged(ids, seed=threads)]
        wrong["ragged"] = differing(np.concatenate(pieces), want)
        runner.reset()
        last = runner.prefill([ids])  # the graph that gives the last token's logits only
        wrong["last"] = differing(last, want[-1:])
        print(name, scheme, cache, threads, wrong)
        assert not any(wrong.values())


def test_nor_where_attention_takes_a_long_context_in_pieces(folders: Callable[[str], Path]):
    """More than two pieces of 1024 positions: with few tokens they are tasks of their own, with many they are not."""
    for cache in ("float", "int8"):
        runner = open_runner(folders("dense"), "q4", cache, threads=2)
        ids = tokens_of(runner, 2150)
        runner.prefill([ids[:-30]], chunk_size=512)
        steps = np.stack([runner.decode([int(token)])[0] for token in ids[-30:]])
        runner.reset()
        runner.prefill([ids[:-30]], chunk_size=97)
        assert differing(runner.prefill_scored([ids[-30:]])[0], steps) == 0


def test_the_runtimes_own_kernels_are_told_apart(folders: Callable[[str], Path]):
    """The control: there, tokens depend on the others, and the graph does not say otherwise."""
    runner = lfm2_export.load_runner(folders("dense"), scheme="q4", kernels="stock", threads=1)
    ids = tokens_of(runner, 40)
    wrong = differing(chunked(runner, ids, 40), singly(runner, ids))
    print(f"{wrong} of 40 differ")
    assert wrong > 20


@pytest.mark.parametrize("kernels", targets.runnable(LIBRARY)[1:] if LIBRARY else [])
def test_nor_on_other_kernels(folders: Callable[[str], Path], kernels: str):
    program = (
        "import sys; from pathlib import Path; from tests.backends.onnx import test_independent_rows as t;"
        "runner = t.open_runner(Path(sys.argv[1]), 'q4', 'float'); ids = t.tokens_of(runner, 24); "
        "print(t.differing(t.chunked(runner, ids, 24), t.singly(runner, ids)))"
    )
    environment = os.environ | {"LFM2_KERNELS": kernels}
    command = [sys.executable, "-c", program, str(folders("moe"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split()[-1] == "0"
