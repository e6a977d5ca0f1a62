"""A GGUF file in llama.cpp itself, through llama-cpp-python: its kernels, int8 activations and all.

In: a file that our own reader has checked, and windows of tokens. Out: the logits of every position. Only the C
interface is used: nothing of the file's templates or tokenizer is run.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lfm2_export import paths
from lfm2_export.errors import CheckpointError
from lfm2_export.parity.sample import Window
from lfm2_export.resources import usable_cores

PACKAGE = "llama_cpp"
_LEAST_CONTEXT = 512


def is_installed() -> bool:
    """Whether llama-cpp-python is there; it is not imported."""
    return importlib.util.find_spec(PACKAGE) is not None


@cache
def _start() -> Any:
    """Once: the library made ready, and silent (it writes hundreds of lines for every file). What is returned has to
    stay, as the library holds its address."""
    import llama_cpp

    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return silence


class LlamaModel:
    """One file, opened: on the CPU, with llama.cpp's defaults for everything that changes a figure.

    Raises:
        CheckpointError: llama.cpp does not take the file.
    """

    def __init__(self, path: Path, *, vocab_size: int, threads: int | None):
        import llama_cpp

        self._library: Any = llama_cpp
        _start()
        self._path, self._vocab_size, self._threads = path, vocab_size, threads or usable_cores()
        self._context: Any = None
        self._length = 0
        self._model = self._open_model()
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        if (size := llama_cpp.llama_vocab_n_tokens(vocabulary)) != vocab_size:
            raise self._refused(f"reads a vocabulary of {size} tokens, not {vocab_size}")

    def _open_model(self) -> Any:
        settings = self._library.llama_model_default_params()
        settings.n_gpu_layers = 0
        model = self._library.llama_model_load_from_file(os.fsencode(self._path), settings)
        if not model:
            raise self._refused("does not open it")
        return model

    def _clear(self, length: int) -> None:
        """An empty state for so many tokens."""
        if length <= self._length:
            self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
            return
        self._free_context()
        settings = self._library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = self._length = max(length, _LEAST_CONTEXT)
        settings.n_threads = settings.n_threads_batch = self._threads
        self._context = self._library.llama_init_from_model(self._model, settings)
        if not self._context:
            raise self._refused(f"makes no context of {length} tokens")

    def logits(self, window: Window) -> np.ndarray:
        """float32 [T, V], from an empty state.

        Raises:
            CheckpointError: llama.cpp fails.
        """
        library, count = self._library, len(window.inputs)
        self._clear(count)
        batch = library.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for position, token in enumerate(window.inputs):
                batch.token[position], batch.pos[position] = int(token), position
                batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
                batch.logits[position] = 1
            if failed := library.llama_decode(self._context, batch):
                raise CheckpointError(
                    f"llama.cpp: computing {count} tokens failed with code {failed}; pass a smaller --max-tokens"
                )
            found = library.llama_get_logits(self._context)
            return np.ctypeslib.as_array(found, shape=(count, self._vocab_size)).copy()
        finally:
            library.llama_batch_free(batch)

    def close(self) -> None:
        """Gives its memory back; it is done when the object goes, too."""
        self._free_context()
        if self._model:
            self._library.llama_model_free(self._model)
            self._model = None

    def _free_context(self) -> None:
        if self._context:
            self._library.llama_free(self._context)
            self._context, self._length = None, 0

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self.close()

    def _refused(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{paths.shown(self._path)}: llama.cpp {reason}; is llama-cpp-python new enough? Without it, weights alone "
            "are compared"
        )
