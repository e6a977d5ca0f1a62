"""Parity's numbers, verdicts and page, without any model."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from lfm2_export.parity import ParityReport, ProgramParity, divergence, page
from lfm2_export.parity.figures import KL, MAX_ABS, Control, Figure, Hop, scaled
from lfm2_export.parity.sample import HELD_OUT
from lfm2_export.parity.storage import relative_errors
from lfm2_export.source import ASSETS
from tests.artifacts import program


def test_divergence_of_known_distributions() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    logits = np.log([p, p]).astype(np.float32)
    other = np.log([q, p]).astype(np.float32) + 3.0
    found = divergence.compare(logits, other, np.array([2, 0]))
    assert found.kl == pytest.approx([0.25 * np.log(2), 0.0], abs=1e-6)
    assert found.same_top.tolist() == [False, True]
    assert found.top1_agreement == 0.5
    assert found.perplexity == pytest.approx(np.exp(-(np.log(0.5) + np.log(0.5)) / 2), rel=1e-6)
    assert found.reference_perplexity == pytest.approx(np.exp(-(np.log(0.25) + np.log(0.5)) / 2), rel=1e-6)
    assert found.max_abs_error == pytest.approx(3.0 + np.log(2), rel=1e-6)


def test_divergence_does_not_depend_on_how_rows_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    logits, other = rng.standard_normal((2, 37, 11)).astype(np.float32)
    at_once = divergence.compare(logits, other, np.arange(37) % 11)
    monkeypatch.setattr(divergence, "_VALUES_AT_ONCE", 50)
    in_blocks = divergence.compare(logits, other, np.arange(37) % 11)
    assert np.array_equal(at_once.kl, in_blocks.kl)
    assert at_once.perplexity == in_blocks.perplexity
    assert at_once.max_abs_error == in_blocks.max_abs_error


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_a_number_never_passes(value: float) -> None:
    logits = np.zeros((4, 5), np.float32)
    other = logits.copy()
    other[2, 3] = value
    with np.errstate(invalid="ignore"):
        found = divergence.compare(logits, other)
    for measure_, number in ((MAX_ABS, found.max_abs_error), (KL, found.mean_kl)):
        figure = Figure(name="x", measure=measure_, value=number, tolerance=1e9)
        assert not figure.passed
        assert figure.row()[-1] == "FELL SHORT"
        assert figure.to_json()["value"] is None
    assert not Figure(name="x", measure=KL, value=np.nan, tolerance=0.0, at_least=True).passed
    assert np.isnan(divergence.largest([np.nan, 1.0]))


def test_a_hop_needs_a_control_that_was_noticed() -> None:
    good = Figure(name="x", measure=KL, value=1e-5, tolerance=1e-3)
    noticed = Control(change="a off", measure=KL, value=0.1, tolerance=1e-3)
    unnoticed = Control(change="a off", measure=KL, value=1e-4, tolerance=1e-3)

    def hop(*controls: Control) -> Hop:
        return Hop(name="lowering", title="", figures=(good,), controls=controls, summary={})

    assert hop(noticed).passed
    assert not hop().passed
    assert not hop(noticed, unnoticed).passed
    assert list(hop(unnoticed).failures()) == [
        "lowering: the control went unnoticed (a off), so the comparison proves nothing"
    ]


def test_rows_share_a_line_unless_they_fell_short() -> None:
    values = {"prefill": 1e-6, "decode": 3e-6, "batch": 2.0}
    figures = tuple(Figure(name=n, measure=MAX_ABS, value=v, tolerance=1e-5) for n, v in values.items())
    hop = Hop(name="model", title="", figures=figures, controls=(), summary={})
    assert hop.rows() == [
        ("prefill, decode: max abs logit error", "3.0e-06", "≤ 1.0e-05", "ok"),
        ("batch: max abs logit error", "2.0e+00", "≤ 1.0e-05", "FELL SHORT"),
    ]
    assert len(hop.rows(details=True)) == 3


def test_tolerances_grow_with_large_logits_only() -> None:
    assert scaled(1e-4, 3.0) == scaled(1e-4, 32.0) == 1e-4
    assert scaled(1e-4, 64.0) == pytest.approx(2e-4)


def test_relative_errors_of_rows() -> None:
    weight = np.ones((3, 4), np.float32)
    stored = weight.copy()
    stored[1] *= 0.5
    assert relative_errors(stored, weight).tolist() == [0.0, 0.5, 0.0]
    assert relative_errors(stored[:, 0], weight[:, 0]) == pytest.approx([np.sqrt(0.25 / 3)])
    weight[2] = 1e-9  # what a coarse format rounds to zero beside weights of 1
    stored = weight.copy()
    stored[2] = 0.0
    assert relative_errors(stored, weight).max() < 1e-6
    assert relative_errors(np.zeros((1, 4)), np.zeros((1, 4))).tolist() == [0.0]


def test_a_curve_without_values_is_a_line_of_text() -> None:
    hop = Hop(
        name="model", title="", figures=(), controls=(), summary={"kl": 0.0, "top1_agreement": 1.0, "perplexity": 1.0}
    )
    for curve, lines in (((), 0), ((0.0,), 1), ((0.1, 0.2), 1)):
        measured = ProgramParity(program=program(), lowering=hop, quantization=replace(hop, curve=curve))
        report = ParityReport(artifact="a", checkpoint="c", text="t", model=hop, programs=(measured,), versions={})
        text = page.render(report)
        assert ("no positions were measured" in text, text.count("<polyline")) == (not curve, lines)


def test_the_held_out_text_is_there() -> None:
    assert HELD_OUT.parent == ASSETS
    assert len(HELD_OUT.read_text(encoding="utf-8")) > 10_000


def test_file_names_are_escaped_on_the_page() -> None:
    figure = Figure(name="<b>", measure=KL, value=0.5, tolerance=1.0)
    hop = Hop(name="model", title="<i>", figures=(figure,), controls=(), summary={}, notes=("a & b",))
    report = ParityReport(
        artifact="<script>", checkpoint="x", text="<u>", model=hop, programs=(), versions={"<p>": "1"}
    )
    text = page.render(report)
    assert not re.search(r"<script>|<b>|<i>|<u>", text)
    assert "a &amp; b" in text
