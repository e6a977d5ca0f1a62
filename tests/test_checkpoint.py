"""The checkpoint reader: what it reads, how it reads it, and the text of every refusal."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from lfm2_export import paths
from lfm2_export.checkpoint import Checkpoint, check_finite, is_finite, open_checkpoint
from lfm2_export.errors import CheckpointError, ConfigError, Lfm2ExportError
from lfm2_export.source import BUNDLED
from tests.checkpoints import tiny_config, to_stored, write_header, write_random_checkpoint

EXPERT = "model.layers.2.feed_forward.experts.3."
SINGLE = "model.safetensors"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "moe", tiny_config("lfm2_moe"), seed=1)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "sharded", tiny_config("lfm2_moe"), seed=1, shards=3)


def refusal(name: Path | str, kind: type[Lfm2ExportError] = CheckpointError, **options: Any) -> str:
    """The one line that opening ``name`` raises."""
    with pytest.raises(kind) as caught:
        open_checkpoint(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    print(message[:400])
    return message


def refusal_with_details(name: Path) -> tuple[str, tuple[str, ...]]:
    """The line, and what ``--verbose`` shows behind it."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(name)
    print(caught.value)
    return str(caught.value), caught.value.details


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrites the header of a safetensors file and leaves its data alone."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    write_raw_header(path, json.dumps(header).encode(), raw[8 + length :])


