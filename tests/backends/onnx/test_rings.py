"""Sliding layers as rings in graphs on our operators: the bits of graphs that keep everything, in bounded memory."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import lfm2_export
from lfm2_export import cli
from lfm2_export.artifact import Artifact
from lfm2_export.backends.base import Runner
from lfm2_export.backends.onnx import runner as onnx_runner
from lfm2_export.backends.onnx import variants
from lfm2_export.backends.onnx.runner import OnnxRunner
from lfm2_export.cache import RING_ROOM, ring_positions
from lfm2_export.errors import ResourceError, RunnerError
from lfm2_export.hashing import sha256_file
from lfm2_export.inspection import LONG_CONTEXT, inspect
from lfm2_export.manifest import MANIFEST, FileEntry, Manifest
from tests.backends.onnx.rings import keep_everything, open_edited, program_of, set_window, write_edited
from tests.checkpoints import tiny_config
from tests.graphs import Graph, pad
from tests.shows import shows

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(variants.own_library() is None, reason="our operators cannot be had here"),
]

CONTEXT = 1024
LAYERS = ["conv", "sliding_attention", "full_attention", "sliding_attention"]
# A window of its own graph, and shorter ones that are written into it: they fit the same ring, or a longer one.
WINDOWS = (256, 16, 5)
CACHES = ("float", "int8")
STEPS = 64
# Logits of a padded row, as a share of their spread. Tokens behind padding on the left have other positions, and a last
# bit there can push an activation to another code of int8: 0.006 was measured, 0.04 with an int8 cache. On the right
# they are the same bits.
PADDED = {"left": 0.1, "right": 0.0}


@pytest.fixture(scope="module")
def folder(random_artifact: Callable[..., Any]) -> Callable[[int], Path]:
    """The artifact whose rings are those of a window."""

    def made(window: int) -> Path:
        config = tiny_config(
            "lfm3",
            layer_types=LAYERS,
            num_hidden_layers=len(LAYERS),
            sliding_window=256 if window > 49 else 16,
            max_position_embeddings=CONTEXT,
        )
        return random_artifact(config, ("q4",)).artifact

    return made


class Pair:
    """The same program on rings and on caches that keep everything."""

    def __init__(self, folder: Path, window: int, cache: str):
        self.window, self.cache, self.folder = window, cache, folder
        self.ring = self.open()
        self.whole = self.open(grows=True)

    def open(self, *, grows: bool = False, window: int | None = None) -> OnnxRunner:
        portable = program_of(self.folder).cache

        def edit(model: Any) -> None:
            set_window(model, window or self.window)
            if grows:
                keep_everything(model, portable)

        name = f"w{window or self.window}{'whole' if grows else 'ring'}"
        return open_edited(self.folder, self.cache, name, edit, grows=grows, context_length=CONTEXT)


@pytest.fixture(scope="module", params=[(w, c) for w in WINDOWS for c in CACHES], ids=lambda p: f"{p[0]}-{p[1]}")
def pair(request: pytest.FixtureRequest, folder: Callable[[int], Path]) -> Pair:
    window, cache = request.param
    return Pair(folder(window), window, cache)


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([count, seed]).integers(3, 131, count).tolist()


def greedy(runner: Runner, logits: np.ndarray, steps: int) -> np.ndarray:
    """The logits [steps + 1, V] of a greedy continuation."""
    seen = [logits[0]]
    for _ in range(steps):
        seen.append(runner.decode([int(seen[-1].argmax())])[0])
    return np.stack(seen)


def same(label: str, got: np.ndarray, want: np.ndarray) -> None:
    wrong = (got != want).any(-1).sum()
    print(f"{label}: {wrong} of {len(want)} positions differ")
    assert wrong == 0


def contexts(window: int) -> list[int]:
    ring = ring_positions(window)
    return [window - 1, window, window + 1, ring - 1, ring, ring + 1, 700]


@shows("ours-own", "window", "chunks", "states", family="lfm3", scheme="q4")
def test_64_tokens_in_chunks_of_any_size_after_a_reset_from_a_snapshot_and_after_a_rewind(pair: Pair) -> None:
    ring, whole, other = pair.ring, pair.whole, pair.open()
    for context in contexts(pair.window):
        ids = tokens(context)
        steps = STEPS if context in (pair.window + 1, 700) else 8
        whole.reset()
        want = greedy(whole, whole.prefill([ids]), steps)
        for chunk in (512, 100, 17, 7):
            ring.reset()
            logits = ring.prefill([ids], chunk_size=chunk)
            mark, snapshot = ring.mark(), ring.snapshot()
            same(f"{context} in chunks of {chunk}", greedy(ring, logits, steps), want)
        ring.prefill([tokens(150)])  # over everything that the ring held
        ring.rewind(mark)
        same(f"{context} after a rewind", greedy(ring, logits, steps), want)
        other.prefill([tokens(40, seed=1)])
        other.restore(snapshot)
        same(f"{context} from a snapshot", greedy(other, logits, steps), want)


def test_one_token_at_a_time_and_up_to_the_last_position(pair: Pair) -> None:
    ids = tokens(CONTEXT)
    pair.whole.reset()
    pair.ring.reset()
    want = pair.whole.prefill_scored([ids])[0]
    got = pair.ring.prefill_scored([ids[:-90]], chunk_size=300)[0]
    steps = np.stack([pair.ring.decode([token])[0] for token in ids[-90:]])
    same("up to the last position", np.concatenate([got, steps]), want)


def test_rejected_drafts_leave_no_trace(pair: Pair) -> None:
    """Blocks that the ring has room for, and longer ones."""
    ring, whole = pair.ring, pair.whole
    for context in (pair.window + 1, ring_positions(pair.window) + 7):
        ids, after = tokens(context), tokens(3, seed=2)
        for block in (1, 5, RING_ROOM, RING_ROOM + 1, 65):
            draft = tokens(block, seed=3)
            for kept in {0, 1, block // 2, block}:
                whole.reset()
                whole.prefill([ids])
                want = whole.prefill_scored([draft[:kept] + after])[0]
                ring.reset()
                ring.prefill([ids])
                scores = ring.verify(draft)
                ring.accept(kept)
                got = np.concatenate([scores[:kept], ring.prefill_scored([after])[0]])
                assert (got == want).all(), (context, block, kept)


def test_many_blocks_in_a_row_with_marks_between(pair: Pair) -> None:
    ring, whole, rng = pair.ring, pair.whole, np.random.default_rng(1)
    ids = tokens(pair.window + 3)
    ring.reset()
    ring.prefill([ids])
    mark = ring.mark()
    for turn in range(12):
        draft = tokens(int(rng.integers(1, RING_ROOM + 1)), seed=turn)
        kept = int(rng.integers(0, len(draft) + 1))
        ring.verify(draft)
        ring.accept(kept)
        ids += draft[:kept]
    got = ring.decode([7])
    whole.reset()
    whole.prefill([ids])
    same("after twelve blocks", got, whole.decode([7]))
    ring.rewind(mark)
    whole.reset()
    whole.prefill([ids[: pair.window + 3]])
    same("back before them", ring.decode([7]), whole.decode([7]))


@shows("ours-own", "window", "rows", family="lfm3", scheme="q4")
def test_rows_of_different_length_and_their_order(pair: Pair) -> None:
    window = pair.window
    rows = [tokens(n) for n in (window - 1, 3, ring_positions(window) + 20, window + 1)]
    more = [tokens(n, seed=1) for n in (1, 400, 17, 2)]
    found = []
    for runner in (pair.ring, pair.whole):
        runner.reset(len(rows))
        seen = [runner.prefill(rows)]
        seen += [runner.decode([9, 8, 7, step]) for step in range(5)]
        seen.append(runner.prefill(more))
        runner.reorder([2, 0, 0, 1, 3])
        seen += [runner.decode([step, 8, 7, 9, 10]) for step in range(3)]
        found.append(np.concatenate(seen))
    same("rows beside each other", *found)
    pair.ring.reset()
    pair.ring.prefill([rows[1]])
    alone = np.concatenate([pair.ring.decode([8]) for _ in range(5)])
    same("and alone", alone, found[0][5:24:4])


@shows("onnxruntime-own", "window", "padding", family="lfm3", scheme="q4")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("role", [variants.LFM2, variants.LFM2_KV8])
def test_padded_rows_that_are_longer_than_a_ring(random_artifact: Callable[..., Any], side: str, role: str) -> None:
    """Driven by onnxruntime alone, as transformers pads: layers that slide alone, for full ones sum slots in groups."""
    config = tiny_config("lfm3", layer_types=["sliding_attention", "conv"] * 2, num_hidden_layers=4, sliding_window=16)
    graph = Graph(random_artifact(config, ("q4",)).artifact, "q4", role)
    lengths, steps = (150, 40, 1, 70), 20
    rows = [np.array(tokens(length + steps)) for length in lengths]
    expected = [graph.alone(row) for row in rows]
    ids, mask = pad([row[:length] for row, length in zip(rows, lengths, strict=True)], side)
    logits, state = graph(ids, mask, graph.empty(len(rows)))
    pairs = [(logits[b, 0], expected[b][length - 1]) for b, length in enumerate(lengths)]
    for step in range(steps):
        mask = np.concatenate([mask, np.ones((len(rows), 1), mask.dtype)], axis=1)
        ids = np.array([[row[length + step]] for row, length in zip(rows, lengths, strict=True)])
        logits, state = graph(ids, mask, state)
        pairs += [(logits[b, 0], expected[b][length + step]) for b, length in enumerate(lengths)]
    errors = np.array([np.abs(got - want).max() / np.ptp(want) for got, want in pairs])
    wrong = np.array([np.abs(a[0] - b[1]).max() / np.ptp(b[1]) for a, b in itertools.pairwise(pairs)])  # the control
    print(f"{side} {role}: of the spread {errors.max():.1e}; of other rows' logits at least {wrong.min():.1e}")
    assert errors.max() <= PADDED[side]
    assert wrong.min() > 2 * PADDED["left"]


def test_a_prefill_that_fails_on_the_way_leaves_the_rings_as_they_were(pair: Pair, monkeypatch) -> None:
    ids, ring = tokens(pair.window + 30), pair.ring
    ring.reset()
    ring.prefill([ids])
    original, calls = ort.InferenceSession.run_with_iobinding, []

    def failing(self: Any, binding: Any, options: Any = None) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no memory left")
        original(self, binding, options)

    with monkeypatch.context() as patch:
        patch.setattr(ort.InferenceSession, "run_with_iobinding", failing)
        with pytest.raises(ResourceError):
            ring.prefill([tokens(400)], chunk_size=150)
    assert len(calls) == 3
    pair.whole.reset()
    pair.whole.prefill([ids])
    same("after a failure", ring.decode([5]), pair.whole.decode([5]))


@shows("ours-own", "window", family="lfm3", scheme="q4")
def test_what_a_sliding_layer_keeps_does_not_grow(pair: Pair) -> None:
    row = 32 + 4 if pair.cache == "int8" else 32 * 4
    ring = 320 if pair.window == 256 else 64  # the window but one, and 16, in steps of 64
    sizes = {}
    for count in (1, CONTEXT):
        pair.ring.reset()
        pair.ring.prefill([tokens(count)])
        tensors = pair.ring.snapshot().tensors
        sizes[count] = sum(tensors[t.past_name].nbytes for t in pair.ring.cache.bounded)
    assert sizes[1] == sizes[CONTEXT] == 2 * 2 * 2 * ring * row  # 2 layers, keys and values, 2 heads
    held, whole = pair.ring.cache.state_bytes(CONTEXT), pair.whole.cache.state_bytes(CONTEXT)
    print(f"{held:,} bytes at {CONTEXT} positions, {whole:,} where sliding layers keep everything")
    assert whole - held == 2 * 2 * 2 * (CONTEXT - ring) * row


def test_a_window_that_is_off_by_one_is_noticed(folder: Callable[[int], Path]) -> None:
    """The control: graphs with one more and one less."""
    pair = Pair(folder(16), 16, "float")
    ids, wrong = tokens(200), {}
    want = pair.whole.prefill_scored([ids])[0]
    for window in (15, 16, 17):
        got = pair.open(window=window).prefill_scored([ids])[0]
        wrong[window] = int((got != want).any(-1).sum())
    print(wrong)
    assert wrong[16] == 0
    assert min(wrong[15], wrong[17]) > 150


def test_taking_back_more_than_there_is_room_for_is_noticed(folder: Callable[[int], Path], monkeypatch) -> None:
    """The control of rejected drafts: without going back and appending again."""
    pair = Pair(folder(16), 16, "float")
    monkeypatch.setattr(onnx_runner, "RING_ROOM", 1000)
    for runner in (pair.ring, pair.whole):
        runner.prefill([tokens(100)])
        runner.verify(tokens(60, seed=1))
        runner.accept(2)
    assert (pair.ring.decode([5]) != pair.whole.decode([5])).any()


def test_an_artifact_from_before_still_runs(folder: Callable[[int], Path], tmp_path: Path) -> None:
    """Its manifest says nothing of rings, its graphs neither."""
    new = folder(16)
    old = tmp_path / "old"
    old.mkdir()
    (old / "onnx").mkdir()
    for path in new.rglob("*"):
        if path.is_file() and not path.name.startswith("w"):
            (old / path.relative_to(new)).write_bytes(path.read_bytes())
    manifest = Manifest.from_json((old / MANIFEST).read_text(encoding="utf-8"))
    (program,) = manifest.programs
    files = dict(program.files)
    for role in (variants.LFM2, variants.LFM2_SCORING, variants.LFM2_KV8, variants.LFM2_KV8_SCORING):
        edited = write_edited(old, program, role, "old", lambda model: keep_everything(model, program.cache))
        path = edited.replace(old / program.graphs[role])
        files[program.graphs[role]] = FileEntry(bytes=path.stat().st_size, sha256=sha256_file(path))
    before = json.loads(replace(manifest, programs=(replace(program, files=files),)).to_json())
    assert before["programs"][0].pop("own_cache")
    (old / MANIFEST).write_text(json.dumps(before), encoding="utf-8")
    assert Artifact.open(old).program("onnx", "q4").own_cache is None
    ids = tokens(200)
    for cache in CACHES:
        runners = [lfm2_export.load_runner(path, kernels="lfm2", kv_cache=cache, threads=1) for path in (old, new)]
        assert [bool(runner.cache.bounded) for runner in runners] == [False, True]
        whole, ring = (runner.prefill_scored([ids], chunk_size=90)[0] for runner in runners)
        same(f"an older artifact, {cache}", ring, whole)
        with pytest.raises(RunnerError, match="a state only fits the program that made it"):
            runners[0].restore(runners[1].snapshot())


def test_inspect_states_the_state_of_both(folder: Callable[[int], Path], capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = inspect(folder(256))["programs"]
    spared = 2 * 2 * 2 * (LONG_CONTEXT - ring_positions(256)) * 32 * 4
    assert program["state_bytes_at_32k"] - program["state_bytes_at_32k_rings"] == spared
    assert cli.main(["inspect", str(folder(256))]) == 0
    said = capsys.readouterr().out
    print(said)
    assert "onnx q4: state at 32k of context: 50.3 MB, 17.1 MB on our operators" in said
