"""A mixture from the command to the manifest, to inspect and to the model card."""

from pathlib import Path

import pytest

from lfm2_export import cli
from lfm2_export.artifact import Artifact
from lfm2_export.inspection import inspect
from tests.checkpoints import tiny_config, write_random_checkpoint

WIDTHS = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2}
CONFIG = tiny_config(**WIDTHS, layer_types=["conv", "full_attention"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "moe", CONFIG, seed=1))


def test_an_artifact_says_how_wide_its_weights_are(checkpoint: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert cli.main(["export", checkpoint, "-o", str(out), "--target-bits", "5.2"]) == 0
    (program,) = Artifact.open(out).programs
    bits = program.options["bits_per_weight"]
    print(bits, program.options["widths"])
    assert 5.0 < bits["file"] <= 5.2
    assert bits["step"] > bits["file"]  # experts are the narrowest
    assert sum(row["weights"] for row in program.options["widths"]) == sum(
        tensor_weights for tensor_weights in (_count(tensor) for tensor in program.tensors)
    )
    mixed = [tensor for tensor in program.tensors if tensor.dtype.startswith("int") and tensor.name != "lm_head"]
    assert {tensor.reason for tensor in mixed} == {"mixed within --target-bits 5.2"}
    described = inspect(out)["programs"][0]
    assert (described["bits_per_weight"], described["widths"]) == (bits, list(program.options["widths"]))
    assert f"| onnx q4 | {bits['file']:.2f} | {bits['step']:.2f} | attention: " in (out / "README.md").read_text()
    capsys.readouterr()
    assert cli.main(["inspect", str(out)]) == 0
    said = capsys.readouterr().out
    assert (
        f"onnx q4: bits a weight: {bits['file']:.2f} of the file, {bits['step']:.2f} of what a decode step reads"
        in said
    )
    assert "in groups of" in said
    how = "onnx q4: mixed within --target-bits 5.2, judged by the weights alone"
    assert f"{how}\n" in said
    assert f"{how}." in (out / "README.md").read_text()


def _count(tensor) -> int:
    """Weights that have bytes of their own: the tied head has none."""
    count = 0 if (tensor.reason or "").startswith("shares the bytes") else 1
    for size in tensor.shape:
        count *= size
    return count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-bits", "3"], "lfm2-export: --target-bits 3: is below the floor of "),
        (["--target-bits", "5", "--group-size", "32"], "lfm2-export: --target-bits 5: chooses the group sizes, too;"),
        (["--target-bits", "5", "--scheme", "q8"], "scheme q8 has one width for its linear layers; pass --scheme q4"),
        (["--target-bits", "4", "--backend", "executorch"], "lfm2-export: --target-bits 4: is below the floor of "),
        (["--target-size", "1KB", "--backend", "executorch"], "--target-size 1000: is below the floor of "),
        (["--target-bits", "8", "--backend", "executorch", "--scheme", "fp32"], "scheme fp32 has one width"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_and_leaves_nothing(
    checkpoint, tmp_path, capsys, options, message
) -> None:
    assert cli.main(["export", checkpoint, "-o", str(tmp_path / "out"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []
