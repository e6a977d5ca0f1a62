"""ExecuTorch's profile of the bundled checkpoints' programs: against the files as ExecuTorch itself reads them."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import lfm2_export
from lfm2_export.artifact import Artifact
from lfm2_export.backends.base import RunnerOptions
from lfm2_export.backends.executorch import profile_program
from lfm2_export.backends.executorch.profile import InstructionNames, TracedSession, read_traces
from lfm2_export.backends.executorch.session import FORWARD
from lfm2_export.backends.profile import Profile
from lfm2_export.errors import ContextLimitError, RunnerError
from lfm2_export.manifest import Program
from tests.profiles import calls, check_profile, clean_up  # noqa: F401  (a fixture)

pytest.importorskip("executorch")

MAX_CONTEXT = 64
PROMPT = np.random.default_rng(0).integers(16, 2660, 24).tolist()
ALWAYS = {"XNNPACK delegate", "llama::custom_sdpa.out", "llama::update_cache.out"}


@pytest.fixture(params=["tiny-moe", "tiny-dense"])
def folder(once, request: pytest.FixtureRequest) -> Path:
    def make(folder: Path) -> None:
        lfm2_export.export(
            request.param,
            backend="executorch",
            scheme="8da4w",
            max_context=MAX_CONTEXT,
            algorithm="round",
            output=folder,
        )

    return once(f"profile-{request.param}-executorch", make)


@pytest.fixture
def program(folder: Path) -> Program:
    return Artifact.open(folder, verify=False).program("executorch", "8da4w")


@pytest.fixture
def path(folder: Path, program: Program) -> Path:
    return folder / program.graphs["model"]


def instructions(path: Path) -> Counter[str]:
    """What ``forward`` calls, by ExecuTorch's own reader."""
    from executorch.exir._serialize._program import deserialize_pte_binary
    from executorch.exir.schema import DelegateCall, KernelCall

    found = deserialize_pte_binary(path.read_bytes())
    plans = getattr(found, "program", found).execution_plan
    (plan,) = [plan for plan in plans if plan.name == FORWARD]
    count: Counter[str] = Counter()
    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        if isinstance(call, DelegateCall):
            assert plan.delegates[call.delegate_index].id == "XnnpackBackend"
            count["XNNPACK delegate"] += 1
        elif isinstance(call, KernelCall):
            operator = plan.operators[call.op_index]
            count[f"{operator.name}.{operator.overload}".removesuffix(".")] += 1
    return count


@pytest.mark.usefixtures("clean_up")
def test_calls_are_the_instructions_of_the_program(folder: Path, program: Program, path: Path) -> None:
    found = profile_program(folder, program, PROMPT, RunnerOptions(threads=1))
    check_profile(found, len(PROMPT))
    expected = instructions(path)
    assert calls(found.prefill) == expected
    assert calls(found.decode) == expected
    assert expected.keys() >= ALWAYS
    experts = [name for name in expected if "moe" in name]
    assert len(experts) == (1 if "lfm2_moe" in (folder / "config.json").read_text() else 0)


@pytest.mark.usefixtures("clean_up")
def test_a_delegate_tells_what_is_inside(folder: Path, program: Program) -> None:
    found = profile_program(folder, program, PROMPT, RunnerOptions(threads=1))
    delegate = next(entry for entry in found.prefill.operators if entry.operator == "XNNPACK delegate")
    names = {part.operator for part in delegate.parts}
    # XNNPACK's name for int8 activations: QDU8 where the processor has AVX512-VNNI or AVX-VNNI, QD8 elsewhere.
    assert any(name.startswith(("Fully Connected (NC, QDU8", "Fully Connected (NC, QD8")) for name in names), names
    assert not any("#" in name for name in names)
    assert sum(part.ms for part in delegate.parts) <= delegate.ms * 1.5  # Medians need not add up.


def test_times_are_of_the_clock(path: Path) -> None:
    """The record's unit is not in it: a hundred runs must take as long as they took."""
    session = TracedSession(path, threads=1)
    tokens = np.array([PROMPT], dtype=np.int64)
    names = InstructionNames(path).instructions(FORWARD)
    session.call(FORWARD, (tokens, np.zeros(1, dtype=np.int64)))
    session.recorded()
    started = time.perf_counter()
    for _ in range(100):
        session.call(FORWARD, (tokens, np.zeros(1, dtype=np.int64)))
    wall_ms = 1e3 * (time.perf_counter() - started)
    traces = read_traces(session.recorded(), names)
    traced_ms = sum(spent.ms for trace in traces for key, spent in trace.items() if len(key) == 1)
    print(f"{traced_ms:.2f} ms traced of {wall_ms:.2f}")
    assert len(traces) == 100
    assert 0.2 * wall_ms < traced_ms <= wall_ms


def test_a_record_holds_what_came_after_the_last(path: Path) -> None:
    session = TracedSession(path, threads=1)
    names = InstructionNames(path).instructions(FORWARD)
    for runs in (1, 3):
        for _ in range(runs):
            session.call(FORWARD, (np.array([[5]]), np.zeros(1, dtype=np.int64)))
        assert len(read_traces(session.recorded(), names)) == runs


@pytest.mark.usefixtures("clean_up")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_runner_beside_it_goes_on_as_if_nothing_had_been(folder: Path, program: Program, threads: int) -> None:
    """Another number of threads makes the pool anew, and with it every program that is loaded."""
    runner = lfm2_export.load_runner(folder, backend="executorch", threads=1)
    runner.prefill([PROMPT])
    before = runner.snapshot()
    expected = [runner.decode([token]) for token in PROMPT[:4]]
    runner.restore(before)
    profile_program(folder, program, PROMPT, RunnerOptions(threads=threads))
    for token, logits in zip(PROMPT[:4], expected, strict=True):
        np.testing.assert_allclose(runner.decode([token]), logits, atol=1e-4)


def test_tracing_changes_no_logit(folder: Path, path: Path) -> None:
    runner = lfm2_export.load_runner(folder, backend="executorch", threads=1)
    session = TracedSession(path, threads=1)
    (found,) = session.call(FORWARD, (np.array([PROMPT]), np.zeros(1, dtype=np.int64)))
    np.testing.assert_allclose(found[0], runner.prefill([PROMPT]), atol=1e-4)


@pytest.mark.usefixtures("clean_up")
def test_a_context_that_is_full_but_for_one_token(folder: Path, program: Program) -> None:
    prompt = (4 * PROMPT)[: MAX_CONTEXT - 1]
    found: Profile = profile_program(folder, program, prompt, RunnerOptions(threads=1))
    assert found.decode.steps == 3
    with pytest.raises(ContextLimitError, match="do not fit the context limit of 64"):
        profile_program(folder, program, [*prompt, 1], RunnerOptions(threads=1))


@pytest.mark.usefixtures("clean_up")
def test_a_runtime_that_records_nothing_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = TracedSession(path, threads=1)

    class Untraced:
        def write_etdump_result_to_file(self, path: str) -> None:
            raise RuntimeError("No etdump found")

    monkeypatch.setattr(session, "_program", Untraced())
    with pytest.raises(RunnerError, match=r"recorded nothing \(No etdump found\).*EXECUTORCH_ENABLE_EVENT_TRACER"):
        session.recorded()
