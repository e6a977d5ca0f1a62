"""OnnxRunner against a graph small enough to be written here: one conv layer, one attention layer, the contract's I/O.

The reference feeds one token at a time through plain ``session.run`` with state tensors that grow by copying, row by
row: nothing of the runner's padding, chunking, in-place binding or growth takes part in it.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from weakref import WeakSet

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from lfm2_export.backends.base import Runner
from lfm2_export.backends.onnx import session
from lfm2_export.backends.onnx.runner import OnnxRunner
from lfm2_export.cache import CacheSpec, StateTensor
from lfm2_export.errors import ArtifactError, ContextLimitError, ResourceError, RunnerError

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH, CONTEXT = 50, 32, 2, 1, 16, 3, 200


def state_tensor(layer: int, kind: str, past: str, present: str, shape: tuple) -> StateTensor:
    return StateTensor(layer=layer, kind=kind, past_name=past, present_name=present, shape=shape, dtype="float32")


KV_SHAPE = ("batch_size", KV_HEADS, "past_sequence_length", HEAD_DIM)
SPEC = CacheSpec(
    tensors=(
        state_tensor(0, "conv", "past_conv.0", "present_conv.0", ("batch_size", WIDTH - 1, HIDDEN)),
        state_tensor(1, "key", "past_key_values.1.key", "present.1.key", KV_SHAPE),
        state_tensor(1, "value", "past_key_values.1.value", "present.1.value", KV_SHAPE),
    )
)


class Graph:
    """Collects nodes and constants; each call returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def const(self, value: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def ints(self, *values: int) -> str:
        return self.const(np.array(values, dtype=np.int64))

    def op(self, kind: str, *inputs: str, out: str | None = None, domain: str = "", **attributes) -> str:
        name = out or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], domain=domain, **attributes))
        return name


