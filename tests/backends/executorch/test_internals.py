"""What of executorch and torch is used or replaced that is no interface of theirs: CONTRIBUTING's table, line by line.

Each test says in its failure which line of the table is no longer true.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from pathlib import Path

import pytest
import torch

from lfm2_export.backends.executorch import retracing, trace, xnnpack
from lfm2_export.backends.executorch.session import runtime
from tests.backends.executorch.programs import checkpoint_of, make

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


def test_the_passes_of_delegates_retrace_by_their_base() -> None:
    """And what they put in has no value before that."""
    for stock in xnnpack._PASSES:
        source = inspect.getsource(stock.call)
        assert "super().call(" in source
        assert "meta" not in source.partition("create_node(")[2].partition(")")[0]


def test_what_is_not_traced_again_makes_the_same_file(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoint_of("lfm2_moe", layer_types=("conv", "full_attention"), num_dense_layers=1)
    ours = make(checkpoint, "8da4w").path.read_bytes()
    asked: list[str] = []
    monkeypatch.setattr(trace, "decompose_once_", lambda method, whole: asked.append("decompose") or method)
    monkeypatch.setattr(trace, "remember_outputs_", lambda edge: asked.append("outputs"))
    monkeypatch.setattr(trace, "shared_provenance", contextlib.nullcontext)
    monkeypatch.setattr(xnnpack, "_sparing", lambda stock: asked.append("passes") or stock)
    stock = make(checkpoint, "8da4w").path.read_bytes()
    assert {"decompose", "outputs", "passes"} <= set(asked)
    assert stock == ours


def test_a_delegate_given_other_shapes_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its noted outputs are for the shapes that it was made for."""

    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x

    exported = torch.export.export(Twice(), (torch.ones(2, 3),), dynamic_shapes=({0: torch.export.Dim("T")},))
    real = exported.module
    runs: list[int] = []
    monkeypatch.setattr(exported, "module", lambda: runs.append(1) or real())
    retracing._remember_outputs_(exported)
    given = next(iter(exported.graph.nodes)).meta["val"]
    with given.fake_mode:
        (noted,) = exported.module()(given)
    assert runs == []
    assert noted.shape[1:] == (3,)
    assert exported.module()(torch.ones(4, 3)).tolist() == [[2.0] * 3] * 4
    assert runs == [1]


def test_the_bindings_set_the_size_of_the_thread_pool() -> None:
    assert {"_unsafe_reset_threadpool", "_threadpool_get_thread_count"} <= set(dir(runtime()))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch._subclasses.fake_tensor", "FakeTensorMode"),
        ("torch.fx.traceback", "NodeSource"),
        ("executorch.exir.tracer", "_default_decomposition_table"),
        ("executorch.exir.lowered_backend_module", "LoweredBackendModule"),
        ("torch._inductor.runtime.cache_dir_utils", "default_cache_dir"),
        ("torch.ao.quantization.fx._decomposed", "quantized_decomposed_lib"),
        ("executorch.exir.passes._quant_patterns_and_replacements", "quantized_decomposed_lib"),
    ],
)
def test_private_modules_are_where_they_were(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


def test_every_private_name_of_them_is_in_the_table() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in (
        "_emitter",
        "_cord",
        "XNNPACKPassManager",
        "_unsafe_reset_threadpool",
        "_subclasses",
        "_inductor",
        "NodeSource",
        "_default_decomposition_table",
    ):
        assert name in table
