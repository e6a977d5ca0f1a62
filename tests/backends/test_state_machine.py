"""Any sequence of calls leaves a runner in the state that its tokens say: on every backend, by hypothesis.

A model of what each row holds goes along with the runner. After every step the runner's next logits are compared with
those of a runner that got the same tokens in one prefill, and after every error its state with the one before, exactly.

What two ways to one state may differ by (``TOLERANCES``) is a matter of numerics. Measured with 250 random rows of up
to 47 tokens, each in one prefill, in chunks and beside another row, on these programs, whose logits have a standard
deviation of 2 to 2.6:

* fp32: the order of sums. At most 1.1e-5, median 5e-6 (ONNX); 3.6e-6 (.pte, eager). 8da4w in a .pte: 1.4e-6, since
  its activations get a scale for each token and so do not depend on how tokens are grouped.
* q4 and q8: activations become int8 in groups of 32, so a sum that differs in its last bit now and then moves a value
  to the next of its 255 codes, and that grows through the layers. Median 4e-6; at most 0.064 on onnxruntime's kernels
  and 0.11 on ours. In the mixture of experts such a step can change the experts that are chosen (0.9 was seen), which
  says nothing about the state: the dense checkpoint is looked at.

``STATE_MACHINE_EXAMPLES=500`` runs that many sequences, other ones each time, and a .pte of int4 weights, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lfm2_export.artifact import Artifact
from lfm2_export.backends.base import JoinsRows, Kernels, KvCache, Mark, Runner, RunnerOptions, Snapshot
from lfm2_export.backends.onnx import runner as onnx_module
from lfm2_export.backends.onnx.runner import OnnxRunner
from lfm2_export.errors import ContextLimitError, ResourceError, RunnerError
from tests.checkpoints import tiny_config

CONTEXT = 40
MOST_ROWS = 3
EXAMPLES = int(os.environ.get("STATE_MACHINE_EXAMPLES", "0"))
# Above: ten times what was seen for fp32, three times for int8 activations; wrong states are off by more (see the end).
TOLERANCES = {"fp32": 1e-4, "q4": 0.3, "q8": 0.3, "8da4w": 1e-4}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A kind of runner. ``interrupted(runner, after)`` makes its program fail after so many runs."""

    open: Callable[[], Runner]
    tolerance: float
    interrupted: Callable[[Any, int], Any]


@dataclass
class Worst:
    """The largest differences seen, for the report."""

    seen: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        found = np.array(self.seen)
        return f"{len(found)} comparisons, at most {found.max():.1e}, median {np.median(found):.1e}"


