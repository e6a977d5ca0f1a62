"""Opens a .pte with ExecuTorch's Python runtime and calls its methods.

In: the path of a .pte. Out: a ``Session`` whose methods share the state, or an error that says what to do. What would
end the interpreter (a damaged file, an operator that nobody registered) is looked for before the runtime sees the file.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lfm2_export.backends.base import check_threads
from lfm2_export.backends.executorch.pte import PteFile
from lfm2_export.errors import RunnerError

FORWARD, READ_STATE, WRITE_STATE = "forward", "read_state", "write_state"
# Libraries that register operators, by namespace: (package, file name pattern).
_LIBRARIES = {
    "llama": ("executorch.extension.llm.custom_ops", "*custom_ops_aot_lib.*"),
    "quantized_decomposed": ("executorch.kernels.quantized", "*quantized_ops_aot_lib.*"),
}


def runtime() -> ModuleType:
    """ExecuTorch's bindings.

    Raises:
        RunnerError: they are not installed.
    """
    try:
        with _quiet():
            from executorch.extension.pybindings import portable_lib
    except ImportError as error:
        raise RunnerError(
            f"executorch's Python runtime is missing ({error}); install it: pip install 'lfm2-export[executorch]'"
        ) from error
    return portable_lib


class Session:
    """A loaded program.

    Raises:
        ArtifactError: there is no such file.
        RunnerError: the file is damaged, calls operators that nobody has registered, or ``threads`` are too many.
    """

    def __init__(self, path: Path, *, threads: int | None = None):
        operators = PteFile(path).operators(FORWARD)
        self.path = path
        self.threads = check_threads(threads)
        self._runtime = runtime()
        register_operators(path, operators)
        self._program = self._load()
        self._methods: dict[str, Any] = {FORWARD: self._load_method(FORWARD)}

    def call(self, method: str, inputs: Sequence[Any]) -> list[np.ndarray]:
        """Runs a method on tensors; returns its outputs, copied.

        Raises:
            RunnerError: the runtime reports a failure.
        """
        import torch

        if method not in self._methods:
            self._methods[method] = self._load_method(method)
        self._set_threads()
        tensors = [torch.from_numpy(value) for value in inputs]
        try:
            return [output.numpy() for output in self._methods[method].call(tensors)]
        except (RuntimeError, ValueError) as error:
            raise RunnerError(
                f"{self.path}: executorch failed in {method}: {' '.join(str(error).split())[:300]}"
            ) from error

    def constant(self, method: str) -> Any:
        """What a method without inputs returns: a number, or a list of them."""
        values = [value.item() if hasattr(value, "item") else value for value in self._load_method(method).call([])]
        return values[0] if len(values) == 1 else values

    def logits_shape(self) -> tuple[int, ...]:
        return self.output_shapes(FORWARD)[0]

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
            raise RunnerError(f"{self.path}: executorch cannot load it ({error}); export again") from error
        self._names = {program.get_method_name(index) for index in range(program.num_methods())}
        return program

    def _load_method(self, name: str) -> Any:
        if name not in self._names:
            raise RunnerError(f"{self.path}: has no method {name}; export again")
        try:
            return self._program.load_method(name)
        except RuntimeError as error:
            raise RunnerError(
                f"{self.path}: executorch {version()} cannot load its method {name} ({error}); it was made for another "
                "version, or a delegate is missing here"
            ) from error

    def _set_threads(self) -> None:
        """The pool is one for the whole process, so another runner may have resized it."""
        if self._runtime._threadpool_get_thread_count() != self.threads:
            self._runtime._unsafe_reset_threadpool(self.threads)


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
    with _quiet():
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
def _quiet() -> Iterator[None]:
    """The bindings warn that they are experimental, and import packages that warn of themselves."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(previous)
