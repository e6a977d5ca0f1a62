"""What can be exported where: families × schemes × backends, and what opens it in the tests.

In: the registries, and what the tests showed (``tested``). Out: rows for ``lfm2-export support`` and the tables of the
documentation, which are checked against this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lfm2_export.backends import BACKENDS
from lfm2_export.families import DRAFTERS, FAMILIES
from lfm2_export.tested import NOT_TESTED, RUNTIMES, opened_by, results


@dataclass(frozen=True, kw_only=True)
class Supported:
    """One line of the table. ``runtimes``: what opens this program in the tests."""

    family: str
    backend: str
    scheme: str
    file: str
    runtimes: str


@dataclass(frozen=True, kw_only=True)
class Delegate:
    """What became of an ExecuTorch delegate beside XNNPACK: nothing is shipped that has not been run."""

    name: str
    dense: str
    mixture: str
    reason: str


_LOWERS, _FAILS, _UNTRIED = "lowers, never run", "does not lower", "could not be tried"
# With executorch 1.5.1 on Linux; tests/backends/executorch/test_delegates.py tries again those that can be tried.
DELEGATES = (
    Delegate(
        name="Vulkan",
        dense=f"fp32 {_LOWERS}",
        mixture=_FAILS,
        reason="the whole dense graph becomes one call, static or dynamic; its passes stop at the experts' routing "
        "(a data-dependent guard), and at 8da4w's weights, which its own quantizer would have to make",
    ),
    Delegate(
        name="WebGPU", dense=f"fp32 {_LOWERS}", mixture=_FAILS, reason="as Vulkan, whose partitioner it builds upon"
    ),
    Delegate(
        name="Core ML",
        dense=_FAILS,
        mixture=_FAILS,
        reason="takes no symbolic integer, and start_pos is one, with static shapes as with dynamic ones",
    ),
    Delegate(
        name="MPS, Metal",
        dense=_UNTRIED,
        mixture=_UNTRIED,
        reason="the wheel has no MPS partitioner any more; Metal's wants a library that only macOS has",
    ),
    Delegate(
        name="MLX", dense=_UNTRIED, mixture=_UNTRIED, reason="the Linux wheel lacks the files that its serializer needs"
    ),
    Delegate(
        name="Qualcomm, OpenVINO",
        dense=_UNTRIED,
        mixture=_UNTRIED,
        reason="want the vendor's SDK or the openvino package",
    ),
)


def supported() -> Iterator[Supported]:
    """Every combination that can be exported."""
    for family in FAMILIES:
        for name, backend in BACKENDS.items():
            for scheme, file in backend.SCHEMES.items():
                yield _row(family, name, scheme, file)
    for family in DRAFTERS:
        for name, backend in BACKENDS.items():
            for scheme in backend.DRAFTER_SCHEMES:
                yield _row(family, name, scheme, backend.SCHEMES[scheme])


def _row(family: str, backend: str, scheme: str, file: str) -> Supported:
    runtimes = ", ".join(opened_by(backend, family, scheme)) or NOT_TESTED
    return Supported(family=family, backend=backend, scheme=scheme, file=file, runtimes=runtimes)


def schemes_by_runtime() -> Iterator[tuple[str, ...]]:
    """A line for each runtime: its title, and for each family the schemes of the programs that it opened in the tests,
    ``NOT_TESTED`` where there was none."""
    for name, runtime in RUNTIMES.items():
        schemes = BACKENDS[runtime.backend].SCHEMES
        opened = (
            ", ".join(scheme for scheme in schemes if name in results().passed(family, scheme))
            for family in (*FAMILIES, *DRAFTERS)
        )
        yield (runtime.title, *(found or NOT_TESTED for found in opened))
