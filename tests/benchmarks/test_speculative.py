"""The benchmark of speculation runs, and tells exact programs from others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import programs, speculative
from lfm2_export.backends.onnx import variants
from lfm2_export.source import ASSETS
from tests.drafters import drafter_config

pytestmark = pytest.mark.skipif(variants.own_library() is None, reason="no compiler for our operators")


@pytest.fixture
def measured(artifact: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> Callable[..., dict]:
    def run(measure: str, *options: str) -> dict:
        arguments = [
            measure,
            str(artifact("tiny-dense")),
            "--scheme",
            "q4",
            "--threads",
            "1",
            "--rounds",
            "1",
            *options,
        ]
        assert speculative.main(arguments) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_a_pass_is_put_beside_a_step(measured: Callable[..., dict]):
    found = measured("cost")
    assert set(found["pass_over_step"]) == {str(width) for width in speculative.WIDTHS}
    assert found["step_ms"] > 0


def test_texts_that_repeat_have_proposals_that_are_right(measured: Callable[..., dict]):
    found = measured("texts")["texts"]
    print({name: text["acceptance"] for name, text in found.items()})
    assert found["prose"]["acceptance"] <= 0.5
    assert found["edit"]["tokens"] > 200


def test_tokens_differ_on_the_runtimes_own_kernels_only(measured: Callable[..., dict]):
    ours, stock = measured("differing", "--kernels", "lfm2"), measured("differing", "--kernels", "stock")
    assert (ours["exact"], ours["differing"], stock["exact"]) == (True, 0, False)
    assert stock["differing"] > 0


def test_a_shapes_model_and_drafter_are_made_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Of random weights, for whoever has no real ones; the second time they are there."""
    raw = json.loads((ASSETS / "tiny-dense/config.json").read_text())
    layers = {"mask_token_id": 3, "target_layer_ids": [1, 4], "num_target_layers": raw["num_hidden_layers"]}
    monkeypatch.setitem(speculative.REAL_SHAPES, "tiny", raw)
    monkeypatch.setitem(speculative.DRAFTER_SHAPES, "tiny-dspark", drafter_config(raw, dflash_config=layers))
    monkeypatch.setitem(speculative._SHAPES, "tiny", "tiny-dspark")
    command = ["round", "tiny", "--keep", str(tmp_path), "--threads", "1", "--rounds", "1"]
    assert speculative.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["pass_over_step"]) == set(found["round_over_step"]) == {"4 rows", "6 rows"}
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny").rglob("*_data")}
    assert len(made) == 2
    needed = programs.round_disk_needed(tmp_path / "new", raw, speculative.DRAFTER_SHAPES["tiny-dspark"], 32)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < needed + (3 << 20)
    assert speculative.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_a_drafters_round_is_put_beside_a_step(measured: Callable[..., dict], taught: Path):
    found = measured("round", "--drafter", str(taught))
    assert set(found["round_over_step"]) == {"4 rows", "6 rows"}
    assert found["draft_over_step"] > 0
    gains = found["times_plain_by_tokens_a_round"]
    assert gains["4"] == pytest.approx(4 * gains["1"], rel=0.1)
