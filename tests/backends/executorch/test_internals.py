"""What of executorch and torch is used or replaced that is no interface of theirs: CONTRIBUTING's table, line by line.

Each test says in its failure which line of the table is no longer true.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from lfm2_export.backends.executorch import xnnpack
from lfm2_export.backends.executorch.session import runtime

ROOT = Path(__file__).parents[3]


def test_the_emitter_calls_bytes_and_hashlib_by_these_names() -> None:
    from executorch.exir._serialize._cord import FileBackedData
    from executorch.exir.emit import _emitter

    source = inspect.getsource(_emitter)
    assert "bytes(" in source
    assert "hashlib.sha256(" in source
    assert "sha256" in dir(FileBackedData)


def test_delegates_are_prepared_by_a_pass_manager_of_this_name() -> None:
    from executorch.backends.xnnpack import xnnpack_preprocess

    assert "XNNPACKPassManager(" in inspect.getsource(xnnpack_preprocess)
    stock = xnnpack_preprocess.XNNPACKPassManager
    with xnnpack.few_passes():
        assert xnnpack_preprocess.XNNPACKPassManager is not stock
    assert xnnpack_preprocess.XNNPACKPassManager is stock


def test_the_bindings_set_the_size_of_the_thread_pool() -> None:
    assert {"_unsafe_reset_threadpool", "_threadpool_get_thread_count"} <= set(dir(runtime()))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch._subclasses.fake_tensor", "FakeTensorMode"),
        ("torch._inductor.runtime.cache_dir_utils", "default_cache_dir"),
        ("torch.ao.quantization.fx._decomposed", "quantized_decomposed_lib"),
        ("executorch.exir.passes._quant_patterns_and_replacements", "quantized_decomposed_lib"),
    ],
)
def test_private_modules_are_where_they_were(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


def test_every_private_name_of_them_is_in_the_table() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in ("_emitter", "_cord", "XNNPACKPassManager", "_unsafe_reset_threadpool", "_subclasses", "_inductor"):
        assert name in table
