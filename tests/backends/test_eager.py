"""EagerRunner against one cacheless forward per row: whatever was appended, and however, the row is its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lfm2_export.backends.base import Runner, Snapshot
from lfm2_export.backends.eager import EagerRunner
from lfm2_export.errors import ContextLimitError, RunnerError
from lfm2_export.models.decoder import DecoderForCausalLM
from tests.checkpoints import tiny_config
from tests.models.reference import TOLERANCE, our_model, perturbed

CONFIGS: dict[str, dict[str, Any]] = {
    "lfm2": tiny_config("lfm2", conv_L_cache=4),
    "lfm2_moe": tiny_config("lfm2_moe", conv_bias=True),
    "no_attention": tiny_config("lfm2", layer_types=["conv"] * 5),
    "no_conv": tiny_config("lfm2_moe", layer_types=["full_attention"] * 5),
}
MODELS = {name: our_model(raw) for name, raw in CONFIGS.items()}
PROMPTS = [[5, 9, 3, 77, 21, 8, 1], [4], [130, 0, 2, 2]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> DecoderForCausalLM:
    return MODELS[request.param]


@pytest.fixture
def runner(model: DecoderForCausalLM) -> EagerRunner:
    return EagerRunner(model)


def direct(model: DecoderForCausalLM, tokens: list[int]) -> np.ndarray:
    """float32 [T, V] of one row without a cache."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()


def check(model: DecoderForCausalLM, logits_BV: np.ndarray, rows: list[list[int]]) -> None:
    assert logits_BV.dtype == np.float32
    assert logits_BV.shape == (len(rows), 131)
    errors = [float(np.abs(found - direct(model, row)[-1]).max()) for found, row in zip(logits_BV, rows, strict=True)]
    print("errors per row:", " ".join(f"{error:.1e}" for error in errors))
    assert max(errors) < TOLERANCE


def appended(rows: list[list[int]], *new: list[int]) -> list[list[int]]:
    return [row + more for row, more in zip(rows, new, strict=True)]


def test_it_is_a_runner(runner: EagerRunner) -> None:
    assert isinstance(runner, Runner)
    assert (runner.vocab_size, runner.context_length, runner.batch_size) == (131, 512, 1)
    assert (runner.max_batch_size, runner.can_score) == (None, True)


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
def test_ragged_rows_prefill_and_decode(model: DecoderForCausalLM, runner: EagerRunner, chunk_size: int | None) -> None:
    rows = PROMPTS
    runner.reset(3)
    check(model, runner.prefill(rows, chunk_size=chunk_size), rows)
    for step in range(3):
        check(model, runner.decode(np.array([step, 50, 7])), rows := appended(rows, [step], [50], [7]))
    more = [[1, 2], [3, 4, 5, 6, 7], [8]]
    check(model, runner.prefill(more, chunk_size=chunk_size), rows := appended(rows, *more))
    assert runner.lengths.tolist() == [len(row) for row in rows]


def test_the_check_can_fail(model: DecoderForCausalLM) -> None:
    last = "model.layers.4.feed_forward." + ("w2.weight" if model.config.model_type == "lfm2" else "gate.weight")
    wrong = EagerRunner(perturbed(model, last, 5.0))
    with pytest.raises(AssertionError):
        check(model, wrong.prefill(PROMPTS[:1]), PROMPTS[:1])


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_scores_of_every_position(model: DecoderForCausalLM, runner: EagerRunner, chunk_size: int | None) -> None:
    runner.reset(3)
    first = runner.prefill_scored(PROMPTS, chunk_size=chunk_size)
    more = [[1, 2], [3, 4, 5], [6]]
    second = runner.prefill_scored(more, chunk_size=chunk_size)
    for row, prompt in enumerate(PROMPTS):
        found = np.concatenate([first[row], second[row]])
        np.testing.assert_allclose(found, direct(model, prompt + more[row]), atol=TOLERANCE, rtol=0)
    before = runner.snapshot()
    scored = runner.score([[1, 2, 3], [9, 8, 7]], chunk_size=chunk_size)
    assert (scored.shape, scored.dtype) == ((2, 3, 131), np.float32)
    np.testing.assert_allclose(scored[1], direct(model, [9, 8, 7]), atol=TOLERANCE, rtol=0)
    assert_same(before, runner.snapshot())


def assert_same(left: Snapshot, right: Snapshot) -> None:
    assert left.lengths.tolist() == right.lengths.tolist()
    assert left.tensors.keys() == right.tensors.keys()
    for name, tensor in left.tensors.items():
        np.testing.assert_array_equal(tensor, right.tensors[name])


def test_reset_forgets(model: DecoderForCausalLM, runner: EagerRunner) -> None:
    runner.prefill(PROMPTS[:1])
    runner.reset()
    check(model, runner.prefill(PROMPTS[2:]), PROMPTS[2:])
    runner.reset(2)
    assert runner.lengths.tolist() == [0, 0]


