"""What is true of every profile, whatever made it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from lfm2_export.backends.profile import Profile, StepProfile


def check_sums(step: StepProfile) -> None:
    """Shares and times add up, and nothing took less than no time."""
    found = [entry.share for entry in step.operators]
    assert sum(found) + step.outside_share == pytest.approx(1, abs=1e-9)
    assert sum(entry.ms for entry in step.operators) + step.outside_ms == pytest.approx(step.total_ms)
    assert found == sorted(found, reverse=True)
    assert min(entry.ms for entry in step.operators) >= 0
    assert 0 <= step.outside_share < 1
    for entry in step.operators:
        assert entry.share == pytest.approx(entry.ms / step.total_ms)


def check_profile(profile: Profile, prompt_tokens: int) -> None:
    check_sums(profile.prefill)
    check_sums(profile.decode)
    assert (profile.prefill.tokens, profile.decode.tokens) == (prompt_tokens, 1)
    assert json.loads(json.dumps(profile.to_json(), allow_nan=False))["decode"]["operators"]
    print(*(" ".join(row) for row in profile.rows()), sep="\n")


def calls(step: StepProfile) -> dict[str, int]:
    return {entry.operator: entry.calls for entry in step.operators}


@pytest.fixture
def clean_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Fails if a file is left where temporary ones go, or where the process stands."""
    temporary, here = tmp_path / "temporary", tmp_path / "here"
    temporary.mkdir()
    here.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.chdir(here)
    yield
    # torch's compiler makes a folder when it is imported.
    left = [path for path in [*temporary.iterdir(), *here.iterdir()] if not path.name.startswith("torchinductor_")]
    assert left == [], f"left behind: {left}"
