"""How fast a program loads, prefills and decodes here, and what memory it takes.

In: an artifact's program. Out: medians over rounds. Prompts are fixed pseudo-random tokens: speed depends on their
number, and routers spread random tokens over all experts, as long text does. Figures are of this machine at this
moment: compare them only with others of the same run.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lfm2_export.backends import get_backend
from lfm2_export.backends.arguments import check_threads
from lfm2_export.backends.base import Runner, RunnerOptions, kernels_of
from lfm2_export.backends.profile import Profile
from lfm2_export.errors import GenerationError
from lfm2_export.hub_artifacts import open_artifact
from lfm2_export.resources import processor_name
from lfm2_export.runners import open_runner

_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is timed: ``rounds`` times a prompt of so many tokens, and so many more one by one. ``profile``: after all
    that, the program is loaded once more, and a prefill and a decode step are taken apart, by operator."""

    prompt_tokens: int = 512
    new_tokens: int = 128
    rounds: int = 3
    profile: bool = False

    def check(self, context_length: int) -> None:
        """Raises GenerationError where a count is not positive or the context is too short."""
        for name in ("prompt_tokens", "new_tokens", "rounds"):
            if (value := getattr(self, name)) < 1:
                raise GenerationError(f"{name}={value}: at least 1 is needed")
        if self.tokens > context_length:
            raise GenerationError(
                f"{self.prompt_tokens} prompt tokens and {self.new_tokens} new ones do not fit the context of "
                f"{context_length}; ask for fewer"
            )

    @property
    def tokens(self) -> int:
        """That a row holds at the end of a round."""
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """``kernels``: whose run here, and for which instructions; ``processor``: as it names itself. ``load_s`` from the
    call to a runner that is ready; rates in tokens per second, medians over ``rounds``.

    ``first_token_s``: load, prefill of the prompt and one token. ``peak_memory_bytes``: the most that this process
    held, Python included. ``artifact_bytes``: the program's files. ``profile``: None where none was asked for.
    """

    program: str
    kernels: str
    threads: int
    processor: str
    prompt_tokens: int
    new_tokens: int
    rounds: int
    load_s: float
    first_token_s: float
    prefill_tps: float
    decode_tps: float
    peak_memory_bytes: int
    state_bytes: int
    artifact_bytes: int
    profile: Profile | None = None

    def to_json(self) -> dict[str, Any]:
        """The figures; ``profile`` only where there is one."""
        return {name: value for name, value in asdict(self).items() if name != "profile" or value is not None}


def measure(
    path: str | Path,
    workload: Workload,
    options: RunnerOptions,
    *,
    backend: str | None = None,
    scheme: str | None = None,
) -> BenchResult:
    """Loads a program and times it.

    Raises:
        ArtifactError, RunnerError: the program cannot be loaded.
        GenerationError: the counts are not positive or do not fit the context.
    """
    artifact = open_artifact(path, backend=backend, scheme=scheme)
    program = artifact.program(backend, scheme)
    workload.check(program.context_length)
    started = time.perf_counter()
    runner = open_runner(artifact, program, options)
    load_s = time.perf_counter() - started
    prompt = np.random.default_rng(_SEED).integers(0, runner.vocab_size, workload.prompt_tokens).tolist()
    times = [_round(runner, prompt, workload.new_tokens) for _ in range(workload.rounds)]
    prefill_s, decode_s = (statistics.median(column) for column in zip(*times, strict=True))
    result = BenchResult(
        program=str(program),
        kernels=kernels_of(runner),
        threads=check_threads(options.threads),
        processor=processor_name(),
        prompt_tokens=workload.prompt_tokens,
        new_tokens=workload.new_tokens,
        rounds=workload.rounds,
        load_s=load_s,
        first_token_s=load_s + times[0][0],
        prefill_tps=workload.prompt_tokens / prefill_s,
        decode_tps=workload.new_tokens / decode_s,
        peak_memory_bytes=peak_memory(),
        state_bytes=runner.cache.fixed_bytes() + runner.cache.bytes_per_token() * workload.tokens,
        artifact_bytes=sum(entry.bytes for entry in program.files.values()),
    )
    if not workload.profile:
        return result
    del runner  # Its memory is needed for the next.
    taken = get_backend(program.backend).profile_program(artifact.path, program, prompt, options)
    return replace(result, profile=taken)


def _round(runner: Runner, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """Seconds of one prefill and of ``new_tokens`` decode steps; tokens are not chosen, so only the program is
    timed."""
    runner.reset()
    started = time.perf_counter()
    runner.prefill([prompt])
    prefilled = time.perf_counter()
    for step in range(new_tokens):
        runner.decode([prompt[step % len(prompt)]])
    return prefilled - started, time.perf_counter() - prefilled


def peak_memory() -> int:
    """The most memory that this process held at once, in bytes; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage says begins with the memory of the process that started this one
        lines = status.read_text(encoding="ascii").splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
