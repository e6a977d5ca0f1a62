"""``lfm2-export bench --profile``: the table and the JSON; what a run's summary says of the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lfm2_export import cli
from lfm2_export.resources import processor_name
from tests.profiles import clean_up  # noqa: F401  (a fixture)

FEW = ("--prompt-tokens", "16", "--new-tokens", "2", "--rounds", "1", "--threads", "1")
STEP = {"tokens", "steps", "total_ms", "outside_ms", "outside_share", "operators"}
OPERATOR = {"operator", "calls", "ms", "share", "parts"}


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[str, str]:
    assert cli.main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


@pytest.mark.usefixtures("clean_up")
def test_profile_as_json(capsys: pytest.CaptureFixture[str], artifact) -> None:
    out, _ = run(capsys, "bench", artifact("tiny-moe"), "--scheme", "q4", "--profile", "--json", *FEW)
    found = json.loads(out)
    assert found["decode_tps"] > 0
    assert found["kernels"].split()[0] in {"lfm2", "onnxruntime"}
    assert (found["threads"], found["processor"]) == (1, processor_name())
    assert found["profile"].keys() == {"prefill", "decode"}
    for name, tokens in (("prefill", 16), ("decode", 1)):
        step = found["profile"][name]
        assert step.keys() == STEP
        assert step["tokens"] == tokens
        assert all(entry.keys() == OPERATOR for entry in step["operators"])
        assert sum(entry["share"] for entry in step["operators"]) + step["outside_share"] == pytest.approx(1)


@pytest.mark.usefixtures("clean_up")
def test_profile_as_a_table_below_the_figures(capsys: pytest.CaptureFixture[str], artifact) -> None:
    out, err = run(capsys, "bench", artifact("tiny-moe"), "--scheme", "q4", "--profile", "--kernels", "stock", *FEW)
    lines = [line.strip() for line in out.splitlines()]
    heads = [index for index, line in enumerate(lines) if line.startswith(("what ", "operator "))]
    assert [lines[index].split()[0] for index in heads] == ["what", "operator"]
    assert "a prefill of 16 tokens and a decode step after it, by operator" in lines
    rows = [" ".join(line.split()) for line in lines]
    assert {"kernels onnxruntime", "threads 1"} <= set(rows)
    assert any(row.startswith("processor ") for row in rows)
    for operator in ("QMoE", "GroupQueryAttention", "outside of operators", "together"):
        assert sum(line.startswith(f"{operator} ") for line in lines) == 1
    assert lines[-2 if not lines[-1] else -1].split().count("100.0") == 2
    assert "tracing costs time of its own" in err


def test_the_summary_of_a_run_names_what_it_ran_on(capsys: pytest.CaptureFixture[str], artifact) -> None:
    arguments = (
        "--scheme",
        "q4",
        "--kernels",
        "stock",
        "--threads",
        "1",
        "--max-new-tokens",
        "2",
        "--prompt",
        "A list",
    )
    _, err = run(capsys, "run", artifact("tiny-moe"), *arguments)
    (summary,) = (line for line in err.splitlines() if "new ones at" in line)
    assert summary.startswith(f"onnx q4 on onnxruntime, threads: 1, {processor_name()}: ")


def test_there_is_no_profile_unless_asked(capsys: pytest.CaptureFixture[str], artifact) -> None:
    out, _ = run(capsys, "bench", artifact("tiny-moe"), "--scheme", "q4", "--json", *FEW)
    assert "profile" not in json.loads(out)
