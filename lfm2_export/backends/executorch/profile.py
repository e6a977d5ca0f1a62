"""Takes a .pte's steps apart with ExecuTorch's event tracer.

In: a program of an artifact and a prompt. Out: ``Profile`` by kernel, as the runtime names them; a delegate is one
operator, and what it tells of its insides (XNNPACK does, in whole microseconds) are parts of it. The tracer's record
("ETDump") is read here: its schema is small, and ExecuTorch's own reader takes six seconds to import.
"""

from __future__ import annotations

import re
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flatbuffers.table import Table  # type: ignore[import-untyped]

from lfm2_export.backends.base import RunnerOptions
from lfm2_export.backends.executorch.pte import PteFile
from lfm2_export.backends.executorch.runner import choose
from lfm2_export.backends.executorch.session import FORWARD, Session, version
from lfm2_export.backends.profile import NOTHING, Profile, Spent, Trace, summarize, take_steps
from lfm2_export.backends.runner_base import DEFAULT_CHUNK_SIZE
from lfm2_export.errors import RunnerError
from lfm2_export.messages import named

if TYPE_CHECKING:
    from lfm2_export.manifest import Program

_DELEGATES = {"XnnpackBackend": "XNNPACK delegate"}
# One event around every instruction, the runtime's own work for it included.
_INSTRUCTIONS = ("OPERATOR_CALL", "DELEGATE_CALL")
# Of a method's runs; "Default" is loading it.
_RUN = "Execute"
# Fields by their order in program.fbs, and two of its kinds of instruction.
_PLAN_CHAINS, _CHAIN_INSTRUCTIONS = 5, 2
_KERNEL_CALL, _DELEGATE_CALL = 1, 2
# The same of etdump_schema_flatcc.fbs. Times are nanoseconds wherever the runtime's clock is std::chrono's.
_DUMP_RUNS, _RUN_NAME, _RUN_EVENTS, _EVENT_PROFILE = 1, 0, 3, 0
_PROFILE_NAME, _PROFILE_INSTRUCTION, _PROFILE_DELEGATE_PART, _PROFILE_START, _PROFILE_END = 0, 2, 4, 6, 7
# XNNPACK numbers what a delegate holds more than one of: "Multiply (ND) #3".
_NUMBER = re.compile(r" #\d+$")


def profile_program(
    folder: Path, program: Program, prompt: Sequence[int], options: RunnerOptions | None = None
) -> Profile:
    """A profile of the file that ``ExecutorchRunner`` opens.

    Raises:
        RunnerError: the program cannot be loaded, or this runtime cannot trace.
        ContextLimitError: the prompt and one token more do not fit.
    """
    options = options or RunnerOptions()
    path = folder / choose(program, options)
    session = TracedSession(path, threads=options.threads)

    def step(tokens: np.ndarray, position: int) -> None:
        session.call(FORWARD, (tokens[None], np.array([position], dtype=np.int64)))

    steps = take_steps(step, prompt, context_length=program.context_length, chunk_size=DEFAULT_CHUNK_SIZE)
    traces = read_traces(session.recorded(), InstructionNames(path).instructions(FORWARD))
    return summarize(steps, traces, prompt_tokens=len(prompt))


class TracedSession(Session):
    """A program whose runs are recorded; its state is no other session's."""

    def _load(self) -> Any:
        super()._load()
        return self._runtime._load_program(str(self.path), enable_etdump=True)

    def recorded(self) -> bytes:
        """The record of all runs since the last call.

        Raises:
            RunnerError: there is none.
        """
        with tempfile.TemporaryDirectory(prefix="lfm2-export-") as scratch:
            path = Path(scratch) / "profile.etdp"
            try:
                self._program.write_etdump_result_to_file(str(path))
                return path.read_bytes()
            except (RuntimeError, OSError) as error:
                raise RunnerError(
                    f"{self.path}: executorch {version()} recorded nothing ({error}); its own wheels can, a build of "
                    "yours needs EXECUTORCH_ENABLE_EVENT_TRACER"
                ) from error


class InstructionNames(PteFile):
    """What a method's instructions call, by their number: the record has names for most of them only."""

    def instructions(self, method: str) -> list[str]:
        """A kernel's name as the runtime has it, or a delegate's; "" for what only moves values about.

        Raises:
            RunnerError: there is no such method, or its tables are damaged.
        """
        operators, delegates = self.operators(method), self.delegates(method)
        chains = list(self._tables(self._plan(method), _PLAN_CHAINS))
        if len(chains) != 1:
            self._refuse(f"the method {named(method)} has {len(chains)} chains of instructions, not 1")
        names = []
        for instruction in self._tables(chains[0], _CHAIN_INSTRUCTIONS):
            kind, call = self._number(instruction, 0, "<B"), self._table(instruction, 1)
            index = 0 if call is None else self._number(call, 0, "<i")
            if kind == _KERNEL_CALL:
                names.append(self._item(operators, index, "operator"))
            elif kind == _DELEGATE_CALL:
                delegate = self._item(delegates, index, "delegate")
                names.append(_DELEGATES.get(delegate, f"{delegate} delegate"))
            else:
                names.append("")
        return names


def read_traces(record: bytes, instructions: Sequence[str]) -> list[Trace]:
    """What each run of a method spent, by its instructions' names."""
    # The size of what follows comes first, then the place of the root table.
    root = _Record(record, 4 + int.from_bytes(record[4:8], "little"))
    return [_trace(run, instructions) for run in root.tables(_DUMP_RUNS) if run.text(_RUN_NAME) == _RUN]


def _trace(run: _Record, instructions: Sequence[str]) -> Trace:
    trace: dict[tuple[str, ...], Spent] = {}
    for entry in run.tables(_RUN_EVENTS):
        event = entry.table(_EVENT_PROFILE)
        if event is None:
            continue
        name, part = event.text(_PROFILE_NAME), _NUMBER.sub("", event.text(_PROFILE_DELEGATE_PART))
        if not part and name not in _INSTRUCTIONS:
            continue
        index = event.number(_PROFILE_INSTRUCTION, "<i", -1)
        operator = instructions[index] if 0 <= index < len(instructions) else ""
        key = (operator, part) if part else (operator,)
        ms = 1e-6 * (event.number(_PROFILE_END, "<Q") - event.number(_PROFILE_START, "<Q"))
        trace[key] = trace.get(key, NOTHING).plus(ms)
    return trace


class _Record(Table):
    """A table of a flatbuffer, its fields by their order in the schema."""

    def number(self, field: int, form: str, default: int = 0) -> int:
        at = self.Offset(4 + 2 * field)
        return struct.unpack_from(form, self.Bytes, self.Pos + at)[0] if at else default

    def text(self, field: int) -> str:
        at = self.Offset(4 + 2 * field)
        return self.String(self.Pos + at).decode("utf-8", "replace") if at else ""

    def table(self, field: int) -> _Record | None:
        at = self.Offset(4 + 2 * field)
        return _Record(self.Bytes, self.Indirect(self.Pos + at)) if at else None

    def tables(self, field: int) -> Iterator[_Record]:
        at = self.Offset(4 + 2 * field)
        start, count = (self.Vector(at), self.VectorLen(at)) if at else (0, 0)
        return (_Record(self.Bytes, self.Indirect(start + 4 * index)) for index in range(count))
