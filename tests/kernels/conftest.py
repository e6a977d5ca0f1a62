"""All of these tests need ExecuTorch's wheel, which is an extra of this package."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _executorch() -> None:
    pytest.importorskip("executorch", reason="pip install 'lfm2-export[executorch]'")
