"""The command line as a person meets it: exit codes, one line for every mistake, nothing half-written."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lfm2_export import cli
from lfm2_export.kernels import build, targets
from lfm2_export.manifest import MANIFEST
from lfm2_export.resources import processor_name, usable_cores
from tests.checkpoints import tiny_config, write_random_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LFM2-MoE checkpoint with the bundled tokenizer's vocabulary size kept small: no tokenizer."""
    return write_random_checkpoint(tmp_path_factory.mktemp("cli") / "checkpoint", tiny_config("lfm2_moe"), seed=3)


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of one command in this process."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def assert_refused(result: tuple[int, str, str], *words: str, code: int = 2) -> None:
    """Exit code, one line on stderr that has all the words, no traceback, nothing on stdout."""
    found, out, err = result
    lines = [line for line in err.splitlines() if line.startswith("lfm2-export: ")]  # the others say what was begun
    assert found == code, (found, err)
    assert len(lines) == 1, err
    assert err.splitlines()[-1] == lines[0]
    for word in words:
        assert word in lines[0], f"{word!r} not in {lines[0]!r}"
    assert out == ""


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage."""
    copy = tmp_path / "broken"
    copy.mkdir()
    for path in checkpoint.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """Where an export that must fail would write; checked afterwards."""
    folder = tmp_path / "output"
    before = sorted(tmp_path.iterdir())
    yield folder
    left = [path for path in tmp_path.iterdir() if path not in before and path.name != "broken"]
    assert left == [], f"left behind: {left}"


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for verb in ("export", "run", "chat", "parity", "bench", "inspect", "support", "demo"):
        assert f"\n    {verb} " in out


def test_version_names_every_runtime(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert out.splitlines()[0].startswith("lfm2-export ")
    assert any(line.startswith("onnxruntime 1.") for line in out.splitlines())
    library = build.built_onnx_library()
    name = "not built yet" if library is None else targets.chosen(targets.runnable(library))
    assert out.splitlines()[-1] == f"our kernels: {name}"
    assert out.splitlines()[-2] == f"processor: {processor_name()}, threads: {usable_cores()}"


def test_no_verb_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys)
    assert code == 2
    assert "COMMAND" in err


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(run(capsys, "convert"), "'convert'", "it may be: export, run, chat")


def test_no_such_checkpoint(capsys: pytest.CaptureFixture[str], output: Path) -> None:
    assert_refused(run(capsys, "export", "no-such-thing", "-o", output), "no-such-thing", "no such directory", "Hub id")


def test_hub_id_that_is_not_cached_offline(capsys: pytest.CaptureFixture[str], output: Path) -> None:
    arguments = ("export", "nobody/nothing", "--offline", "-o", output)
    assert_refused(run(capsys, *arguments), "nobody/nothing", "cache", "offline")


def test_folder_without_config(capsys: pytest.CaptureFixture[str], broken: Path, output: Path) -> None:
    (broken / "config.json").unlink()
    assert_refused(run(capsys, "export", broken, "-o", output), str(broken), "has no config.json")


def _edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "llama"}, ("model_type='llama'", "lfm2, lfm2_moe")),
        ({"num_key_value_heads": 3}, ("num_attention_heads=4", "num_key_value_heads=3")),
        ({"conv_L_cache": 0}, ("conv_L_cache=0", "integer from 2")),
        ({"norm_eps": "small"}, ("norm_eps='small'", "finite number")),
        ({"hidden_size": 96}, ("embed_tokens.weight is [131, 64]", "asks for [131, 96]")),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, ("rope_type='yarn'", "default")),
        ({"layer_types": None}, ("layer_types is missing", "lfm2_moe")),
    ],
)
def test_config_that_cannot_be(
    capsys: pytest.CaptureFixture[str], broken: Path, output: Path, values: dict[str, object], words: tuple[str, ...]
) -> None:
    _edit_config(broken, **values)
    assert_refused(run(capsys, "export", broken, "-o", output), *words)


def test_weights_that_are_missing(capsys: pytest.CaptureFixture[str], broken: Path, output: Path) -> None:
    (broken / "model.safetensors").unlink()
    assert_refused(run(capsys, "export", broken, "-o", output), "model.safetensors", "download the weights")


def test_shard_that_is_truncated(capsys: pytest.CaptureFixture[str], broken: Path, output: Path) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(run(capsys, "export", broken, "-o", output), "model.safetensors", "truncated")


def test_index_that_names_a_file_outside(capsys: pytest.CaptureFixture[str], broken: Path, output: Path) -> None:
    (broken / "model.safetensors").rename(broken / "moved.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "../moved.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(run(capsys, "export", broken, "-o", output), "../moved.safetensors", "not a plain name")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("scheme", ["fp32", "q4"])
def test_weights_that_are_not_finite(
    capsys: pytest.CaptureFixture[str], broken: Path, output: Path, value: float, scheme: str
) -> None:
    path = broken / "model.safetensors"
    data = bytearray(path.read_bytes())
    bits = np.array([value], np.float32).view(np.uint32) >> 16
    data[-2:] = bits.astype("<u2").tobytes()
    path.write_bytes(data)
    result = run(capsys, "export", broken, "--scheme", scheme, "-o", output)
    assert_refused(result, "model.", "1 of ", "not finite", str(value))


def test_unknown_scheme_and_backend(capsys: pytest.CaptureFixture[str], checkpoint: Path, output: Path) -> None:
    assert_refused(run(capsys, "export", checkpoint, "--scheme", "q3", "-o", output), "'q3'", "fp32, fp16, q8, q4")
    wrong = run(capsys, "export", checkpoint, "--backend", "tflite", "-o", output)
    assert_refused(wrong, "'tflite'", "known backends: onnx, executorch")
    wrong = run(capsys, "export", checkpoint, "--scheme", "8da4w", "-o", output)
    assert_refused(wrong, "'8da4w'", "not for backend onnx")
    assert_refused(run(capsys, "export", checkpoint, "--algorithm", "magic", "-o", output), "'magic'", "refit", "round")


def test_group_size_that_divides_no_width(capsys: pytest.CaptureFixture[str], checkpoint: Path, output: Path) -> None:
    result = run(capsys, "export", checkpoint, "--group-size", "128", "-o", output)
    assert_refused(result, "in_features=64", "group_size=128", "--group-size 32")
    assert_refused(
        run(capsys, "export", checkpoint, "--group-size", "33", "-o", output), "--group-size 33", "16, 32, 64"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max-context", "128"), ("--max-context 128", "--backend executorch or leave it out")),
        (
            ("--scheme", "fp32", "--group-size", "64"),
            ("--group-size 64", "scheme fp32 quantizes nothing; leave it out"),
        ),
        (
            ("--scheme", "fp32", "--group-size", "33"),
            ("--group-size 33", "scheme fp32 quantizes nothing; leave it out"),
        ),
        (("--scheme", "fp32,q4", "--group-size", "33"), ("--group-size 33", "16, 32, 64")),
        (("--scheme", "fp16,fp32", "--exclude", "*.w1.*"), ("--exclude *.w1.*", "scheme fp16, fp32 quantizes nothing")),
        (("--scheme", "fp32,q4", "--exclude", "*.w9.*"), ("*.w9.*", "matches no weight")),
    ],
)
def test_options_that_nothing_would_follow(
    capsys: pytest.CaptureFixture[str],
    checkpoint: Path,
    output: Path,
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    assert_refused(run(capsys, "export", checkpoint, *arguments, "-o", output), *words)


def test_options_apply_to_the_schemes_that_quantize(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    options = ("--scheme", "fp32,q4", "--group-size", "16", "--exclude", "model.embed_tokens.weight")
    assert run(capsys, "export", checkpoint, *options, "-o", made)[0] == 0
    programs = {p["scheme"]: p["options"] for p in json.loads((made / MANIFEST).read_text())["programs"]}
    assert programs["q4"]["formats"]["linear"]["group_size"] == 16
    assert {scheme: found["exclude"] for scheme, found in programs.items()} == {
        "fp32": [],
        "q4": ["model.embed_tokens.weight"],
    }


@pytest.mark.parametrize("name", ["x" * 5000, "y" * 300, "a\0b"], ids=["path", "name", "nul"])
def test_names_that_no_path_can_have(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, name: str
) -> None:
    words = ("cannot be looked at", "check the name")
    assert_refused(run(capsys, "export", name, "-o", tmp_path / "output"), *words)
    assert_refused(run(capsys, "export", checkpoint, "-o", tmp_path / name), *words)
    assert_refused(run(capsys, "run", name, "--prompt", "x"), *words)
    assert list(tmp_path.iterdir()) == []


def test_exclude_that_matches_nothing(capsys: pytest.CaptureFixture[str], checkpoint: Path, output: Path) -> None:
    assert_refused(
        run(capsys, "export", checkpoint, "--exclude", "*.w9.*", "-o", output), "*.w9.*", "matches no weight"
    )


def test_output_that_holds_something_else(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("three years of work")
    assert_refused(run(capsys, "export", checkpoint, "-o", folder), str(folder), "holds something else", "thesis.txt")
    assert (folder / "thesis.txt").read_text() == "three years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def _limit_file_size() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def test_disk_that_fills_up(checkpoint: Path, output: Path) -> None:
    command = [sys.executable, "-m", "lfm2_export.cli", "export", checkpoint, "--scheme", "fp32", "-o", output]
    # The kernel refuses to let a file grow over 50 kB, as a full disk would.
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=_limit_file_size)
    assert_refused((done.returncode, done.stdout, done.stderr), "the disk cannot take more", "unchanged", code=3)


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "artifact"
    assert cli.main(["export", str(checkpoint), "--scheme", "q4", "-o", str(folder)]) == 0
    return folder


def test_a_checkpoint_without_a_tokenizer_exports_with_a_line_beside_its_progress(
    checkpoint: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "lfm2_export.cli",
        "export",
        checkpoint,
        "--scheme",
        "fp32",
        "-o",
        tmp_path / "made",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    phases = ("choosing what is stored how", "onnx fp32: ", "hashing the checkpoint")
    (line,) = (line for line in done.stderr.splitlines() if not line.startswith(phases))
    assert line.startswith(f"{checkpoint}: has no tokenizer.json, so the artifact takes token ids only")
    assert "onnx fp32: tracing" in done.stderr.splitlines()


def test_run_refuses_a_prompt_beyond_the_context(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bundled = Path(cli.__file__).parent / "assets" / "tiny-dense"
    config = json.loads((bundled / "config.json").read_text())
    folder = write_random_checkpoint(tmp_path / "checkpoint", {**config, "max_position_embeddings": 64}, seed=3)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_bytes((bundled / name).read_bytes())
    assert run(capsys, "export", folder, "--scheme", "fp32", "-o", tmp_path / "made")[0] == 0
    refused = run(capsys, "run", tmp_path / "made", "--prompt", "one two three four " * 50)
    assert_refused(refused, "row 0: ", "tokens do not fit the context limit of 64", "shorten the prompt")
    assert run(capsys, "run", tmp_path / "made", "--prompt", "one two", "--max-new-tokens", "2")[0] == 0


def test_export_prints_what_it_made(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "export", checkpoint, "--scheme", "fp32", "--json", "-o", tmp_path / "made")
    assert code == 0
    made = json.loads(out)
    assert [p["scheme"] for p in made["programs"]] == ["fp32"]
    assert (tmp_path / "made" / MANIFEST).is_file()


def test_artifact_with_a_changed_byte(capsys: pytest.CaptureFixture[str], artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for path in artifact.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(artifact)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    data = copy / "onnx" / "model_q4.onnx_data"
    changed = bytearray(data.read_bytes())
    changed[1234] ^= 1
    data.write_bytes(changed)
    assert_refused(
        run(capsys, "bench", copy, "--prompt-tokens", "4", "--new-tokens", "1"),
        "model_q4.onnx_data",
        "changed since the export",
    )


def test_run_without_an_artifact(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    assert_refused(run(capsys, "run", tmp_path / "nothing", "--prompt", "x"), "no such directory")
    assert_refused(run(capsys, "run", checkpoint, "--prompt", "x"), "export it first")


def test_program_that_the_folder_does_not_hold(capsys: pytest.CaptureFixture[str], artifact: Path) -> None:
    assert_refused(run(capsys, "bench", artifact, "--scheme", "q8"), "no q8 program", "onnx q4")
    assert_refused(run(capsys, "bench", artifact, "--backend", "executorch"), "no executorch program")


def test_counts_that_make_no_sense(capsys: pytest.CaptureFixture[str], artifact: Path) -> None:
    assert_refused(run(capsys, "bench", artifact, "--new-tokens", "0"), "--new-tokens 0")
    assert_refused(run(capsys, "bench", artifact, "--prompt-tokens", "100000000"), "do not fit the context")
    assert_refused(run(capsys, "bench", artifact, "--prompt-tokens", "4", "--new-tokens", "1", "--threads", "0"), "0")


def test_bench_measures(capsys: pytest.CaptureFixture[str], artifact: Path) -> None:
    code, out, _ = run(
        capsys, "bench", artifact, "--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "1", "--json"
    )
    assert code == 0
    found = json.loads(out)
    assert found["program"] == "onnx q4"
    assert found["prefill_tps"] > 0
    assert found["decode_tps"] > 0
    assert found["peak_memory_bytes"] > found["artifact_bytes"]


def test_inspect_knows_both(capsys: pytest.CaptureFixture[str], checkpoint: Path, artifact: Path) -> None:
    code, out, _ = run(capsys, "inspect", checkpoint, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["kind"] == "checkpoint"
    assert found["parameters"] == sum(part["parameters"] for part in found["parts"].values())
    code, out, _ = run(capsys, "inspect", artifact, "--json")
    assert code == 0
    assert json.loads(out)["programs"][0]["weights_by_dtype"].keys() == {"int4", "int8", "float32"}


def test_support_lists_every_scheme_of_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    from lfm2_export.backends import BACKENDS, get_backend

    code, out, _ = run(capsys, "support", "--json")
    assert code == 0
    listed = {(row["backend"], row["scheme"]) for row in json.loads(out)["supported"]}
    assert listed == {(backend, scheme) for backend in BACKENDS for scheme in get_backend(backend).SCHEMES}
