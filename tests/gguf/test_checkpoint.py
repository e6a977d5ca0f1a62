"""A GGUF file as a checkpoint: the same model, config, tokenizer and template, and its very values in an artifact."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import MODEL_ARCH_NAMES
from gguf import GGMLQuantizationType as Type

import lfm2_export
from lfm2_export import cli, companions
from lfm2_export.backends.onnx import stored_weights
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.errors import CheckpointError, QuantizationError
from lfm2_export.families.tensors import EMBEDDING, ModelTensor, Part, TensorClass
from lfm2_export.gguf.settings import Settings
from lfm2_export.gguf.tokenizer import chat_templates
from lfm2_export.text import Tokenizer
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.gguf.written import default_type, write
from tests.shows import of, shows

NAMES = ("tiny-dense", "tiny-moe")
TAKEN_OVER = {"tiny-dense": ("q4", "q8"), "tiny-moe": ("q4",)}
TEXTS = (
    "What is a list?",
    "def f(x):\n\treturn x  # 12345 items",
    "naïve, 漢字 🙂",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
)


@pytest.fixture(scope="module")
def originals() -> dict[str, Checkpoint]:
    return {name: open_checkpoint(name) for name in NAMES}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, originals: dict[str, Checkpoint]) -> dict[str, Path]:
    """Both bundled checkpoints as llama-quantize would store Q4_0."""
    folder = tmp_path_factory.mktemp("gguf")

    def made(name: str) -> Path:
        original = originals[name]
        return write(
            folder / f"{name}.gguf",
            original,
            tokenizer=json.loads((original.path / "tokenizer.json").read_text()),
            settings={"tokenizer.chat_template": (original.path / "chat_template.jinja").read_text()},
        )

    return {name: made(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_it_says_of_itself_what_the_original_does(
    name: str, files: dict[str, Path], originals: dict[str, Checkpoint]
) -> None:
    found, original = open_checkpoint(files[name]), originals[name]
    assert found.config == original.config
    assert found.stop_token_ids == original.stop_token_ids
    companions.check(found)
    ours, theirs = (Tokenizer.from_dir(one.path) for one in (found, original))
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    template = (found.path / "chat_template.jinja").read_text()
    assert template == (original.path / "chat_template.jinja").read_text()


def test_transformers_reads_the_same_of_it(files: dict[str, Path]) -> None:
    """Of the dense family; it has no reader for the other."""
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    found = open_checkpoint(files["tiny-dense"])
    net = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(found.path))
    state = load_gguf_checkpoint(str(files["tiny-dense"]), return_tensors=True, model_to_load=net)["tensors"]
    for name in found.tensors:
        assert np.array_equal(state[name].numpy(), found.read(name)), name


@shows("ours", "gguf", family=of("name"), scheme=of("name", lambda name: TAKEN_OVER[name]))
@pytest.mark.parametrize("name", NAMES)
def test_an_artifact_holds_its_very_values(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    found = open_checkpoint(files[name])
    artifact = lfm2_export.export(files[name], scheme=TAKEN_OVER[name], output=tmp_path / "out")
    for program in artifact.programs:
        stored = stored_weights(artifact.path, program, found.config)
        for tensor in found.tensors:
            assert np.array_equal(stored.read(tensor), found.read(tensor)), (program.scheme, tensor)
        reasons = {tensor.reason for tensor in program.tensors}
        assert {"taken over from Q4_0", "taken over from Q6_K"} <= reasons
        assert "lfm2" in program.graphs  # Q6_K's groups of 16 included
    logits = lfm2_export.load_runner(artifact.path, scheme="q4").prefill([[1, 2, 3]])
    assert np.isfinite(logits).all()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random weights, wide enough for Q6_K."""
    folder = tmp_path_factory.mktemp("small")
    layers = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    raw = tiny_config("lfm2", hidden_size=256, num_attention_heads=4, **layers)
    return write(folder / "small.gguf", write_random_checkpoint(folder / "checkpoint", raw, seed=0))


def test_the_token_table_may_be_quantized_again(small: Path, tmp_path: Path) -> None:
    whole = lfm2_export.export(small, output=tmp_path / "whole").programs[0]
    again = lfm2_export.export(small, requantize_table=True, output=tmp_path / "again").programs[0]
    table = {tensor.name: tensor for tensor in again.tensors}[EMBEDDING.removesuffix(".weight")]
    assert table.error is not None
    assert 0 < table.error < 0.01
    assert "taken over" not in str(table.reason)
    sizes = [sum(entry.bytes for name, entry in program.files.items() if "_data" in name) for program in (whole, again)]
    print(sizes)
    assert sizes[1] < sizes[0]


def test_other_types_are_read_as_numbers_and_quantized_again(tmp_path: Path) -> None:
    raw = tiny_config("lfm2", hidden_size=64, vocab_size=131)
    original = open_checkpoint(write_random_checkpoint(tmp_path / "original", raw, seed=0))

    def type_of(tensor: ModelTensor) -> Type:
        return Type.Q5_0 if tensor.kind is TensorClass.LINEAR else Type.F16 if "embed" in tensor.name else Type.F32

    path = write(tmp_path / "model.gguf", original, type_of=type_of)
    found = open_checkpoint(path)
    assert found.exact_formats == {}
    worst = max(float(np.abs(found.read(name) - original.read(name)).max()) for name in found.tensors)
    print(worst)
    assert worst < 0.03
    program = lfm2_export.export(path, scheme="q4", output=tmp_path / "out").programs[0]
    assert any((tensor.error or 0) > 0 for tensor in program.tensors)


