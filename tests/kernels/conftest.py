"""All of these tests need ExecuTorch's wheel, which is an extra of this package."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Once


@pytest.fixture(scope="session", autouse=True)
def _executorch() -> None:
    pytest.importorskip("executorch", reason="pip install 'lfm2-export[executorch]'")


@pytest.fixture(scope="session")
def toy(once: Once) -> Path:
    """A small program that calls our operator. Leave it unchanged."""

    def make(folder: Path) -> None:
        from tests.kernels import toy_program  # imports torch

        folder.mkdir()
        toy_program.export_toy(folder / "toy.pte")

    return once("toy", make) / "toy.pte"
