"""The benchmark of speculation runs, and tells exact programs from others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import speculative
from lfm2_export.backends.onnx import variants

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


def test_a_drafters_round_is_put_beside_a_step(measured: Callable[..., dict], taught: Path):
    found = measured("round", "--drafter", str(taught))
    assert set(found["round_over_step"]) == {"4 rows", "6 rows"}
    assert found["draft_over_step"] > 0
    gains = found["times_plain_by_tokens_a_round"]
    assert gains["4"] == pytest.approx(4 * gains["1"], rel=0.1)