def test_a_head_of_its_own_is_found(tmp_path: Path) -> None:
    raw = tiny_config("lfm2", tie_word_embeddings=False)
    original = open_checkpoint(write_random_checkpoint(tmp_path / "original", raw, seed=0))
    found = open_checkpoint(write(tmp_path / "model.gguf", original))
    assert not found.config.tie_word_embeddings
    assert found.tensors["lm_head.weight"].dtype == "F32"


def test_config_and_tokenizer_may_come_from_elsewhere(
    files: dict[str, Path], originals: dict[str, Checkpoint], tmp_path: Path
) -> None:
    bare = write(tmp_path / "bare.gguf", originals["tiny-dense"])
    assert not (open_checkpoint(bare).path / "tokenizer.json").exists()
    found = open_checkpoint(bare, config_from="tiny-dense")
    assert found.path == originals["tiny-dense"].path
    with pytest.raises(CheckpointError, match="is no GGUF file and has a config of its own"):
        open_checkpoint("tiny-dense", config_from="tiny-dense")
    with pytest.raises(CheckpointError, match="the weights do not fit config"):
        open_checkpoint(bare, config_from="tiny-moe")


def test_a_pte_says_what_its_grid_costs(small: Path, tmp_path: Path) -> None:
    """XNNPACK takes no negative scales, so the weights are quantized again."""
    artifact = lfm2_export.export(small, backend="executorch", scheme="8da4w", output=tmp_path / "out")
    errors = [tensor.error for tensor in artifact.programs[0].tensors if tensor.dtype == "int4" and tensor.error]
    print(max(errors))
    assert 0 < max(errors) < 0.1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"general.architecture": ["lfm2"]}, "general.architecture=['lfm2'] is not supported; known: lfm2, lfm2moe"),
        ({"general.architecture": "llama"}, "general.architecture='llama' is not supported; known: lfm2, lfm2moe"),
        ({"general.architecture": "lfm3"}, "neither the gguf package nor llama.cpp has such an architecture"),
        ({"split.count": 3}, "is one of 3 files; join them first"),
        ({"lfm2.block_count": 0}, "block_count=0"),
        ({"lfm2.block_count": 3}, "head_count_kv"),
        ({"lfm2.attention.head_count": "four"}, "lfm2.attention.head_count='four' is of a wrong kind"),
        ({"lfm2.embedding_length": 96}, "the weights do not fit config.json"),
        ({"lfm2.rope.scaling.type": "yarn"}, "rope.scaling.type='yarn' is not supported"),
        ({"general.alignment": 7}, "general.alignment=7"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre='qwen2' is not known"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(
    settings: dict[str, object], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = open_checkpoint(write_random_checkpoint(tmp_path / "original", tiny_config("lfm2"), seed=0))
    path = write(tmp_path / "model.gguf", original, settings=settings)
    assert cli.main(["export", str(path), "-o", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert len(line) < 400
    assert not (tmp_path / "out").exists()


def test_blocks_that_do_not_end_with_rows_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = open_checkpoint(write_random_checkpoint(tmp_path / "original", tiny_config("lfm2"), seed=0))

    def type_of(tensor: ModelTensor) -> Type:
        return Type.Q8_0 if tensor.part is Part.NORMS and tensor.shape[-1] % 32 == 0 else default_type(tensor)

    path = write(tmp_path / "model.gguf", original, type_of=type_of)
    assert cli.main(["export", str(path), "-o", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is Q8_0, in blocks of 32, and a row of it has 1; convert the model again" in line
    assert not (tmp_path / "out").exists()


def test_names_in_a_file_are_no_format_strings() -> None:
    names = ["{arch:>500000000}", "{", "{0}", "{arch.x}", "tool_use"]
    stated = {
        "general.architecture": "lfm2",
        "tokenizer.chat_templates": names,
        "tokenizer.chat_template.tool_use": "x",
    }
    assert chat_templates(Settings(stated, "model.gguf")) == {"tool_use": "x"}


@pytest.mark.parametrize("normed", [True, False, 1, 0])
def test_weights_of_experts_are_normed_as_stated(normed: bool | int, tmp_path: Path) -> None:
    original = open_checkpoint(write_random_checkpoint(tmp_path / "original", tiny_config("lfm2_moe"), seed=0))
    path = write(tmp_path / "model.gguf", original, settings={"lfm2moe.expert_weights_norm": normed})
    assert open_checkpoint(path).config.norm_topk_prob is bool(normed)


def test_the_gguf_package_still_knows_no_lfm3() -> None:
    """Once it does, such files can be read, and are no longer to be refused."""
    assert "lfm3" not in MODEL_ARCH_NAMES.values()
    assert "lfm2" in MODEL_ARCH_NAMES.values()


def test_widths_that_are_there_are_not_chosen_again(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="is quantized already, and its widths are taken over"):
        lfm2_export.export(files["tiny-dense"], target_bits=5.0, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_its_unpacked_files_go_with_it(files: dict[str, Path]) -> None:
    found = open_checkpoint(files["tiny-dense"])
    folder = found.path
    assert (folder / "config.json").is_file()
    del found
    assert not folder.exists()


def test_types_are_those_that_llama_quantize_chooses(originals: dict[str, Checkpoint]) -> None:
    kinds = {default_type(tensor) for tensor in originals["tiny-moe"].model_tensors.values()}
    assert kinds == {Type.Q4_0, Type.Q6_K, Type.F32}
