"""Artifacts that many tests read, each exported once whatever the number of test processes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import lfm2_export
from tests.checkpoints import write_random_checkpoint
from tests.encoder_checkpoints import write_encoder
from tests.faults.forks import Forks
from tests.recording import pytest_configure

__all__ = ["pytest_configure"]

# Of tests that open programs with onnxruntime alone; through the package it is off anyway.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# torch reports every traced operator here, at a level that pytest would collect: 30,000 lines an export.
logging.getLogger("torch.__trace").propagate = False

SCHEMES = ("fp32", "fp16", "q8", "q4", "q4f16")

Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test with names that are no text printed or logged must not end the process that it reports to."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A random checkpoint and its artifact."""

    checkpoint: Path
    artifact: Path


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """``once(name, make)`` is the folder that ``make(folder)`` filled, in whichever test process asked first."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    root.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder = root / name
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                unfinished = root / f"{name}.unfinished"
                shutil.rmtree(unfinished, ignore_errors=True)
                make(unfinished)
                unfinished.rename(folder)
        return folder

    return made


@pytest.fixture(scope="session")
def artifact(once: Once) -> Callable[[str], Path]:
    """``artifact("tiny-moe")`` is the folder of a bundled checkpoint exported as ``SCHEMES``. Leave it unchanged."""

    def exported(checkpoint: str) -> Path:
        return once(checkpoint, lambda folder: lfm2_export.export(checkpoint, scheme=SCHEMES, output=folder))

    return exported


@pytest.fixture(scope="session")
def random_artifact(once: Once) -> Callable[..., Exported]:
    """``random_artifact(config, schemes)``: random weights under a raw config.json, and what they were exported as;
    ``options`` are export's own."""

    def exported(raw_config: Mapping[str, Any], schemes: Sequence[str] = ("fp32",), **options: Any) -> Exported:
        made_of = json.dumps([raw_config, list(schemes), options], sort_keys=True)
        key = hashlib.sha256(made_of.encode()).hexdigest()[:16]

        def make(folder: Path) -> None:
            # F32, so that the weights are no multiples of 2^-8 that any arithmetic would get right.
            write_random_checkpoint(folder / "checkpoint", raw_config, seed=0, dtype="F32")
            lfm2_export.export(folder / "checkpoint", scheme=schemes, output=folder / "artifact", **options)

        folder = once(f"random-{key}", make)
        return Exported(checkpoint=folder / "checkpoint", artifact=folder / "artifact")

    return exported


@pytest.fixture(scope="session")
def random_drafter(once: Once) -> Callable[..., Exported]:
    """``random_drafter(target, schemes)``: a random drafter for an artifact of ``tests.drafters.TARGET``, and what it
    was exported as. Leave both unchanged."""

    def exported(target: Path, schemes: Sequence[str] = ("q4",)) -> Exported:
        def make(folder: Path) -> None:
            from tests.drafters import write_drafter

            write_drafter(folder / "checkpoint")
            lfm2_export.export(folder / "checkpoint", scheme=schemes, output=folder / "artifact", target=target)

        folder = once("-".join(["drafter", target.parent.name, *schemes]), make)
        return Exported(checkpoint=folder / "checkpoint", artifact=folder / "artifact")

    return exported


@pytest.fixture(scope="session")
def taught(once: Once, artifact: Callable[[str], Path]) -> Path:
    """The artifact (q4) of a drafter for tiny-dense that is often right on ``tests.drafters.PROMPTS``."""

    def make(folder: Path) -> None:
        from tests.drafters import teach_drafter  # imports torch, as few tests need to

        teach_drafter(folder / "checkpoint")
        lfm2_export.export(
            folder / "checkpoint", output=folder / "artifact", target=artifact("tiny-dense"), algorithm="round"
        )

    return once("taught-drafter", make) / "artifact"


@pytest.fixture(scope="session")
def encoder(once: Once) -> Callable[..., Exported]:
    """``encoder("colbert", ["fp32"])``: a random encoder, and what it was exported as; ``options`` are export's own.
    Leave both unchanged."""

    def exported(kind: str, schemes: Sequence[str] = ("fp32",), **options: Any) -> Exported:
        def make(folder: Path) -> None:
            write_encoder(folder / "checkpoint", kind)
            lfm2_export.export(folder / "checkpoint", scheme=schemes, output=folder / "artifact", **options)

        folder = once("-".join([kind, *schemes, *map(str, options.values())]), make)
        return Exported(checkpoint=folder / "checkpoint", artifact=folder / "artifact")

    return exported


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Commands in processes of their own that need not import anything."""
    made = Forks(tmp_path_factory.mktemp("forks"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def pte_artifact(once: Once) -> Callable[[str, str], Path]:
    """``pte_artifact("tiny-moe", "8da4w")`` is the folder of a bundled checkpoint as a .pte, quantized experts through
    either operator. Leave it unchanged."""

    def exported(checkpoint: str, scheme: str) -> Path:
        options: dict[str, Any] = {"backend": "executorch", "max_context": 256, "algorithm": "round"}
        if (checkpoint, scheme) == ("tiny-moe", "8da4w"):
            options["moe_op"] = "both"
        return once(
            f"{checkpoint}-{scheme}-executorch",
            lambda folder: lfm2_export.export(checkpoint, scheme=scheme, output=folder, **options),
        )

    return exported


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny products of torch only get slower when threads wait for each other, most of all on a busy machine."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
