"""Opens a .pte with ExecuTorch's Python runtime and calls its methods.

In: the path of a .pte. Out: a ``Session`` whose methods share the state, or an error that says what to do. What would
end the interpreter (a damaged file, an operator that nobody registered) is looked for before the runtime sees the file.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lfm2_export import memory
from lfm2_export.backends.arguments import check_threads
from lfm2_export.backends.executorch.pte import PteFile
from lfm2_export.backends.executorch.quiet import quiet
from lfm2_export.errors import ResourceError, RunnerError
from lfm2_export.resources import check_memory

FORWARD, READ_STATE, WRITE_STATE = "forward", "read_state", "write_state"
# Libraries that register operators, by namespace: (package, file name pattern).
_LIBRARIES = {
    "llama": ("executorch.extension.llm.custom_ops", "*custom_ops_aot_lib.*"),
    "quantized_decomposed": ("executorch.kernels.quantized", "*quantized_ops_aot_lib.*"),
}


@cache
def runtime() -> ModuleType:
    """ExecuTorch's bindings.

    Raises:
        RunnerError: they are not installed.
        ResourceError: the memory is too small for them.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see _no_other_threads
    try:
        # portable_lib, the public name of the same module, imports all that exporting needs: 2.4 s.
        import torch  # noqa: F401  (the bindings want its libraries loaded)
        from executorch.extension.pybindings import _C as bindings
    except ImportError as error:
        if memory.ran_out(error):
            raise ResourceError(
                "executorch's runtime: the memory is too small to load it; raise this process's limit (ulimit -v), or "
                "use a larger machine"
            ) from error
        raise RunnerError(
            f"executorch's Python runtime is missing ({error}); install it: pip install 'lfm2-export[executorch]'"
        ) from error
    with _silent_stderr():
        bindings._threadpool_get_thread_count()
    return bindings


class Session:
    """A loaded program.

    Raises:
        ArtifactError: there is no such file.
        RunnerError: the file is damaged, calls operators that nobody has registered, or ``threads`` are too many.
        ResourceError: the memory is too small for it.
    """

    def __init__(self, path: Path, *, threads: int | None = None):
        file = PteFile(path)
        operators = file.operators(FORWARD)
        self.path = path
        wanted = check_threads(threads)
        self._runtime = runtime()
        _check_memory(path, file.planned_bytes(FORWARD))
        register_operators(path, operators)
        self._program = self._load()
        _resize_pool(wanted)
        self._methods: dict[str, Any] = {FORWARD: self._load_method(FORWARD)}
        _live.add(self)

    @property
    def threads(self) -> int:
        """The pool's: it is one for the whole process, and the last session that was opened has set it."""
        return self._runtime._threadpool_get_thread_count()

    def call(self, method: str, inputs: Sequence[Any], done: list[Any] | None = None) -> list[np.ndarray]:
        """Runs a method on tensors; returns its outputs, copied.

        ``done`` has an element as soon as the method has run, whatever becomes of this call: a Ctrl-C that arrives
        while it runs is raised right after.

        Raises:
            RunnerError: the runtime reports a failure.
            ResourceError: the memory is too small.
        """
        import torch

        if method not in self._methods:
            self._methods[method] = self._load_method(method)
        results = [] if done is None else done
        try:
            tensors = [torch.from_numpy(value) for value in inputs]
            with _no_other_threads():
                # Nothing of Python runs between the call and the list that takes its result.
                results.extend(map(self._methods[method].call, (tensors,)))
                return [output.numpy() for output in results[-1]]
        except (RuntimeError, ValueError, MemoryError) as error:
            raise self._error(error, f"executorch failed in {method}: {' '.join(str(error).split())[:300]}") from error

    def _error(self, error: Exception, told: str) -> RunnerError | ResourceError:
        if memory.ran_out(error):
            return ResourceError(f"{self.path}: the memory is too small; export it with a smaller --max-context")
        return RunnerError(f"{self.path}: {told}")

    def constant(self, method: str) -> Any:
        """What a method without inputs returns: a number, or a list of them."""
        values = [value.item() if hasattr(value, "item") else value for value in self._load_method(method).call([])]
        return values[0] if len(values) == 1 else values

    def logits_shape(self) -> tuple[int, ...]:
        return self.output_shapes(FORWARD)[0]

    def input_shapes(self, method: str) -> list[tuple[int, ...]]:
        """As planned: a dynamic axis has its upper bound."""
        meta = self._program.method_meta(method)
        return [tuple(meta.input_tensor_meta(index).sizes()) for index in range(meta.num_inputs())]

    def output_shapes(self, method: str) -> list[tuple[int, ...]]:
        """As planned: a dynamic axis has its upper bound."""
        meta = self._program.method_meta(method)
        return [tuple(meta.output_tensor_meta(index).sizes()) for index in range(meta.num_outputs())]

    def _load(self) -> Any:
        try:
            program = self._runtime._load_program(
                str(self.path), program_verification=self._runtime.Verification.InternalConsistency
            )
        except RuntimeError as error:
            raise self._error(error, f"executorch cannot load it ({error}); export again") from error
        self._names = {program.get_method_name(index) for index in range(program.num_methods())}
        return program

    def _load_method(self, name: str) -> Any:
        if name not in self._names:
            raise RunnerError(f"{self.path}: has no method {name}; export again")
        try:
            return self._program.load_method(name)
        except RuntimeError as error:
            told = f"executorch {version()} cannot load its method {name} ({error}); it was made for another version"
            raise self._error(error, f"{told}, or a delegate is missing here: export again") from error

    def put_aside(self) -> list[np.ndarray] | None:
        """Unloads all methods; returns the state that they held, None where the program cannot hand it out."""
        state = self.call(READ_STATE, ()) if READ_STATE in self._names else None
        self._methods.clear()
        return state

    def take_up(self, state: list[np.ndarray] | None) -> None:
        """Loads what was put aside."""
        self._methods[FORWARD] = self._load_method(FORWARD)
        if state is not None:
            self.call(WRITE_STATE, state)