def test_snapshots_restore_any_number_of_times_and_in_another_runner(
    model: DecoderForCausalLM, runner: EagerRunner
) -> None:
    runner.reset(3)
    runner.prefill(PROMPTS)
    snapshot = runner.snapshot()
    for spec in runner.cache.tensors:
        tensor = snapshot.tensors[spec.past_name]
        assert tensor.shape == spec.concrete_shape(3, 7)
        assert tensor.dtype == spec.dtype
    runner.decode([1, 2, 3])
    runner.reset()
    other = EagerRunner(model)
    for target in (runner, other, runner):
        target.restore(snapshot)
        assert target.lengths.tolist() == [7, 1, 4]
        check(model, target.decode([4, 5, 6]), appended(PROMPTS, [4], [5], [6]))
    assert snapshot.lengths.tolist() == [7, 1, 4]


def test_marks_rewind_until_the_state_is_replaced(model: DecoderForCausalLM, runner: EagerRunner) -> None:
    runner.prefill(PROMPTS[:1])
    mark = runner.mark()
    assert mark.lengths.tolist() == [7]
    assert mark.conv.keys() == {t.past_name for t in runner.cache.conv}
    runner.decode([3])
    later = runner.mark()
    runner.prefill([[1, 2, 3]])
    for _ in range(2):
        runner.rewind(mark)
        check(model, runner.prefill([[9, 9]]), [[*PROMPTS[0], 9, 9]])
    assert runner.is_valid(mark)
    assert not runner.is_valid(later)
    runner.reset()
    with pytest.raises(RunnerError, match="this mark is of a state that is no more"):
        runner.rewind(mark)


def test_reorder_copies_rows(model: DecoderForCausalLM, runner: EagerRunner) -> None:
    runner.reset(3)
    runner.prefill(PROMPTS)
    mark = runner.mark()
    runner.reorder([0, 1, 2])
    assert runner.is_valid(mark)
    runner.reorder([2, 0, 0, 1])
    assert not runner.is_valid(mark)
    rows = [PROMPTS[2], PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    check(model, runner.decode([1, 2, 3, 4]), appended(rows, [1], [2], [3], [4]))


def test_a_refused_call_leaves_the_state_as_it_was(model: DecoderForCausalLM) -> None:
    runner = EagerRunner(model, context_length=9)
    runner.reset(2)
    runner.prefill([PROMPTS[0], PROMPTS[2]])
    before = runner.snapshot()
    stranger = Snapshot(program_id="another", lengths=before.lengths, tensors=before.tensors)
    calls: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: runner.prefill([[1, 2, 3], [1]]), ContextLimitError, "row 0: 3 tokens after 7 held do not fit"),
        (lambda: runner.prefill([[1]]), RunnerError, "1 rows of tokens for a state of 2"),
        (lambda: runner.prefill([[1], []]), RunnerError, "row 1 is empty"),
        (lambda: runner.prefill([[1], [131]]), RunnerError, "row 1: token id 131 is not in the vocabulary of 131"),
        (lambda: runner.prefill([[1], [2]], chunk_size=0), RunnerError, "chunk_size=0: a prefill takes at least one"),
        (lambda: runner.decode([[1], [2]]), RunnerError, "decode takes one token per row"),
        (lambda: runner.decode([1, -1]), RunnerError, "row 1: token id -1 is not in the vocabulary"),
        (lambda: runner.score([[1, 2], [1]]), RunnerError, "score takes rows of one length"),
        (lambda: runner.score([[1] * 10]), ContextLimitError, "row 0: 10 tokens do not fit the context limit of 9"),
        (lambda: runner.restore(stranger), RunnerError, "snapshot of program another, but this runner has eager-"),
        (lambda: runner.reorder([2]), RunnerError, "reorder: rows \\[2\\] of a state that has 2"),
        (lambda: runner.reset(0), RunnerError, "batch_size=0: a state needs at least one row"),
    ]
    for call, kind, text in calls:
        with pytest.raises(kind, match=text):
            call()
        assert_same(before, runner.snapshot())


def test_an_interrupt_between_rows_leaves_the_state_as_it_was(
    model: DecoderForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = EagerRunner(model)
    runner.reset(2)
    runner.prefill([[1, 2], [3]])
    before, calls = runner.snapshot(), []
    forward = model.forward

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.decode([4, 5])
    monkeypatch.undo()
    assert_same(before, runner.snapshot())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_states_of_half_precision_survive_a_snapshot(dtype: torch.dtype) -> None:
    model = our_model(CONFIGS["lfm2_moe"]).to(dtype)
    runner = EagerRunner(model)
    runner.prefill(PROMPTS[:1])
    snapshot = runner.snapshot()
    expected = runner.decode([3])
    runner.restore(snapshot)
    np.testing.assert_array_equal(runner.decode([3]), expected)


def test_program_ids_tell_weights_configs_and_dtypes_apart() -> None:
    model = MODELS["lfm2"]
    changed = perturbed(model, "model.layers.2.conv.in_proj.weight", 1e-3)
    raw = CONFIGS["lfm2"] | {"rope_theta": 10.0}
    others = [changed, our_model(raw), our_model(CONFIGS["lfm2"]).to(torch.bfloat16)]
    ids = [EagerRunner(m).program_id for m in (model, our_model(CONFIGS["lfm2"]), *others)]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 4
    assert EagerRunner(model, program_id="mine").program_id == "mine"


def test_a_config_that_wants_no_cache_changes_nothing_here() -> None:
    raw = tiny_config("lfm2", use_cache=False, output_attentions=True)
    model = our_model(raw)
    runner = EagerRunner(model)
    runner.prefill([[1, 2, 3]])
    check(model, runner.decode([4]), [[1, 2, 3, 4]])
