"""Every public method of every runner with every kind of wrong argument: one of our errors, and the state it had."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import lfm2_export
from lfm2_export import resources
from lfm2_export.backends.arguments import check_threads
from lfm2_export.backends.base import Mark, Runner, Snapshot
from lfm2_export.errors import ContextLimitError, Lfm2ExportError, ResourceError, RunnerError
from tests.checkpoints import tiny_config
from tests.models.reference import our_model

HELD = [5, 9, 3, 77]
CONTEXT = 96


class Raises:
    """Looks like a sequence and refuses to be one."""

    def __len__(self) -> int:
        raise AttributeError("no length here")

    def __iter__(self) -> Any:
        raise OSError("nothing to see")

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise LookupError("no array here")


class Miscounts(Raises):
    def __len__(self) -> int:
        return 1


def _torch() -> Any:
    import torch

    return torch.ones(1, 3, requires_grad=True)


# What a row, or a list of rows, cannot be.
NO_ROWS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "text": lambda: "abc",
    "bytes": lambda: b"abc",
    "integer": lambda: 7,
    "huge integer": lambda: 2**70,
    "float": lambda: 1.5,
    "nan": lambda: float("nan"),
    "true": lambda: True,
    "object": object,
    "generator": lambda: (row for row in [[1, 2]]),
    "mapping": lambda: {0: [1, 2]},
    "set": lambda: {1},
    "no rows": lambda: [],
    "a flat list": lambda: [1, 2, 3],
    "an empty row": lambda: [[]],
    "two rows": lambda: [[1], [2, 3]],
    "ragged": lambda: [[1, [2, 3]]],
    "nested": lambda: [[[1, 2]]],
    "floats": lambda: [[1.5, 2.0]],
    "not a number": lambda: [[float("nan")]],
    "infinite": lambda: [[float("inf")]],
    "words": lambda: [["a"]],
    "nothing": lambda: [[None]],
    "truth values": lambda: [[True, False]],
    "negative": lambda: [[-1]],
    "beyond the vocabulary": lambda: [[10**6]],
    "beyond 64 bits": lambda: [[2**70]],
    "beyond 63 bits": lambda: [[2**63]],
    "both ends": lambda: [[-1, 2**63]],
    "a billion": lambda: [range(10**9)],
    "more than memory": lambda: [range(10**15)],
    "a billion rows": lambda: range(10**9),
    "3-d array": lambda: np.zeros((1, 2, 3), np.int64),
    "0-d array": lambda: np.array(5),
    "empty array": lambda: np.zeros((0, 3), np.int64),
    "array of floats": lambda: np.ones((1, 2)),
    "array of objects": lambda: np.array([[1, None]], dtype=object),
    "array of complex": lambda: np.ones((1, 2), np.complex64),
    "array of times": lambda: np.zeros((1, 2), "datetime64[s]"),
    "array of records": lambda: np.zeros((1, 2), [("a", "i4")]),
    "tensor": _torch,
    "raises": Raises,
    "miscounts": Miscounts,
    "row that raises": lambda: [Raises()],
    "too long": lambda: [[1] * (CONTEXT + 1)],
}
NO_COUNT: dict[str, Any] = {
    "text": "2",
    "float": 2.0,
    "nan": float("nan"),
    "true": True,
    "numpy's true": np.True_,
    "list": [1],
    "array": np.array([1, 2]),
    "zero": 0,
    "negative": -(2**70),
}
NO_INDICES: dict[str, Any] = {
    "None": None,
    "text": "a",
    "integer": 0,
    "empty": [],
    "float": [0.0],
    "nan": [float("nan")],
    "true": [True],
    "2-d": [[0]],
    "ragged": [0, [0]],
    "negative": [-1],
    "beyond": [1],
    "beyond 64 bits": [2**70],
    "objects": np.array([None]),
    "generator": (i for i in [0]),
    "raises": Raises(),
}


def _eager(request: pytest.FixtureRequest) -> Runner:
    from lfm2_export.backends.eager import EagerRunner

    return EagerRunner(our_model(tiny_config("lfm2")), context_length=CONTEXT)


def _onnx(request: pytest.FixtureRequest) -> Runner:
    made = request.getfixturevalue("random_artifact")(tiny_config("lfm2", max_position_embeddings=CONTEXT))
    return lfm2_export.load_runner(made.artifact, threads=1)


def _executorch(request: pytest.FixtureRequest) -> Runner:
    pytest.importorskip("executorch")
    from tests.backends.executorch.programs import plain

    return plain().runner()


@pytest.fixture(scope="module", params=[_eager, _onnx, _executorch], ids=["eager", "onnx", "executorch"])
def loaded(request: pytest.FixtureRequest) -> Runner:
    return request.param(request)


@pytest.fixture
def runner(loaded: Runner) -> Runner:
    """Holds one row of four tokens."""
    loaded.reset()
    loaded.prefill([HELD])
    return loaded


def refused(runner: Runner, call: Callable[[], object], *kinds: type[Exception]) -> str:
    """The one line of an error of ours, after which the runner goes on as if nothing had been asked."""
    before, mark = runner.snapshot(), runner.mark()
    with pytest.raises(kinds or (RunnerError, ResourceError)) as caught:
        call()
    assert runner.lengths.tolist() == [len(HELD)]
    assert runner.is_valid(mark)
    after = runner.snapshot()
    for name, tensor in before.tensors.items():
        np.testing.assert_array_equal(after.tensors[name], tensor)
    message = str(caught.value)
    assert len(message) < 400
    assert message.isprintable()
    return message


@pytest.mark.parametrize("method", ["prefill", "prefill_scored", "score"])
def test_what_is_no_list_of_rows_is_refused(runner: Runner, method: str) -> None:
    for name, make in NO_ROWS.items():
        # Rows of one length are all that score asks for, and one row all that a .pte takes.
        if not (method == "score" and name == "two rows"):
            value = make()
            print(f"{name}:", refused(runner, lambda value=value: getattr(runner, method)(value)))


def test_score_takes_rows_of_one_length(runner: Runner) -> None:
    assert "rows of one length" in refused(runner, lambda: runner.score([[1], [2, 3]]))


def test_decode_takes_one_token_of_the_vocabulary_per_row(runner: Runner) -> None:
    for name, make in NO_ROWS.items():
        value = make()
        print(f"{name}:", refused(runner, lambda value=value: runner.decode(value)))


@pytest.mark.parametrize("method", ["prefill", "prefill_scored", "score"])
def test_chunks_have_at_least_one_token(runner: Runner, method: str) -> None:
    for name, size in NO_COUNT.items():
        message = refused(runner, lambda size=size: getattr(runner, method)([[1, 2]], chunk_size=size))
        assert "chunk_size=" in message, name


def test_chunks_of_any_size_from_one_up_are_taken(runner: Runner) -> None:
    expected = runner.score([[1, 2, 3, 4]])
    for size in (1, 3, np.int64(3), 2**70):
        np.testing.assert_allclose(runner.score([[1, 2, 3, 4]], chunk_size=size), expected, atol=1e-4)
        runner.reset()
        np.testing.assert_allclose(runner.prefill([[1, 2, 3, 4]], chunk_size=size), expected[:, -1], atol=1e-4)


def test_rows_are_counted(runner: Runner) -> None:
    for name, rows in {**NO_COUNT, "None": None}.items():
        assert "batch_size=" in refused(runner, lambda rows=rows: runner.reset(rows)), name


@pytest.mark.parametrize("rows", [10**12, np.int64(2**62), 2**70])
def test_more_rows_than_memory_holds_are_refused_before_any_is_made(runner: Runner, rows: int) -> None:
    message = refused(runner, lambda: runner.reset(rows))
    if runner.max_batch_size is None:
        assert f"a state of {rows} rows" in message
        assert "are available; pass fewer rows" in message
    else:
        assert "at most 1 rows at once" in message


def test_reorder_takes_numbers_of_rows(runner: Runner) -> None:
    for name, indices in NO_INDICES.items():
        assert refused(runner, lambda indices=indices: runner.reorder(indices)).startswith("reorder"), name


def changed(snapshot: Snapshot, what: str) -> Any:
    """A snapshot that no runner has made, or something else."""
    name, tensor = next(iter(snapshot.tensors.items()))
    others = {n: t for n, t in snapshot.tensors.items() if n != name}
    match what:
        case "lengths None":
            return replace(snapshot, lengths=None)
        case "lengths empty":
            return replace(snapshot, lengths=np.zeros(0, np.int64))
        case "lengths negative":
            return replace(snapshot, lengths=np.array([-1]))
        case "lengths 2-d":
            return replace(snapshot, lengths=np.array([[4]]))
        case "lengths float":
            return replace(snapshot, lengths=np.array([4.0]))
        case "lengths ragged":
            return replace(snapshot, lengths=[4, [4]])
        case "lengths beyond the context":
            return replace(snapshot, lengths=np.array([2**62]))
        case "lengths beyond 64 bits":
            return replace(snapshot, lengths=[2**70])
        case "lengths beyond what it holds":
            return replace(snapshot, lengths=np.array([len(HELD) + 1]))
        case "lengths of more rows":
            return replace(snapshot, lengths=np.array([4, 4]))
        case "program None":
            return replace(snapshot, program_id=None)
        case "program array":
            return replace(snapshot, program_id=np.array(["a", "b"]))
        case "program of another":
            return replace(snapshot, program_id="\x1b[2J" + "x" * 10_000)
        case "tensors None":
            return replace(snapshot, tensors=None)
        case "tensors list":
            return replace(snapshot, tensors=list(snapshot.tensors.values()))
        case "tensor missing":
            return replace(snapshot, tensors=others)
        case "tensor None":
            return replace(snapshot, tensors={**others, name: None})
        case "tensor list":
            return replace(snapshot, tensors={**others, name: tensor.tolist()})
        case "tensor of doubles":
            return replace(snapshot, tensors={**others, name: tensor.astype(np.float64)})
        case "tensor of objects":
            return replace(snapshot, tensors={**others, name: tensor.astype(object)})
        case "tensor cut":
            return replace(snapshot, tensors={**others, name: tensor[..., :-1]})
        case "tensor flat":
            return replace(snapshot, tensors={**others, name: tensor.reshape(-1)})
        case "tensor of more axes":
            return replace(snapshot, tensors={**others, name: tensor[None]})
    raise AssertionError(what)


TAMPERED = [
    "lengths None",
    "lengths empty",
    "lengths negative",
    "lengths 2-d",
    "lengths float",
    "lengths ragged",
    "lengths beyond the context",
    "lengths beyond 64 bits",
    "lengths beyond what it holds",
    "lengths of more rows",
    "program None",
    "program array",
    "program of another",
    "tensors None",
    "tensors list",
    "tensor missing",
    "tensor None",
    "tensor list",
    "tensor of doubles",
    "tensor of objects",
    "tensor cut",
    "tensor flat",
    "tensor of more axes",
]


def test_a_snapshot_that_was_changed_is_not_restored(runner: Runner) -> None:
    for what in TAMPERED:
        value = changed(copy.copy(runner.snapshot()), what)
        message = refused(runner, lambda value=value: runner.restore(value), RunnerError)
        print(f"{what}: {message}")
        several = "more rows" in what and runner.max_batch_size == 1
        assert message.startswith("batch_size=" if several else ("snapshot", "row "))


def test_only_snapshots_and_marks_are_taken_for_them(runner: Runner) -> None:
    for value in (None, 7, "a", [], {}, np.zeros(3), object(), Raises()):
        message = refused(runner, lambda value=value: runner.restore(value))
        assert "is not a snapshot; pass what snapshot() returned" in message
        assert not runner.is_valid(value)
        message = refused(runner, lambda value=value: runner.rewind(value))
        assert "this mark is of a state that is no more" in message


def test_a_mark_of_another_runner_and_one_that_was_made_up_are_refused(runner: Runner) -> None:
    made_up = Mark(lengths=np.array([2]), conv={})
    assert not runner.is_valid(made_up)
    refused(runner, lambda: runner.rewind(made_up))


def test_a_mark_cannot_be_changed(runner: Runner) -> None:
    mark = runner.mark()
    with pytest.raises(ValueError, match="read-only"):
        mark.lengths[0] = 10**6


def test_after_all_that_the_answers_are_the_same(runner: Runner) -> None:
    expected = runner.decode([5])
    runner.reset()
    runner.prefill([HELD])
    for junk in NO_ROWS.values():
        with pytest.raises(Lfm2ExportError):
            runner.prefill(junk())
    np.testing.assert_array_equal(runner.decode([5]), expected)


def test_logits_that_memory_cannot_hold_are_refused_before_the_work(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [[1] * (CONTEXT - len(HELD))]
    monkeypatch.setattr(resources, "available_memory", lambda: 40_000)
    for method in ("prefill_scored", "score"):
        message = refused(runner, lambda method=method: getattr(runner, method)(rows), ResourceError)
        what = ("keeping the logits of 92 tokens needs 48.2 kB of memory", "a state of 1 rows of 96 tokens needs")
        assert message.startswith(what)
        assert "40.0 kB are available; pass fewer rows or shorter ones" in message


def test_a_context_that_is_full_is_said_so(runner: Runner) -> None:
    message = refused(runner, lambda: runner.prefill([[1] * (CONTEXT - len(HELD) + 1)]), ContextLimitError)
    assert message.startswith("row 0: 93 tokens after 4 held do not fit the context limit of 96")


@pytest.mark.parametrize("threads", ["2", 2.0, True, 0, -1, 10**9, 2**70, [1]], ids=repr)
def test_threads_are_counted_and_no_more_than_there_are_cores(threads: Any) -> None:
    with pytest.raises(RunnerError, match=r"^threads="):
        check_threads(threads)


@pytest.mark.parametrize("path", [None, 7, 1.5, b"folder", ["a"], object()], ids=lambda path: type(path).__name__)
def test_load_runner_takes_the_name_of_a_folder(path: Any) -> None:
    with pytest.raises(Lfm2ExportError, match="is not the name of a folder"):
        lfm2_export.load_runner(path)