def _check_memory(path: Path, planned: int) -> None:
    """Refuses a program whose buffers this machine has no room for: the runtime takes all of them at once and writes to
    them, so that the system would end the process. Where the address space is limited the file, too, has to fit.

    Raises:
        ResourceError: states what is needed and what is available.
    """
    mapped = path.stat().st_size if memory.address_space_left() is not None else 0
    check_memory(planned + mapped, purpose=f"{path}: loading it", remedy="export it with a smaller --max-context")


_live: weakref.WeakSet[Session] = weakref.WeakSet()


def _resize_pool(threads: int) -> None:
    """A pool of another size is another pool, and XNNPACK keeps the address of the old one in every method that is
    loaded: to call one then ends the process. So all are loaded anew, with their state."""
    lib = runtime()
    if lib._threadpool_get_thread_count() == threads:
        return
    aside = [(session, session.put_aside()) for session in list(_live)]
    with _silent_stderr():
        lib._unsafe_reset_threadpool(threads)
    for session, state in aside:
        session.take_up(state)


def register_operators(path: Path, operators: Iterable[str]) -> None:
    """Loads the libraries that register ``operators`` ("llama::update_cache.out").

    Raises:
        RunnerError: names those that no library here has.
    """
    lib, wanted = runtime(), set(operators)
    missing = wanted - set(lib._get_operator_names())
    for namespace in sorted({name.partition("::")[0] for name in missing}):
        if namespace in _LIBRARIES:
            _load_library(*_LIBRARIES[namespace])
        elif namespace == "lfm2":
            load_kernels()
    if still := sorted(wanted - set(lib._get_operator_names())):
        raise RunnerError(
            f"{path}: needs operators that this executorch {version()} lacks: {', '.join(still)}; {_remedy(still)}"
        )


def load_kernels() -> bool:
    """Registers our own operator, building it at first use; whether there is a compiler for it.

    Raises:
        KernelBuildError: the build failed; its output is in a file that is named.
    """
    runtime()
    with quiet():  # the bindings warn that they are experimental, and import packages that warn of themselves
        from lfm2_export.kernels import ops
    return ops.load()


def _remedy(missing: Sequence[str]) -> str:
    if any(name.startswith("lfm2::") for name in missing):
        return "install CMake and a C++20 compiler, or export with --moe-op stock"
    return "install the version that the program was made with"


def _load_library(package: str, pattern: str) -> None:
    import torch

    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or [] if spec else []:
        for library in sorted(Path(folder).glob(pattern)):
            torch.ops.load_library(str(library))


def version() -> str:
    try:
        return importlib.metadata.version("executorch")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


@contextlib.contextmanager
def _no_other_threads() -> Iterator[None]:
    """llama::custom_sdpa multiplies with torch's BLAS from the threads of ExecuTorch's pool. BLAS has threads of its
    own, which wait for each other in busy loops: with more threads than cores a prefill takes up to a hundred times as
    long. The calling thread is told here to do without them; the pool's others can only be kept from waiting busily,
    by the environment that torch finds when it is loaded."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Nothing that native code writes to stderr is seen: the first look at the processor prints five lines of what it
    did not find."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
