"""GGUF files in llama.cpp itself, where llama-cpp-python is installed; without it, nothing of it is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type

from benchmarks.gguf_checkpoint import write_gguf
from lfm2_export import cli, errors
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.families.tensors import TensorClass
from lfm2_export.quality import Quality, llama, measure_quality, subjects
from tests.gguf.written import write

needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="pip install 'lfm2-export[compare]' builds llama.cpp"
)
TOKENS = 1024
QUANTIZED = (TensorClass.LINEAR, TensorClass.EXPERTS, TensorClass.EMBEDDING)


@pytest.fixture
def weights_alone() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subjects, "llama_is_installed", lambda: False)
        yield patch


def measured(path: Path, name: str) -> Quality:
    (found,) = measure_quality([path], name, max_tokens=TOKENS, threads=1).models
    print(f"{found.name}, {found.kind}: {found.kl:.2e} ± {found.kl_error:.1e}")
    return found


@needs_llama
@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_llama_cpp_computes_the_same_model(name: str, tmp_path: Path) -> None:
    """To what its float16 cache makes of it: 5e-8 was measured."""
    found = measured(write_gguf(tmp_path / "floats.gguf", open_checkpoint(name)), name)
    assert found.kind == "gguf, llama.cpp"
    assert found.kl < 1e-6
    assert found.kl > 0  # it is not the eager model that ran


@needs_llama
def test_its_activations_cost_what_weights_alone_do_not_show(tmp_path: Path, weights_alone: pytest.MonkeyPatch) -> None:
    settings = {"tokenizer.ggml.model": "no_vocab"}
    path = write(
        tmp_path / "Q8_0.gguf",
        "tiny-dense",
        type_of=lambda tensor: Type.Q8_0 if tensor.kind in QUANTIZED else Type.F32,
        settings=settings,
    )
    alone = measured(path, "tiny-dense")
    weights_alone.undo()
    whole = measured(path, "tiny-dense")
    assert (alone.kind, whole.kind) == ("gguf, weights alone", "gguf, llama.cpp")
    assert 1.5 * alone.kl < whole.kl < 10 * alone.kl  # 4.0e-5 and 1.3e-4
    assert whole.size == alone.size


def test_a_file_without_a_tokenizer_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """llama.cpp wants to be told of one. A control: without llama.cpp the weights are computed with."""
    path = write(tmp_path / "bare.gguf", "tiny-dense")
    command = ["quality", str(path), "--checkpoint", "tiny-dense", "--max-tokens", "512"]
    for installed, code in ((True, 2), (False, 0)):
        monkeypatch.setattr(subjects, "llama_is_installed", lambda installed=installed: installed)
        assert cli.main(command) == code
        said = capsys.readouterr()
        if installed:
            (line,) = said.err.splitlines()
            assert line == (
                f"lfm2-export: {path}: has no tokenizer.ggml.model, without which llama.cpp opens no file; convert the "
                "model again with its tokenizer, or pip uninstall llama-cpp-python to compare the weights alone"
            )
        else:
            assert "gguf, weights alone" in said.out


@needs_llama
def test_a_file_that_llama_cpp_does_not_take_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "odd.gguf", "tiny-dense", settings={"tokenizer.ggml.model": "of another world"})
    with pytest.raises(errors.CheckpointError, match=r"odd\.gguf: llama\.cpp does not open it; is llama-cpp-python"):
        measured(path, "tiny-dense")


def test_without_it_the_weights_are_computed_with(tmp_path: Path, weights_alone: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError

    weights_alone.setattr(llama.LlamaModel, "__init__", never)
    found = measured(write_gguf(tmp_path / "floats.gguf", open_checkpoint("tiny-dense")), "tiny-dense")
    assert (found.kind, found.kl) == ("gguf, weights alone", 0)