def write_raw_header(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def all_tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


# What it reads


@pytest.mark.parametrize("model_type", ["lfm2", "lfm2_moe"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_values_equal_those_of_the_safetensors_library(tmp_path: Path, model_type: str, dtype: str) -> None:
    folder = write_random_checkpoint(tmp_path, tiny_config(model_type, conv_bias=True), seed=2, dtype=dtype)
    checkpoint = open_checkpoint(folder)
    with safe_open(folder / SINGLE, framework="pt") as reference:
        assert set(reference.keys()) == set(checkpoint.tensors)
        for name in checkpoint.tensors:
            expected = reference.get_tensor(name)
            np.testing.assert_array_equal(checkpoint.read(name), expected.float().numpy())
            assert checkpoint.tensors[name].shape == tuple(expected.shape)
            assert checkpoint.tensors[name].dtype == dtype
    assert checkpoint.read("model.embedding_norm.weight").dtype == np.float32
    print(f"{len(checkpoint.tensors)} tensors equal, {checkpoint.total_bytes} bytes")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_layout_on_disk_does_not_show(tmp_path: Path, moe: Path, fused: bool, shards: int) -> None:
    other = write_random_checkpoint(tmp_path / "other", tiny_config("lfm2_moe"), seed=1, fused=fused, shards=shards)
    expected, found = all_tensors(open_checkpoint(moe)), all_tensors(open_checkpoint(other))
    assert list(expected) == list(found)
    for name, value in expected.items():
        np.testing.assert_array_equal(value, found[name])


def test_fused_experts_equal_what_transformers_would_stack(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path, tiny_config("lfm2_moe"), seed=1, fused=True)
    checkpoint = open_checkpoint(folder)
    with safe_open(folder / SINGLE, framework="pt") as reference:
        gate_up = reference.get_tensor("model.layers.2.feed_forward.experts.gate_up_proj").float().numpy()
        down = reference.get_tensor("model.layers.2.feed_forward.experts.down_proj").float().numpy()
    w1, w3 = checkpoint.read(EXPERT + "w1.weight"), checkpoint.read(EXPERT + "w3.weight")
    np.testing.assert_array_equal(np.concatenate([w1, w3]), gate_up[3])
    np.testing.assert_array_equal(checkpoint.read(EXPERT + "w2.weight"), down[3])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rows", [slice(0, 5), slice(7, 20), slice(30, None), slice(-3, None), slice(4, 4), None])
def test_reads_a_range_of_rows(tmp_path: Path, fused: bool, rows: slice | None) -> None:
    folder = write_random_checkpoint(tmp_path, tiny_config("lfm2_moe"), seed=1, fused=fused)
    checkpoint = open_checkpoint(folder)
    name = EXPERT + "w3.weight"
    whole = checkpoint.read(name)
    np.testing.assert_array_equal(checkpoint.read(name, rows), whole if rows is None else whole[rows])


def test_raw_reads_keep_the_stored_dtype(moe: Path) -> None:
    checkpoint = open_checkpoint(moe)
    raw = checkpoint.read_raw("model.embed_tokens.weight", slice(2, 9))
    assert raw.dtype == np.uint16
    np.testing.assert_array_equal(to_stored(checkpoint.read("model.embed_tokens.weight")[2:9], "BF16"), raw)


@pytest.mark.parametrize("rows", [None, slice(3, 20), slice(4, 4)])
def test_raw_blocks_are_the_raw_rows_in_order(moe: Path, rows: slice | None) -> None:
    checkpoint = open_checkpoint(moe)
    for name in ("model.embed_tokens.weight", NORM):
        raw = checkpoint.read_raw(name, rows)
        blocks = [block.copy() for block in checkpoint.read_raw_blocks(name, rows, 8)]
        assert all(len(block) == 8 for block in blocks[:-1])
        np.testing.assert_array_equal(np.concatenate([raw[:0], *blocks]), raw)


def test_special_values_survive_the_conversion(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path, tiny_config("lfm2"), seed=1)
    info = open_checkpoint(folder).tensors["model.embedding_norm.weight"]
    bits = np.array([0x0001, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x3F80] + [0] * 58, np.uint16)
    with open(info.file, "r+b") as file:
        file.seek(info.offset)
        file.write(bits.tobytes())
    value = open_checkpoint(folder).read("model.embedding_norm.weight")
    np.testing.assert_array_equal(value[:6], np.array([2**-133, -0.0, np.inf, -np.inf, np.nan, 1.0], np.float32))


def test_reading_needs_no_memory_beside_the_result_and_maps_no_file(tmp_path: Path) -> None:
    config = tiny_config("lfm2", vocab_size=60_001)
    checkpoint = open_checkpoint(write_random_checkpoint(tmp_path, config, seed=1))
    checkpoint.read("model.embedding_norm.weight")
    tracemalloc.start()
    value = checkpoint.read("model.embed_tokens.weight")
    beside = tracemalloc.get_traced_memory()[1] - value.nbytes
    tracemalloc.stop()
    print(f"{value.nbytes} bytes read, {beside} bytes beside them")
    assert beside < 1 << 20
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path) not in maps.read_text()


def test_a_tied_head_stored_again_is_left_out(moe: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_head(moe, change=0)
    with caplog.at_level("INFO"):
        checkpoint = open_checkpoint(moe)
    assert "lm_head.weight" not in checkpoint.tensors
    assert "lm_head.weight repeats the tied model.embed_tokens.weight" in caplog.text


def test_a_tied_head_with_values_of_its_own_is_used(moe: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_head(moe, change=1)
    with caplog.at_level(logging.WARNING):
        assert "lm_head.weight" in open_checkpoint(moe).tensors
    assert "lm_head.weight differs from model.embed_tokens.weight, though config.json ties them" in caplog.text


def add_head(folder: Path, change: int) -> None:
    """Stores the embedding a second time as lm_head.weight, its last byte changed."""
    info = open_checkpoint(folder).tensors["model.embed_tokens.weight"]
    path = folder / SINGLE
    data = path.read_bytes()[info.offset : info.offset + info.nbytes]
    end = path.stat().st_size - int.from_bytes(path.read_bytes()[:8], "little") - 8
    head = {"dtype": "BF16", "shape": list(info.shape), "data_offsets": [end, end + len(data)]}
    edit_header(path, lambda header: header.update({"lm_head.weight": head}))
    with open(path, "ab") as file:
        file.write(data[:-1] + bytes([data[-1] ^ change]))


def test_an_untied_head_is_read(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path, tiny_config("lfm2", tie_word_embeddings=False), seed=1)
    assert open_checkpoint(folder).read("lm_head.weight").shape == (131, 64)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_checkpoints_open_by_name(name: str) -> None:
    checkpoint = open_checkpoint(name)
    print(f"{name}: {checkpoint.parameter_count} parameters, {checkpoint.total_bytes} bytes")
    assert checkpoint.total_bytes <= 12_000_000
    assert {info.dtype for info in checkpoint.tensors.values()} <= {"BF16", "F32"}
    assert {"tokenizer.json", "chat_template.jinja", "LICENSE"} <= {path.name for path in checkpoint.files()}
    for tensor in checkpoint.tensors:
        check_finite(tensor, checkpoint.read(tensor))


def test_figures_for_inspect(moe: Path) -> None:
    checkpoint = open_checkpoint(moe)
    with safe_open(moe / SINGLE, framework="pt") as reference:
        count = sum(reference.get_tensor(name).numel() for name in reference.keys())  # noqa: SIM118
    assert checkpoint.parameter_count == count
    assert checkpoint.total_bytes == 2 * count
    parts = checkpoint.parts()
    print(parts)
    assert sum(params for params, _ in parts.values()) == count
    assert parts["experts"] == (4 * 4 * 3 * 32 * 64, 4 * 4 * 3 * 32 * 64 * 2)
    assert parts["routers"][0] == 4 * (4 * 64 + 4)
    assert parts["norms"][0] == 11 * 64 + 2 * 2 * 16
    assert checkpoint.active_parameter_count == count - parts["experts"][0] // 2


def test_hashes_are_of_the_bytes_and_of_the_configs_meaning(moe: Path, sharded: Path) -> None:
    one, three = open_checkpoint(moe), open_checkpoint(sharded)
    expected = hashlib.sha256((moe / SINGLE).read_bytes()).hexdigest()
    assert one.shard_hashes() == {SINGLE: expected}
    assert list(three.shard_hashes()) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    before = one.config_sha256
    edit_json(moe / "config.json", lambda config: config.update(transformers_version="5.99"))
    assert open_checkpoint(moe).config_sha256 == before
    edit_json(moe / "config.json", lambda config: config.update(norm_eps=1e-6))
    assert open_checkpoint(moe).config_sha256 != before


def test_companion_files_are_those_that_exist(moe: Path) -> None:
    for name in ("LICENSE", "tokenizer.json", "chat_template.jinja", "modeling_evil.py"):
        (moe / name).write_text("x")
    names = [path.name for path in open_checkpoint(moe).files()]
    assert names == ["tokenizer.json", "chat_template.jinja", "LICENSE"]


def test_importing_the_reader_imports_no_torch() -> None:
    code = "import sys, lfm2_export.checkpoint; print([m for m in ('torch', 'huggingface_hub') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# Config


def test_refuses_a_folder_without_config(tmp_path: Path) -> None:
    assert f"{tmp_path}: has no config.json; give a checkpoint's own folder" in refusal(tmp_path)


def test_refuses_a_config_that_is_not_a_json_object(moe: Path) -> None:
    (moe / "config.json").write_text("{'model_type': 1}")
    assert "config.json: is not JSON (Expecting property name" in refusal(moe)
    (moe / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "config.json: is not JSON" in refusal(moe)
    (moe / "config.json").write_text("[" * 100_000)
    assert "config.json: is not JSON" in refusal(moe)
    (moe / "config.json").write_text("[1]")
    assert "config.json: holds [1], not a JSON object; bring back the original" in refusal(moe)


def test_refuses_foreign_model_types_and_names_the_known(moe: Path) -> None:
    edit_json(moe / "config.json", lambda config: config.update(model_type="llama"))
    assert "model_type='llama' is not supported; known families: lfm2, lfm2_moe" in refusal(moe)
    edit_json(moe / "config.json", lambda config: config.update(model_type=["lfm2"]))
    assert "model_type=['lfm2'] is not supported" in refusal(moe)
    edit_json(moe / "config.json", lambda config: config.pop("model_type"))
    assert "model_type is missing; expected one of lfm2, lfm2_moe" in refusal(moe)


def test_refuses_config_values_out_of_range(moe: Path) -> None:
    edit_json(moe / "config.json", lambda config: config.update(num_key_value_heads=3))
    assert "num_attention_heads=4 is not a multiple of num_key_value_heads=3" in refusal(moe, ConfigError)


def test_refuses_a_config_that_contradicts_the_shapes(moe: Path) -> None:
    edit_json(moe / "config.json", lambda config: config.update(moe_intermediate_size=48))
    message, details = refusal_with_details(moe)
    assert "the weights do not fit config.json; 48 wrong shape: " in message
    first = "model.layers.1.feed_forward.experts.0.w1.weight is [32, 64], config.json asks for [48, 64]"
    assert first in message
    assert "more; use the config.json of these weights" in message
    assert len(details) == 48
    assert details[0] == f"wrong shape: {first}"


def test_refuses_fused_tensors_of_another_shape(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path, tiny_config("lfm2_moe"), seed=1, fused=True)
    edit_json(folder / "config.json", lambda config: config.update(num_experts=5, use_expert_bias=False))
    message, details = refusal_with_details(folder)
    assert "4 left over: model.layers.1.feed_forward.expert_bias" in message
    assert "config.json; 4 left over: " in message
    assert "; 12 wrong shape: " in message
    name = "model.layers.1.feed_forward.experts.gate_up_proj"
    assert f"wrong shape: {name} is [4, 64, 64], config.json asks for [5, 64, 64]" in details


# Names of tensors


def test_names_every_missing_and_left_over_tensor(moe: Path) -> None:
    def rename(header: dict[str, Any]) -> None:
        for expert in range(4):
            name = f"model.layers.2.feed_forward.experts.{expert}.w1.weight"
            header[name.replace("w1", "gate_proj")] = header.pop(name)

    edit_header(moe / SINGLE, rename)
    message, details = refusal_with_details(moe)
    first = EXPERT.replace("3.", "0.")
    assert (
        f"{moe}: the weights do not fit config.json; 4 missing: {first}w1.weight and 3 more; 4 left over: " in message
    )
    assert f"{first}gate_proj.weight and 3 more; use the config.json of these weights" in message
    prefix = "model.layers.2.feed_forward.experts."
    assert details == (
        *(f"missing: {prefix}{expert}.w1.weight" for expert in range(4)),
        *(f"left over: {prefix}{expert}.gate_proj.weight" for expert in range(4)),
    )


def test_refuses_experts_stored_twice(moe: Path) -> None:
    (moe / SINGLE).rename(moe / "one.safetensors")
    fused = "model.layers.2.feed_forward.experts.down_proj"
    with open(moe / "two.safetensors", "wb") as file:
        write_header(file, {fused: ("BF16", (4, 64, 32))})
        file.write(bytes(4 * 64 * 32 * 2))
    with safe_open(moe / "one.safetensors", framework="pt") as file:
        weight_map = dict.fromkeys(file.keys(), "one.safetensors") | {fused: "two.safetensors"}
    (moe / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert f"1 left over: {fused}" in refusal(moe)


# Weight files


def test_refuses_a_folder_without_weights(moe: Path) -> None:
    (moe / SINGLE).unlink()
    assert f"{moe}: has neither model.safetensors nor model.safetensors.index.json" in refusal(moe)


def test_refuses_a_folder_that_may_not_be_read(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path) == moe:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path)

    checkpoint = open_checkpoint(moe)
    (moe / "model.safetensors").unlink()
    monkeypatch.setattr(paths.os, "scandir", scandir)
    assert f"{moe}: cannot be looked at (Permission denied); check the name" in refusal(moe)
    with pytest.raises(CheckpointError, match="Permission denied"):
        checkpoint.files()


def test_refuses_pickled_weights_unopened(moe: Path) -> None:
    (moe / SINGLE).rename(moe / "pytorch_model.bin")
    message = refusal(moe)
    assert "holds only pickled weights (pytorch_model.bin), which can run code" in message
    assert "save the model as safetensors" in message


def test_names_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    message = refusal(sharded)
    assert "model-00002-of-00003.safetensors: is missing, but model.safetensors.index.json names it" in message


@pytest.mark.parametrize(
    "file", ["../model-00001-of-00003.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "C:\\a", 7, ["a"]]
)
def test_refuses_an_index_that_names_files_outside_the_folder(sharded: Path, file: object) -> None:
    def point_outside(index: dict[str, Any]) -> None:
        index["weight_map"]["model.embedding_norm.weight"] = file

    edit_json(sharded / "model.safetensors.index.json", point_outside)
    assert f"index.json: names the file {file!r}, which is not a plain name in its folder" in refusal(sharded)


def test_refuses_an_index_that_disagrees_with_its_shards(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    good = index.read_text()
    first = "model-00001-of-00003.safetensors"
    edit_json(index, lambda value: value["weight_map"].update({"model.extra": first}))
    assert f"index.json: says that {first} holds model.extra, which it does not" in refusal(sharded)
    index.write_text(good)
    edit_json(index, lambda value: value["weight_map"].pop("model.embed_tokens.weight"))
    assert "model.embed_tokens.weight" in open_checkpoint(sharded).tensors  # as transformers: whole files are read
    index.write_text('{"weight_map": []}')
    assert "index.json: weight_map is missing or not an object" in refusal(sharded)
    index.write_text("{")
    assert "index.json: is not JSON" in refusal(sharded)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 20_000, -1])
def test_names_a_truncated_shard(sharded: Path, keep: int) -> None:
    path = sharded / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(sharded)
    assert message.startswith(f"{path}: is truncated (")
    assert "download it again" in message


def test_refuses_a_giant_header_before_reading_it(moe: Path) -> None:
    (moe / SINGLE).write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    assert f"states a header of {1 << 60} bytes, at most 16777216 are read; it is not a safe" in refusal(moe)


def test_recognizes_a_git_lfs_pointer(moe: Path) -> None:
    (moe / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "model.safetensors: is a git-lfs pointer, not the weights; run `git lfs pull`" in refusal(moe)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"{", "is not JSON (Expecting property name"),
        (b"\xff\xff", "is not JSON ('utf-8' codec can't decode"),
        (b"[" * 50_000, "is not JSON (maximum recursion depth"),
        (b"[]", "is not a JSON object"),
        (b'{"a": 1, "a": 2}', "names a twice"),
    ],
)
def test_refuses_a_damaged_header(moe: Path, header: bytes, reason: str) -> None:
    write_raw_header(moe / SINGLE, header)
    message = refusal(moe)
    assert f"model.safetensors: its header {reason}" in message
    assert message.endswith("; download it again")


NORM = "model.embedding_norm.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shape": [32]}, "its shape [32] in BF16 needs 64 bytes; the file was altered"),
        ({"dtype": "F32"}, "its shape [64] in F32 needs 256 bytes; the file was altered"),
        ({"dtype": "F8_E4M3"}, "its shape [64] in F8_E4M3 needs 64 bytes; the file was altered"),
        ({"dtype": "I16"}, f"{NORM} is stored as I16, which is no floating-point type that weights are read in"),
        ({"dtype": "Q4"}, "is stored as Q4, which the format does not know"),
        ({"shape": [-64]}, f"the header's entry {NORM} is damaged"),
        ({"shape": [True]}, f"the header's entry {NORM} is damaged"),
        ({"shape": None}, f"the header's entry {NORM} is damaged"),
        ({"data_offsets": [0]}, f"the header's entry {NORM} is damaged"),
        ({"data_offsets": [128, 0]}, "(-128 bytes)"),
        ({"data_offsets": [0, 128]}, "overlaps the tensor before it"),
        ({"data_offsets": [10**12, 10**12 + 128]}, "leaves a hole before it"),
    ],
)
def test_refuses_an_altered_entry(moe: Path, change: dict[str, Any], reason: str) -> None:
    edit_header(moe / SINGLE, lambda header: header[NORM].update(change))
    assert reason in refusal(moe)


