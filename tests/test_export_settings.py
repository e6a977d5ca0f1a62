"""What several backends make of one list of schemes and settings, and that one call exports for both."""

from __future__ import annotations

from pathlib import Path

import pytest

import lfm2_export
from lfm2_export.checkpoint import CheckpointRequest
from lfm2_export.errors import ExportError
from lfm2_export.export_settings import ExportSettings
from lfm2_export.progress import Progress
from tests.checkpoints import tiny_config, write_random_checkpoint


def made(backend: object = "onnx", scheme: object = None, **options: object) -> dict[str, tuple[list[str], dict]]:
    """Each backend's schemes and own settings."""
    given = {
        "group_size": None,
        "exclude": (),
        "algorithm": None,
        "calibrate": None,
        "statistics": None,
        "target_bits": None,
        "target_size": None,
        "budget": None,
        "measure": None,
        "requantize_table": False,
    }
    settings = ExportSettings(
        source=CheckpointRequest(name="c", revision=None, offline=True, config_from=None),
        backend=backend,  # type: ignore[arg-type]
        scheme=scheme,  # type: ignore[arg-type]
        output="o",
        options=options,  # type: ignore[arg-type]
        **given,  # type: ignore[arg-type]
    )
    return {c.backend: ([one.name for one in c.schemes], dict(c.options)) for c in settings.choices()}


def test_each_backend_has_a_scheme_of_its_own_where_none_is_asked_for() -> None:
    assert made() == {"onnx": (["q4"], {})}
    assert made("executorch") == {"executorch": (["8da4w"], {})}
    assert made(["onnx", "executorch", "onnx"]) == {"onnx": (["q4"], {}), "executorch": (["8da4w"], {})}


def test_of_several_backends_each_makes_the_schemes_and_takes_the_settings_that_it_has() -> None:
    found = made(["onnx", "executorch"], ["fp32", "q8", "8da4w"], max_context=64)
    assert found == {"onnx": (["fp32", "q8"], {}), "executorch": (["fp32", "8da4w"], {"max_context": 64})}


@pytest.mark.parametrize(
    ("backend", "scheme", "options", "said"),
    [
        (
            ["onnx", "executorch"],
            ["q4"],
            {},
            "backend executorch: has none of the schemes q4; its schemes: fp32",
        ),
        (["executorch"], ["q4"], {}, "scheme 'q4' is not for backend executorch; its schemes: fp32, 8da4w"),
        ([], None, {}, "no backend was given"),
        (["onnx"], [], {}, "no scheme was given"),
        (3, None, {}, "backend=3: a name, or a list of names expected"),
        (["onnx"], None, {"max_context": 64}, "--max-context 64: is for backend executorch, not for onnx"),
    ],
)
def test_what_fits_no_backend_is_refused(backend: object, scheme: object, options: dict, said: str) -> None:
    with pytest.raises(ExportError, match="") as error:
        made(backend, scheme, **options)
    assert said in str(error.value)


def test_one_call_exports_for_both_backends_and_says_what_it_does(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", tiny_config("lfm2"), seed=3)
    phases: dict[str, list[int]] = {}
    progress = Progress(
        phase=lambda label: phases.update({label: []}),
        start=lambda label, total: phases.update({label: [total]}),
        advance=lambda amount: list(phases.values())[-1].append(amount),
    )
    lfm2_export.export(
        checkpoint,
        backend=["onnx", "executorch"],
        scheme="fp32",
        max_context=64,
        output=tmp_path / "both",
        progress=progress,
    )
    assert list(phases) == [
        "choosing what is stored how",
        "onnx fp32: tracing",
        "onnx fp32: weights",
        "executorch fp32: weights",
        "executorch fp32: tracing and lowering",
        "hashing the checkpoint, putting files into place",
    ]
    for label, (total, *steps) in ((label, amounts) for label, amounts in phases.items() if amounts):
        print(f"{label}: {sum(steps):,} of {total:,} bytes in {len(steps)} steps")
        assert "weights" in label
        assert 0.99 * total < sum(steps) <= total
    programs = lfm2_export.Artifact.open(tmp_path / "both").programs
    assert [str(program) for program in programs] == ["onnx fp32", "executorch fp32"]
    logits = [
        lfm2_export.load_runner(tmp_path / "both", backend=program.backend).prefill([[5, 6, 7]]) for program in programs
    ]
    off = abs(logits[0] - logits[1]).max()
    print(f"both backends: logits differ by {off:.1e}, of {abs(logits[0]).max():.2f}")
    assert off < 1e-4 * abs(logits[0]).max()