def tiny_graph(*, every_position: bool = False, seed: int = 0) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    g = Graph()

    def weight(*shape: int) -> str:
        return g.const((rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32))

    # Attended tokens among the new ones: right padding is possible in a prefill only.
    steps = g.op("Shape", "input_ids", start=1, end=2)
    new_mask = g.op("Slice", "attention_mask", g.op("Neg", steps), g.ints(2**31), g.ints(1))
    single = g.op("Equal", steps, g.ints(1))
    counts = g.op("Where", single, g.ints(1), g.op("ReduceSum", new_mask, g.ints(1), keepdims=0))  # [B]

    x = g.op("Gather", g.const(rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32)), "input_ids")

    # Layer 0: causal conv; its new state is the last L-1 attended inputs of each row.
    padded = g.op("Concat", "past_conv.0", x, axis=1)
    taps = []
    for tap in range(WIDTH):
        end = g.op("Add", steps, g.ints(tap))
        taps.append(g.op("Mul", g.op("Slice", padded, g.ints(tap), end, g.ints(1)), weight(HIDDEN)))
    x = g.op("Add", x, g.op("Sum", *taps))
    index = g.op("Add", g.op("Unsqueeze", counts, g.ints(1)), g.const(np.arange(WIDTH - 1, dtype=np.int64)[None]))
    g.op("GatherND", padded, g.op("Unsqueeze", index, g.ints(2)), batch_dims=1, out="present_conv.0")

    # Layer 1: attention with RoPE.
    positions = np.arange(CONTEXT)[:, None] / 10000.0 ** (np.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)
    seqlens = g.op("Cast", g.op("Sub", g.op("ReduceSum", "attention_mask", g.ints(1), keepdims=0), g.ints(1)), to=6)
    total = g.op("Cast", g.op("Squeeze", g.op("Shape", "attention_mask", start=1, end=2)), to=6)
    q, k, v = (g.op("MatMul", x, weight(HIDDEN, n * HEAD_DIM)) for n in (HEADS, KV_HEADS, KV_HEADS))
    inputs = [q, k, v, "past_key_values.1.key", "past_key_values.1.value", seqlens, total]
    inputs += [g.const(np.cos(positions).astype(np.float32)), g.const(np.sin(positions).astype(np.float32))]
    attended = helper.make_node(
        "GroupQueryAttention",
        inputs,
        ["attended", "present.1.key", "present.1.value"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
        do_rotary=1,
    )
    g.nodes.append(attended)
    x = g.op("Add", x, g.op("MatMul", "attended", weight(HIDDEN, HIDDEN)))
    if not every_position:
        last = g.op("Unsqueeze", g.op("Sub", counts, g.ints(1)), g.ints(1))
        x = g.op("Unsqueeze", g.op("GatherND", x, last, batch_dims=1), g.ints(1))
    g.op("MatMul", x, weight(HIDDEN, VOCAB), out="logits")

    def value(name: str, kind: int, shape: tuple) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    steps_out: int | str = "sequence_length" if every_position else 1
    graph = helper.make_graph(
        g.nodes,
        "tiny",
        [
            value("input_ids", TensorProto.INT64, ("batch_size", "sequence_length")),
            value("attention_mask", TensorProto.INT64, ("batch_size", "total_sequence_length")),
            *(value(t.past_name, TensorProto.FLOAT, t.shape) for t in SPEC.tensors),
        ],
        [
            value("logits", TensorProto.FLOAT, ("batch_size", steps_out, VOCAB)),
            *(value(t.present_name, TensorProto.FLOAT, t.present_shape) for t in SPEC.tensors),
        ],
        g.constants,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program")
    onnx.save(tiny_graph(), path / "model.onnx")
    onnx.save(tiny_graph(every_position=True), path / "scoring.onnx")
    onnx.save(tiny_graph(seed=1), path / "other.onnx")
    return path


def make_runner(folder: Path, name: str = "model.onnx", **options) -> OnnxRunner:
    options = {"scoring_path": folder / "scoring.onnx", "context_length": CONTEXT, "threads": 1} | options
    return OnnxRunner(folder / name, cache=SPEC, **options)


@pytest.fixture
def runner(folder: Path) -> OnnxRunner:
    return make_runner(folder)


@pytest.fixture(scope="module")
def reference(folder: Path):
    """Logits [T, V] after each token of one row, by plain runs of one token."""
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def logits(tokens: list[int]) -> np.ndarray:
        state, out = SPEC.zeros(1), []
        for held, token in enumerate(tokens):
            feeds = {
                "input_ids": np.array([[token]]),
                "attention_mask": np.ones((1, held + 1), dtype=np.int64),
            }
            values = session.run(None, feeds | state)
            out.append(values[0][0, 0])
            state = dict(zip(state, values[1:], strict=True))
        return np.stack(out)

    return logits


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_runner_follows_the_protocol(runner):
    assert isinstance(runner, Runner)
    assert (runner.vocab_size, runner.context_length, runner.batch_size) == (VOCAB, CONTEXT, 1)
    assert runner.lengths.tolist() == [0]


@pytest.mark.parametrize("chunk_size", [None, 1, 5, 7, 64])
def test_prefill_then_decode_equals_one_token_at_a_time(runner, reference, chunk_size):
    tokens = prompt(40)
    expected = reference(tokens)
    assert_close(runner.prefill([tokens[:23]], chunk_size=chunk_size)[0], expected[22])
    for position in range(23, 40):
        assert_close(runner.decode([tokens[position]])[0], expected[position])
    assert runner.lengths.tolist() == [40]


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_rows_of_different_length_equal_each_row_alone(runner, reference, chunk_size):
    rows = [prompt(length, seed) for seed, length in enumerate((3, 20, 1, 11))]
    tails = [prompt(70, 10 + seed) for seed in range(4)]
    expected = [reference(row + tail) for row, tail in zip(rows, tails, strict=True)]
    runner.reset(4)
    assert_close(
        runner.prefill(rows, chunk_size=chunk_size),
        np.stack([e[len(r) - 1] for e, r in zip(expected, rows, strict=False)]),
    )
    for step in range(70):  # beyond CAPACITY_STEP: the buffers grow on the way
        found = runner.decode([tail[step] for tail in tails])
        assert_close(found, np.stack([e[len(r) + step] for e, r in zip(expected, rows, strict=False)]))


def test_second_prefill_appends_to_every_row(runner, reference):
    rows, more = [prompt(5, 1), prompt(9, 2)], [prompt(12, 3), prompt(2, 4)]
    runner.reset(2)
    runner.prefill(rows)
    found = runner.prefill(more)
    assert_close(found, np.stack([reference(a + b)[-1] for a, b in zip(rows, more, strict=True)]))
    assert runner.lengths.tolist() == [17, 11]


def test_logits_of_one_call_are_not_overwritten_by_the_next(runner):
    first = runner.prefill([prompt(4)])
    kept = first.copy()
    runner.decode([1])
    np.testing.assert_array_equal(first, kept)


def test_the_last_position_of_the_context_works_and_the_next_is_refused(runner, reference):
    tokens = prompt(CONTEXT)
    expected = reference(tokens)
    runner.prefill([tokens[:-1]])
    assert_close(runner.decode([tokens[-1]])[0], expected[-1])
    with pytest.raises(
        ContextLimitError, match=rf"1 tokens after {CONTEXT} held do not fit the context limit of {CONTEXT}"
    ):
        runner.decode([1])
    assert runner.lengths.tolist() == [CONTEXT]


def test_a_prompt_as_long_as_the_context_works_and_a_longer_one_is_refused(runner, reference):
    tokens = prompt(CONTEXT)
    with pytest.raises(ContextLimitError, match=r"201 tokens do not fit the context limit of 200; shorten"):
        runner.prefill([[*tokens, 1]])
    assert runner.lengths.tolist() == [0]
    assert_close(runner.prefill([tokens])[0], reference(tokens)[-1])


def test_reset_forgets(runner, reference):
    runner.prefill([prompt(30, 5)])
    runner.reset()
    tokens = prompt(6, 6)
    assert_close(runner.prefill([tokens])[0], reference(tokens)[-1])


def test_snapshot_is_restored_any_number_of_times_and_into_another_runner(folder, runner, reference):
    start, tail = prompt(8, 1), prompt(100, 2)
    expected = reference(start + tail)
    runner.prefill([start])
    snapshot = runner.snapshot()
    runner.prefill([prompt(90, 3)])
    for target in (runner, runner, make_runner(folder, context_length=150)):
        target.restore(snapshot)
        assert target.lengths.tolist() == [8]
        assert_close(target.prefill([tail])[0], expected[-1])


def test_snapshot_keeps_rows_and_their_lengths(runner, reference):
    rows = [prompt(3, 1), prompt(7, 2)]
    runner.reset(2)
    runner.prefill(rows)
    snapshot = runner.snapshot()
    runner.reset(1)
    runner.prefill([prompt(2)])
    runner.restore(snapshot)
    assert_close(runner.decode([4, 5]), np.stack([reference(rows[0] + [4])[-1], reference(rows[1] + [5])[-1]]))


def test_snapshot_of_another_program_is_refused(folder, runner):
    other = make_runner(folder, "other.onnx")
    other.prefill([[1, 2]])
    runner.prefill([[3]])
    with pytest.raises(RunnerError, match=r"snapshot of program other.onnx@.* but this runner has model.onnx@"):
        runner.restore(other.snapshot())
    assert runner.lengths.tolist() == [1]


def test_snapshot_longer_than_the_context_is_refused(folder, runner):
    runner.prefill([prompt(60)])
    with pytest.raises(ContextLimitError, match=r"60 tokens do not fit the context limit of 50"):
        make_runner(folder, context_length=50).restore(runner.snapshot())


def test_rewind_to_a_mark(runner, reference):
    start, first, second = prompt(9, 1), prompt(80, 2), prompt(5, 3)
    runner.prefill([start])
    mark = runner.mark()
    runner.prefill([first])
    late = runner.mark()
    runner.rewind(mark)
    assert_close(runner.prefill([second])[0], reference(start + second)[-1])
    assert runner.is_valid(mark)
    assert not runner.is_valid(late)
    with pytest.raises(RunnerError, match=r"state that is no more"):
        runner.rewind(late)


@pytest.mark.parametrize("change", ["reset", "restore", "reorder"])
def test_marks_die_with_their_state(runner, change):
    runner.reset(2)
    runner.prefill([[1], [2]])
    mark, snapshot = runner.mark(), runner.snapshot()
    {
        "reset": lambda: runner.reset(2),
        "restore": lambda: runner.restore(snapshot),
        "reorder": lambda: runner.reorder([1, 0]),
    }[change]()
    assert not runner.is_valid(mark)


def test_reorder_copies_rows_without_aliasing(runner, reference):
    rows = [prompt(4, 1), prompt(10, 2)]
    runner.reset(2)
    runner.prefill(rows)
    runner.reorder([1, 0, 1])  # repeated rows must go their own ways from here on
    steps = [[7, 8, 9], [10, 11, 12]]
    runner.decode(steps[0])
    found = runner.decode(steps[1])
    histories = [rows[1] + [7, 10], rows[0] + [8, 11], rows[1] + [9, 12]]
    assert_close(found, np.stack([reference(h)[-1] for h in histories]))


def test_reorder_drops_rows(runner, reference):
    rows = [prompt(4, 1), prompt(10, 2), prompt(6, 3)]
    runner.reset(3)
    runner.prefill(rows)
    runner.reorder([2])
    assert_close(runner.decode([3]), reference(rows[2] + [3])[-1:])


@pytest.mark.parametrize("indices", [[], [2], [-1, 0], [[0]], [0.5]])
def test_reorder_refuses_rows_that_do_not_exist(runner, indices):
    runner.reset(2)
    with pytest.raises(RunnerError, match=r"reorder"):
        runner.reorder(indices)


@pytest.mark.parametrize("chunk_size", [None, 6])
def test_score_gives_every_position_and_leaves_the_state_alone(runner, reference, chunk_size):
    runner.prefill([prompt(5, 9)])
    mark = runner.mark()
    rows = [prompt(14, 1), prompt(14, 2)]
    found = runner.score(rows, chunk_size=chunk_size)
    assert found.shape == (2, 14, VOCAB)
    assert found.dtype == np.float32
    assert_close(found, np.stack([reference(row) for row in rows]))
    assert runner.lengths.tolist() == [5]
    assert runner.is_valid(mark)
    assert_close(runner.decode([1])[0], reference([*prompt(5, 9), 1])[-1])


def test_prefill_scored_appends(runner, reference):
    rows, more = [prompt(5, 1), prompt(9, 2)], [prompt(12, 3), prompt(2, 4)]
    runner.reset(2)
    runner.prefill(rows)
    found = runner.prefill_scored(more, chunk_size=5)
    for row, tail, logits in zip(rows, more, found, strict=True):
        assert_close(logits, reference(row + tail)[len(row) :])
    assert runner.lengths.tolist() == [17, 11]


def test_scoring_needs_its_graph(folder):
    bare = make_runner(folder, scoring_path=None)
    assert not bare.can_score
    with pytest.raises(RunnerError, match=r"no scoring graph"):
        bare.score([[1]])


def test_a_failed_prefill_leaves_the_state_as_it_was(runner, reference, monkeypatch):
    start, tail = prompt(6, 1), prompt(4, 2)
    runner.prefill([start])
    calls = []
    original = ort.InferenceSession.run_with_iobinding

    def failing(self, binding, options=None):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no memory left")
        original(self, binding, options)

    with monkeypatch.context() as patch:
        patch.setattr(ort.InferenceSession, "run_with_iobinding", failing)
        with pytest.raises(ResourceError, match=r"the memory is too small for a run on 4 tokens; pass fewer rows"):
            runner.prefill([prompt(20, 3)], chunk_size=4)
    assert runner.lengths.tolist() == [6]
    assert_close(runner.prefill([tail])[0], reference(start + tail)[-1])


def test_buffers_outlive_their_python_names(runner, reference):
    """An OrtValue made from numpy points into the array: everything that is bound must stay referenced."""
    tokens = prompt(120)
    runner.prefill([tokens[:3]])
    for token in tokens[3:]:
        gc.collect(0)
        np.full(100_000, np.nan, dtype=np.float32)  # would land in freed buffers
        logits = runner.decode([token])
    assert_close(logits[0], reference(tokens)[-1])


def test_capacity_grows_geometrically_and_stops_at_the_context(runner):
    sizes = set()
    runner.prefill([[1]])
    for _ in range(CONTEXT - 1):
        runner.decode([1])
        sizes.add(runner.state_nbytes)
    assert len(sizes) == 3  # 64, 128, 200 positions
    assert max(sizes) <= SPEC.bytes_per_token() * CONTEXT + 2 * SPEC.fixed_bytes()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[]], "row 0 is empty"),
        ([[1, VOCAB]], f"token id {VOCAB} is not in the vocabulary of {VOCAB}"),
        ([[-1]], "token id -1"),
        ([[1.5]], "expected a list of token ids, found float64"),
        ([[1], [2]], r"2 rows of tokens for a state of 1; pass one per row or reset\(2\)"),
    ],
)
def test_bad_prompts_are_refused_before_anything_changes(runner, rows, message):
    runner.prefill([[1, 2]])
    with pytest.raises(RunnerError, match=message):
        runner.prefill(rows)
    assert runner.lengths.tolist() == [2]


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": -1}, {"threads": 10_000}, {"chunk_size": 0}])
def test_bad_options_are_refused(folder, options):
    with pytest.raises(RunnerError, match=next(iter(options))):
        make_runner(folder, **options)


def test_batch_size_zero_is_refused(runner):
    with pytest.raises(RunnerError, match=r"batch_size=0"):
        runner.reset(0)


def test_only_the_first_of_several_sessions_waits_awake(folder, monkeypatch):
    monkeypatch.setattr(session, "_open", WeakSet())
    first, second = (session.open_session(folder / "model.onnx", threads=2) for _ in range(2))
    assert [_stops_spinning(opened) for opened in (first, second)] == [False, True]
    del first, second
    gc.collect()
    assert not _stops_spinning(session.open_session(folder / "model.onnx", threads=2))


def _stops_spinning(opened: ort.InferenceSession) -> bool:
    try:
        return opened.get_session_options().get_session_config_entry("session.force_spinning_stop") == "1"
    except RuntimeError:  # nothing of the name was set
        return False


def test_a_missing_program_is_named(folder):
    with pytest.raises(ArtifactError, match=r"nothing.onnx: no such program"):
        make_runner(folder, "nothing.onnx")


def test_a_damaged_program_is_named(folder):
    (folder / "damaged.onnx").write_bytes((folder / "model.onnx").read_bytes()[:200])
    with pytest.raises(
        RunnerError, match=r"damaged.onnx: onnxruntime [\d.]+ cannot load it; the program .* is damaged"
    ):
        make_runner(folder, "damaged.onnx")