class Sequences(RuleBasedStateMachine):
    """``play`` sets these: to load runners for each sequence would take all the time."""

    subject: Subject
    worst: Worst
    make: Callable[[], Runner]
    other: Runner
    fresh: Callable[[tuple[int, ...]], np.ndarray]

    def __init__(self) -> None:
        super().__init__()
        self.runner = self.make()
        self.rows: list[tuple[int, ...]] = [()]
        self.marks: list[tuple[Mark, list[tuple[int, ...]]]] = []
        self.dead: list[Mark] = []
        self.snapshots: list[tuple[Snapshot, list[tuple[int, ...]]]] = []

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        self.reset(data)

    # What a caller may do

    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        rows = data.draw(st.integers(1, self.most_rows), label="rows")
        self.runner.reset(rows)
        self.replaced([()] * rows)

    @rule(data=st.data(), chunk_size=st.sampled_from([None, 1, 2, 3, 7]), scored=st.booleans())
    def prefill(self, data: st.DataObject, chunk_size: int | None, scored: bool) -> None:
        new = [data.draw(self.tokens(self.room(row)), label="tokens") for row in self.rows]
        if not all(new):
            return
        if scored and self.runner.can_score:
            found = np.stack([logits[-1] for logits in self.runner.prefill_scored(new, chunk_size=chunk_size)])
        else:
            found = self.runner.prefill(new, chunk_size=chunk_size)
        self.append(new, found)

    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        if min(map(self.room, self.rows)) > 0:
            new = [[data.draw(self.token(), label="token")] for _ in self.rows]
            self.append(new, self.runner.decode([token for (token,) in new]))

    @rule()
    def mark(self) -> None:
        self.marks.append((self.runner.mark(), list(self.rows)))

    @precondition(lambda self: self.marks)
    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        mark, rows = data.draw(st.sampled_from(self.marks), label="mark")
        self.runner.rewind(mark)
        self.rows = list(rows)
        gone = [held for held, at in self.marks if any(map(longer, at, rows))]
        self.marks = [(held, at) for held, at in self.marks if not any(map(longer, at, rows))]
        self.dead += gone

    @rule()
    def snapshot(self) -> None:
        self.snapshots = [*self.snapshots[-3:], (self.runner.snapshot(), list(self.rows))]

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        snapshot, rows = data.draw(st.sampled_from(self.snapshots), label="snapshot")
        self.runner.restore(snapshot)
        self.replaced(list(rows))

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        if data.draw(st.booleans(), label="all rows"):
            indices = list(data.draw(st.permutations(range(len(self.rows))), label="indices"))
        else:
            count = data.draw(st.integers(1, self.most_rows), label="rows")
            indices = [data.draw(st.integers(0, len(self.rows) - 1), label="index") for _ in range(count)]
        self.runner.reorder(indices)
        if indices != list(range(len(self.rows))):
            self.replaced([self.rows[index] for index in indices])

    @precondition(lambda self: isinstance(self.runner, JoinsRows) and self.snapshots)
    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        snapshot, rows = data.draw(st.sampled_from(self.snapshots), label="snapshot")
        if len(self.rows) + len(rows) <= self.most_rows + 1:
            self.runner.join(snapshot)
            self.replaced([*self.rows, *rows])

    @precondition(lambda self: isinstance(self.runner, JoinsRows) and len(self.rows) > 1)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        row = data.draw(st.integers(0, len(self.rows) - 1), label="row")
        self.runner.leave(row)
        rows = [*self.rows]
        rows[row] = rows[-1]
        self.replaced(rows[:-1])

    @precondition(lambda self: isinstance(self.runner, JoinsRows))
    @rule(data=st.data())
    def copy_row(self, data: st.DataObject) -> None:
        row = data.draw(st.integers(0, len(self.rows) - 1), label="row")
        self.snapshots = [*self.snapshots[-3:], (self.runner.copy_row(row), [self.rows[row]])]

    @rule(data=st.data())
    def score(self, data: st.DataObject) -> None:
        row = data.draw(self.tokens(6), label="tokens")
        if row and self.runner.can_score:
            self.compare(self.runner.score([row])[0, -1], tuple(row))

    # What is refused, and what fails

    @rule(data=st.data(), chunk_size=st.sampled_from([None, 3]))
    def over_full(self, data: st.DataObject, chunk_size: int | None) -> None:
        row = data.draw(st.integers(0, len(self.rows) - 1), label="row")
        new = [[1] * (self.room(held) + 1) if index == row else [1] for index, held in enumerate(self.rows)]
        self.refused(lambda: self.runner.prefill(new, chunk_size=chunk_size), ContextLimitError)

    @rule(
        bad=st.sampled_from([-1, 10**6, 2**70, 0.5, None]),
        how=st.sampled_from(["prefill", "prefill_scored", "score", "decode"]),
    )
    def bad_ids(self, bad: Any, how: str) -> None:
        last = [bad] if how == "decode" else [1, bad]
        rows = [last if index == len(self.rows) - 1 else [1] * len(last) for index in range(len(self.rows))]
        given = [row[0] for row in rows] if how == "decode" else rows
        self.refused(lambda: getattr(self.runner, how)(given))

    @rule(
        what=st.sampled_from(["rows", "empty row", "chunk", "2-d", "reset", "reorder", "None", "tampered", "dead mark"])
    )
    def bad_arguments(self, what: str) -> None:
        runner, count = self.runner, len(self.rows)
        calls: dict[str, Callable[[], object]] = {
            "rows": lambda: runner.prefill([[1]] * (count + 1)),
            "empty row": lambda: runner.prefill([[1]] * (count - 1) + [[]]),
            "chunk": lambda: runner.prefill([[1]] * count, chunk_size=0),
            "2-d": lambda: runner.decode([[1]] * count),  # type: ignore[list-item]
            "reset": lambda: runner.reset(0),
            "reorder": lambda: runner.reorder([0, count]),
            "None": lambda: runner.restore(None),  # type: ignore[arg-type]
            "tampered": lambda: runner.restore(replace(runner.snapshot(), program_id="another")),
            "dead mark": lambda: runner.rewind(self.dead[-1] if self.dead else None),  # type: ignore[arg-type]
        }
        self.refused(calls[what])

    @rule(data=st.data(), after=st.integers(0, 4), chunk_size=st.sampled_from([1, 2, None]))
    def fails_on_the_way(self, data: st.DataObject, after: int, chunk_size: int | None) -> None:
        """The runtime does, in one of the runs that a prefill is made of."""
        new = [data.draw(self.tokens(self.room(row)), label="tokens") for row in self.rows]
        if not all(new):
            return

        def prefill() -> None:
            with self.subject.interrupted(self.runner, after):
                self.runner.prefill(new, chunk_size=chunk_size)
                raise ResourceError("not so many runs")

        before = self.runner.lengths.tolist()
        mark, kept = self.runner.mark(), self.runner.snapshot()
        with pytest.raises((RunnerError, ResourceError, MemoryError)) as caught:
            prefill()
        if "not so many runs" in str(caught.value):
            self.rows = [row + tuple(tokens) for row, tokens in zip(self.rows, new, strict=True)]
            return
        assert self.runner.lengths.tolist() == before
        assert self.runner.is_valid(mark)
        assert_same(self.runner.snapshot(), kept)

    # What holds at any time

    @invariant()
    def the_state_is_that_of_its_tokens(self) -> None:
        assert self.runner.batch_size == len(self.rows)
        assert self.runner.lengths.tolist() == [len(row) for row in self.rows]
        assert all(self.runner.is_valid(mark) for mark, _ in self.marks)
        assert not any(self.runner.is_valid(mark) for mark in self.dead)
        if min(map(self.room, self.rows)) > 0:  # what the next token would give, without appending it
            self.other.restore(self.runner.snapshot())
            self.compare_all(self.other.decode([1] * len(self.rows)), [(*row, 1) for row in self.rows])

    # Helpers

    @property
    def most_rows(self) -> int:
        return min(MOST_ROWS, self.runner.max_batch_size or MOST_ROWS)

    def token(self) -> st.SearchStrategy[int]:
        return st.integers(0, min(self.runner.vocab_size, 500) - 1)

    def tokens(self, room: int) -> st.SearchStrategy[list[int]]:
        """At least one, where there is room for one."""
        return st.lists(self.token(), min_size=min(1, room), max_size=min(9, room))

    def room(self, row: tuple[int, ...]) -> int:
        return self.runner.context_length - len(row)

    def append(self, new: list[list[int]], found: np.ndarray) -> None:
        self.rows = [row + tuple(tokens) for row, tokens in zip(self.rows, new, strict=True)]
        self.compare_all(found, self.rows)

    def replaced(self, rows: list[tuple[int, ...]]) -> None:
        self.rows = rows
        self.dead += [mark for mark, _ in self.marks]
        self.marks = []

    def compare_all(self, found: np.ndarray, rows: list[tuple[int, ...]]) -> None:
        assert found.shape == (len(rows), self.runner.vocab_size)
        for logits, row in zip(found, rows, strict=True):
            self.compare(logits, row)

    def compare(self, logits: np.ndarray, row: tuple[int, ...]) -> None:
        error = float(np.abs(logits - self.fresh(row)).max())
        self.worst.seen.append(error)
        assert error <= self.subject.tolerance, f"{row}: off by {error:.1e}"

    def refused(self, call: Callable[[], object], *kinds: type[Exception]) -> None:
        kept, mark = self.runner.snapshot(), self.runner.mark()
        with pytest.raises(kinds or RunnerError):
            call()
        assert self.runner.is_valid(mark)
        assert_same(self.runner.snapshot(), kept)


