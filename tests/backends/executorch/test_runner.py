"""The runner on ExecuTorch's Python runtime: the protocol, and errors in place of crashes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("executorch")

from lfm2_export import resources
from lfm2_export.backends.base import Runner
from lfm2_export.backends.executorch import session
from lfm2_export.backends.executorch.pte import PteFile
from lfm2_export.backends.executorch.runner import ExecutorchRunner
from lfm2_export.errors import ArtifactError, ContextLimitError, ResourceError, RunnerError
from lfm2_export.manifest import FileEntry, Program
from tests.backends.executorch.programs import MAX_CONTEXT, Made, max_error, plain, prompt
from tests.shows import shows


@pytest.fixture(scope="module")
def made() -> Made:
    return plain()


@pytest.fixture
def runner(made: Made) -> ExecutorchRunner:
    return made.runner()


def refusal(path: Path, made: Made, **options: object) -> str:
    with pytest.raises((RunnerError, ArtifactError)) as error:
        ExecutorchRunner(path, cache=made.exported.cache, context_length=MAX_CONTEXT, **options)
    return str(error.value)


def altered(made: Made, folder: Path, change: object) -> Path:
    path = folder / "altered.pte"
    path.write_bytes(change(made.path.read_bytes()))  # type: ignore[operator]
    return path


def test_runner_follows_the_protocol(runner: ExecutorchRunner) -> None:
    assert isinstance(runner, Runner)
    assert (runner.max_batch_size, runner.batch_size, runner.lengths.tolist()) == (1, 1, [0])
    with pytest.raises(RunnerError, match="at most 1 rows"):
        runner.reset(2)


@shows("pte", "states", family="lfm2", scheme="fp32")
def test_snapshot_is_the_eager_state_and_can_be_restored(made: Made, runner: ExecutorchRunner) -> None:
    tokens, eager = prompt(made, 20), made.eager()
    runner.prefill([tokens])
    eager.prefill([tokens])
    snapshot, expected = runner.snapshot(), eager.snapshot()
    assert snapshot.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert snapshot.tensors[name].shape == tensor.shape
        assert max_error(tensor, snapshot.tensors[name]) < 1e-5
    after = runner.decode([5])
    runner.reset()
    runner.prefill([tokens[::-1]])
    runner.restore(snapshot)
    np.testing.assert_array_equal(runner.decode([5]), after)


def test_snapshot_of_an_empty_state(runner: ExecutorchRunner) -> None:
    empty = runner.snapshot()
    first = runner.prefill([[1, 2, 3]])
    runner.restore(empty)
    np.testing.assert_array_equal(runner.prefill([[1, 2, 3]]), first)


@shows("pte", "states", family="lfm2", scheme="fp32")
def test_rewind(made: Made, runner: ExecutorchRunner) -> None:
    runner.prefill([prompt(made, 10)])
    mark = runner.mark()
    first = [runner.decode([t]) for t in (4, 5, 6)]
    runner.rewind(mark)
    assert runner.lengths.tolist() == [10]
    for expected, token in zip(first, (4, 5, 6), strict=True):
        np.testing.assert_array_equal(runner.decode([token]), expected)
    runner.reset()
    assert not runner.is_valid(mark)
    with pytest.raises(RunnerError, match="state that is no more"):
        runner.rewind(mark)


def test_score_leaves_the_state_alone(made: Made, runner: ExecutorchRunner) -> None:
    tokens, eager = prompt(made, 12), made.eager()
    runner.prefill([tokens])
    scored = runner.score([tokens, tokens[::-1]])
    assert max_error(eager.score([tokens, tokens[::-1]]), scored) < 1e-4
    eager.prefill([tokens])
    assert max_error(eager.decode([3]), runner.decode([3])) < 1e-4


def test_a_reset_forgets_nan(made: Made, runner: ExecutorchRunner) -> None:
    """The stock runners only set their position back, so the program must not multiply the old state by zero."""
    tokens = prompt(made, 6)
    first = runner.prefill([tokens])
    poisoned = runner.snapshot()
    for tensor in poisoned.tensors.values():
        tensor[:] = np.nan
    runner.restore(poisoned)
    assert np.isnan(runner.decode([1])).any()
    runner.reset()
    np.testing.assert_array_equal(runner.prefill([tokens]), first)


def test_the_whole_context_can_be_used_and_not_more(runner: ExecutorchRunner) -> None:
    runner.prefill([np.ones(MAX_CONTEXT - 1, np.int64)], chunk_size=MAX_CONTEXT)
    runner.decode([1])
    with pytest.raises(ContextLimitError, match=f"1 tokens after {MAX_CONTEXT} held"):
        runner.decode([1])
    runner.reset()
    with pytest.raises(ContextLimitError, match=f"{MAX_CONTEXT + 1} tokens do not fit"):
        runner.prefill([np.ones(MAX_CONTEXT + 1, np.int64)])
    assert runner.prefill([np.ones(MAX_CONTEXT, np.int64)], chunk_size=MAX_CONTEXT).shape == (1, runner.vocab_size)


@pytest.mark.parametrize("start", [-1, MAX_CONTEXT + 5])
def test_a_position_outside_of_the_program_is_an_error(runner: ExecutorchRunner, start: int) -> None:
    with pytest.raises(RunnerError, match=r"position|executorch failed"):
        runner._session.call(session.FORWARD, (np.ones((1, 3), np.int64), np.array([start])))


def test_threads(made: Made) -> None:
    cores = os.cpu_count() or 1
    assert made.runner().threads <= cores
    assert f"this machine has {cores} cores" in refusal(made.path, made, threads=cores + 1)
    assert "at least one thread" in refusal(made.path, made, threads=0)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_another_number_of_threads_leaves_open_runners_as_they_were(made: Made) -> None:
    """The pool is one for all: a method that was loaded on the old one would end the interpreter."""
    tokens = prompt(made, 12)
    first = made.runner()
    before = first.prefill([tokens])
    kept = first.snapshot()
    alone = ExecutorchRunner(made.path, cache=made.exported.cache, context_length=MAX_CONTEXT, threads=1)
    assert (first.threads, alone.threads) == (1, 1)
    np.testing.assert_array_equal(alone.prefill([tokens]), before)
    np.testing.assert_array_equal(first.decode([3]), alone.decode([3]))
    again = ExecutorchRunner(made.path, cache=made.exported.cache, context_length=MAX_CONTEXT, threads=2)
    assert (first.threads, again.threads) == (2, 2)
    assert first.lengths.tolist() == [13]
    expected = alone.decode([4])
    np.testing.assert_array_equal(first.decode([4]), expected)
    first.restore(kept)
    np.testing.assert_array_equal(first.snapshot().tensors["past_conv.0"], kept.tensors["past_conv.0"])


def test_damaged_files_are_named(made: Made, tmp_path: Path) -> None:
    cut = altered(made, tmp_path, lambda data: data[: len(data) // 2])
    assert "it was cut off" in refusal(cut, made)
    other = altered(made, tmp_path, lambda data: data[:4] + b"ET99" + data[8:])
    assert "is of format ET99" in refusal(other, made)
    nothing = altered(made, tmp_path, lambda data: b"not a program" * 10)
    assert "is not an ExecuTorch program" in refusal(nothing, made)
    empty = altered(made, tmp_path, lambda data: b"")
    assert "is not an ExecuTorch program" in refusal(empty, made)
    assert "no such program" in refusal(tmp_path / "missing.pte", made)


def test_a_damaged_flatbuffer_does_not_end_the_interpreter(made: Made, tmp_path: Path) -> None:
    """Bytes all over the program's tables are overwritten; each run is one of its own."""
    head = made.path.read_bytes()[:64]
    size = int.from_bytes(head[16:24], "little")
    rng = np.random.default_rng(0)

    def damage(data: bytes) -> bytes:
        found = bytearray(data)
        for place in rng.integers(64, size, 40):
            found[place] = 0xFF
        return bytes(found)

    path = altered(made, tmp_path, damage)
    code = (
        "import sys; from pathlib import Path\n"
        "from lfm2_export.backends.executorch.session import Session\n"
        "from lfm2_export.errors import Lfm2ExportError\n"
        "try: Session(Path(sys.argv[1]))\n"
        "except Lfm2ExportError as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("RunnerError")


def test_missing_operators_are_named(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PteFile, "operators", lambda self, method: ["aten::add.out", "acme::rotate.out"])
    message = refusal(made.path, made)
    assert "needs operators that this executorch" in message
    assert "acme::rotate.out" in message
    assert "aten::add.out" not in message


def test_another_major_version_is_refused(made: Made) -> None:
    exported = made.exported
    program = Program(
        backend="executorch",
        scheme="fp32",
        graphs=exported.graphs,
        files={name: FileEntry(bytes=0, sha256="0" * 64) for name in exported.files},
        context_length=MAX_CONTEXT,
        inputs=exported.inputs,
        outputs=exported.outputs,
        cache=exported.cache,
        options=exported.options,
        operators=exported.operators,
        tensors=exported.tensors,
        versions={"executorch": "1.5.1"},
    )
    assert ExecutorchRunner.from_program(made.folder, program).vocab_size == made.checkpoint.config.vocab_size
    with pytest.raises(RunnerError, match=r"was made with executorch 7\.0\.0"):
        ExecutorchRunner.from_program(made.folder, replace(program, versions={"executorch": "7.0.0"}))


def test_metadata_is_what_the_stock_runners_ask_for(runner: ExecutorchRunner) -> None:
    for name, expected in {
        "get_max_seq_len": MAX_CONTEXT,
        "get_max_context_len": MAX_CONTEXT,
        "get_vocab_size": runner.vocab_size,
        "get_eos_ids": 2,
        "get_bos_id": 1,
        "enable_dynamic_shape": True,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
    }.items():
        assert runner._session.constant(name) == expected, name


def test_a_ctrl_c_during_a_step_leaves_a_state_that_its_length_tells(made: Made, runner: ExecutorchRunner) -> None:
    """The signal arrives while the runtime computes and is raised right after: what was appended counts."""
    held, tokens = prompt(made, 8), prompt(made, 80, seed=3)
    interrupted = set()
    for delay in np.geomspace(1e-5, 0.05, 12).tolist():
        runner.reset()
        runner.prefill([held])
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012
                signal.setitimer(signal.ITIMER_REAL, delay)
                runner.prefill([tokens])
                time.sleep(1)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        length = int(runner.lengths[0])
        interrupted.add(length)
        assert length in (len(held), len(held) + len(tokens))
        row = np.concatenate([held, tokens]) if length > len(held) else held
        after = runner.decode([5])
        runner.reset()
        runner.prefill([row])
        assert max_error(runner.decode([5]), after) < 1e-5
    print("tokens held after the signal:", sorted(interrupted))


def test_a_program_whose_buffers_do_not_fit_is_refused_before_it_is_loaded(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = PteFile(made.path).planned_bytes("forward")
    monkeypatch.setattr(resources, "available_memory", lambda: needed - 1)
    with pytest.raises(ResourceError) as caught:
        made.runner()
    print(caught.value)
    assert str(caught.value).startswith(f"{made.path}: loading it needs ")
    assert str(caught.value).endswith("; export it with a smaller --max-context")
    monkeypatch.setattr(resources, "available_memory", lambda: needed)
    made.runner().prefill([[1]])