def test_an_operator_that_onnxruntime_lacks_is_reported_in_one_line(folder, monkeypatch):
    model = tiny_graph()
    next(n for n in model.graph.node if n.op_type == "GroupQueryAttention").op_type = "AttentionOfTomorrow"
    onnx.save(model, folder / "tomorrow.onnx")
    monkeypatch.setattr(ort, "__version__", "1.20.3")
    with pytest.raises(
        RunnerError, match=r"needs onnxruntime 1\.31 or newer: pip install -U .*AttentionOfTomorrow"
    ) as info:
        make_runner(folder, "tomorrow.onnx")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("change", [{"shape": ("batch_size", 2, 2**30)}, {"dtype": "float16"}])
def test_a_state_of_another_size_than_the_graphs_is_refused_before_it_is_made(folder, change):
    name = SPEC.tensors[0].past_name
    spec = CacheSpec(tensors=(replace(SPEC.tensors[0], **change), *SPEC.tensors[1:]))
    with pytest.raises(RunnerError, match=rf"model\.onnx: the graph's {name} is tensor\(float\) .*, the manifest"):
        OnnxRunner(folder / "model.onnx", cache=spec, context_length=CONTEXT)


def test_a_program_that_contradicts_its_cache_is_refused(folder):
    with pytest.raises(RunnerError, match=r"inputs differ .*left over: past_key_values.1.key, past_key_values.1.value"):
        OnnxRunner(folder / "model.onnx", cache=CacheSpec(tensors=SPEC.conv), context_length=CONTEXT)