def longer(row: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return len(row) > len(other)


def assert_same(found: Snapshot, expected: Snapshot) -> None:
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    for name, tensor in expected.tensors.items():
        pair = (held(name, one, expected.lengths) for one in (found.tensors[name], tensor))
        np.testing.assert_array_equal(*pair, err_msg=name)


def held(name: str, tensor: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Of keys and values in ONNX programs [rows, heads, positions, head_dim]: without what lies after a shorter row's
    end, which no step looks at and a prefill that failed may have written to."""
    if not name.startswith("past_key_values") or tensor.shape[0] != len(lengths) or len(lengths) == 1:
        return tensor
    kept = tensor.copy()
    for row, length in enumerate(lengths):
        kept[row, :, length:] = 0
    return kept


def play(subject: Subject, wrong: Callable[[], Runner] | None = None) -> Worst:
    """Sequences of calls to one of the subject's runners, or to ``wrong`` ones until a sequence shows it."""
    reference, runner, known = subject.open(), subject.open(), dict[tuple[int, ...], np.ndarray]()

    def fresh(row: tuple[int, ...]) -> np.ndarray:
        """The logits after ``row``, in one prefill of a runner that nothing else was ever asked of."""
        if row not in known:
            reference.reset()
            known[row] = reference.prefill([row])[0]
        return known[row]

    worst = Worst()
    attributes = {
        "subject": subject,
        "worst": worst,
        "make": staticmethod(wrong or (lambda: runner)),
        "other": subject.open(),
        "fresh": staticmethod(fresh),
    }
    run_state_machine_as_test(
        type("Sequences", (Sequences,), attributes),
        settings=settings(
            max_examples=600 if wrong else EXAMPLES or 15,  # a wrong one is left as soon as it shows
            stateful_step_count=20,
            derandomize=not EXAMPLES,
            database=None,
            deadline=None,
            phases=[Phase.generate] if wrong else [Phase.generate, Phase.shrink],
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return worst


def breaking(patched: pytest.MonkeyPatch, owner: object, name: str, after: int, counts: Callable[..., bool]) -> None:
    """Makes call number ``after`` of those that count fail."""
    real, calls = getattr(owner, name), [0]

    def call(*args: Any, **options: Any) -> Any:
        if counts(*args):
            calls[0] += 1
            if calls[0] == after + 1:
                raise MemoryError("out of memory")
        return real(*args, **options)

    patched.setattr(owner, name, call)


@contextmanager
def eager_interrupted(runner: Any, after: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        breaking(patched, runner._model, "forward", after, lambda *_: True)
        yield


@contextmanager
def onnx_interrupted(runner: Any, after: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        breaking(patched, onnx_module, "run", after, lambda *_: True)
        yield


@contextmanager
def executorch_interrupted(runner: Any, after: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        breaking(patched, runner._session, "call", after, lambda method, *_: method == "forward")
        yield


def eager(request: pytest.FixtureRequest, _: str) -> Subject:
    from lfm2_export.backends.eager import EagerRunner
    from tests.models.reference import our_model

    model = our_model(tiny_config("lfm2_moe"))
    return Subject(
        open=lambda: EagerRunner(model, context_length=CONTEXT),
        tolerance=TOLERANCES["fp32"],
        interrupted=eager_interrupted,
    )


def onnx(request: pytest.FixtureRequest, how: str) -> Subject:
    return onnx_subject(request, how, OnnxRunner)[0]


def onnx_subject(
    request: pytest.FixtureRequest, how: str, kind: type[OnnxRunner]
) -> tuple[Subject, Callable[[], OnnxRunner]]:
    """The subject, and what opens a runner of another class on its program."""
    name, scheme, kernels, kept = how.split()
    folder = request.getfixturevalue("artifact")(name)
    program = replace(Artifact.open(folder, verify=False).program("onnx", scheme), context_length=CONTEXT)
    options = RunnerOptions(threads=1, kernels=Kernels(kernels), kv_cache=KvCache(kept))
    subject = Subject(
        open=lambda: OnnxRunner.from_program(folder, program, options),
        tolerance=TOLERANCES[scheme],
        interrupted=onnx_interrupted,
    )
    return subject, lambda: kind.from_program(folder, program, options)


def executorch(request: pytest.FixtureRequest, scheme: str) -> Subject:
    pytest.importorskip("executorch")
    from lfm2_export.backends.executorch.runner import ExecutorchRunner
    from tests.backends.executorch.programs import checkpoint_of, make, plain

    made = plain() if scheme == "fp32" else make(checkpoint_of("lfm2"), scheme)
    return Subject(
        open=lambda: ExecutorchRunner(made.path, cache=made.exported.cache, context_length=CONTEXT),
        tolerance=TOLERANCES[scheme],
        interrupted=executorch_interrupted,
    )


SUBJECTS = {
    "eager": (eager, ""),
    "stock kernels, fp32": (onnx, "tiny-moe fp32 stock float"),
    "stock kernels, q8": (onnx, "tiny-dense q8 stock float"),
    "own kernels, q4": (onnx, "tiny-dense q4 lfm2 float"),
    "own kernels, q8, keys and values in int8": (onnx, "tiny-dense q8 lfm2 int8"),
    "executorch, fp32": (executorch, "fp32"),
    # An export of a quarter of a minute, and no other code here.
    **({"executorch, 8da4w": (executorch, "8da4w")} if EXAMPLES else {}),
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", SUBJECTS)
def test_any_sequence_of_calls_leaves_the_state_that_its_tokens_say(request: pytest.FixtureRequest, name: str) -> None:
    make, how = SUBJECTS[name]
    worst = play(make(request, how))
    print(f"{name}: {worst}")
    # A step to another code of int8 is rare; a wrong state would be off most of the time.
    assert np.median(worst.seen) < 1e-4


# The controls: runners that are wrong


class ForgetsConv(OnnxRunner):
    def rewind(self, mark: Mark) -> None:
        conv = self._state.copy_conv()
        super().rewind(mark)
        self._state.set_place(self.lengths, conv)


class KeepsConv(OnnxRunner):
    """A reset that only counts from zero again."""

    def reset(self, batch_size: int = 1) -> None:
        conv, before = self._state.copy_conv(), self.batch_size
        super().reset(batch_size)
        if before == self.batch_size:
            self._state.set_place(self.lengths, conv)


class KeepsHalf(OnnxRunner):
    """A prefill that fails leaves the chunks before."""

    def _prefill(self, rows: list[np.ndarray], chunk_size: int) -> np.ndarray:
        self._make_room(rows)
        logits = np.empty((self.batch_size, self.vocab_size), dtype=np.float32)
        self._append(rows, chunk_size, logits)
        return logits


class MixesRows(OnnxRunner):
    def reorder(self, indices: Any) -> None:
        lengths = self.lengths
        super().reorder(indices)
        if len(lengths) == self.batch_size:
            self._state.lengths[:] = lengths


class LeavesOrder(OnnxRunner):
    """Rows keep their order where one leaves, as nobody counts on."""

    def leave(self, row: int) -> None:
        super().reorder([index for index in range(self.batch_size) if index != row])


class KeepsMarks(OnnxRunner):
    def restore(self, snapshot: Snapshot) -> None:
        marks = list(self._marks)
        super().restore(snapshot)
        for mark in marks:
            self._marks[mark] = None


class ChecksLate(OnnxRunner):
    """The first chunk is computed before the context's end is looked at."""

    def prefill(self, input_ids: Any, *, chunk_size: int | None = None) -> np.ndarray:
        try:
            return super().prefill(input_ids, chunk_size=chunk_size)
        except ContextLimitError:
            if self.batch_size == 1 and self._state.lengths[0] < CONTEXT:
                super().decode([1])
            raise


WRONG = [ForgetsConv, KeepsConv, KeepsHalf, MixesRows, LeavesOrder, KeepsMarks, ChecksLate]


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_a_runner_that_is_wrong_is_caught(request: pytest.FixtureRequest, kind: type[OnnxRunner]) -> None:
    with pytest.raises(AssertionError) as caught:
        play(*onnx_subject(request, "tiny-dense q4 stock float", kind))
    print(kind.__name__, *str(caught.value).splitlines()[:2])