def test_refuses_bytes_after_the_last_tensor(moe: Path) -> None:
    with open(moe / SINGLE, "ab") as file:
        file.write(b"1234")
    assert "has 4 bytes after its last tensor; the file was altered" in refusal(moe)


def test_notices_a_shard_that_changes_after_it_was_opened(moe: Path) -> None:
    checkpoint = open_checkpoint(moe)
    with open(moe / SINGLE, "ab") as file:
        file.write(b"1")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: was changed while it was being read"):
        checkpoint.read(NORM)
    (moe / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read \(No such file"):
        checkpoint.read(NORM)


# Values


@pytest.mark.parametrize(("value", "text"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
def test_names_the_tensor_with_values_that_are_not_finite(value: float, text: str) -> None:
    array = np.ones((4, 5), np.float32)
    check_finite("good", array)
    check_finite("empty", array[:0])
    array[2, 3] = array[3, 0] = value
    with pytest.raises(CheckpointError) as caught:
        check_finite("model.layers.0.conv.in_proj.weight", array)
    assert str(caught.value) == (
        f"model.layers.0.conv.in_proj.weight: 2 of 20 values are not finite, first {text} at [2, 3]; "
        "the weights are damaged, download or train them again"
    )


@pytest.mark.parametrize("broken", [0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7F81, 0xFFFF])
def test_bits_that_are_not_finite_are_seen_among_all_others(broken: int) -> None:
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    finite = bits[(bits & 0x7F80) != 0x7F80]
    assert is_finite(finite)
    assert is_finite(finite[:0])
    assert not is_finite(np.append(finite, np.uint16(broken)))
    values = np.array([broken << 16], np.uint32).view(np.float32)
    for stored in (values, values.astype(np.float16)):
        assert is_finite(np.ones(3, stored.dtype))
        assert not is_finite(np.append(np.ones(3, stored.dtype), stored))
