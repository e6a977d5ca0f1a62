"""What can be exported where: families × schemes × backends, as the tests export and run them.

In: the registries. Out: rows for ``lfm2-export support`` and the documentation's tables, which are checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lfm2_export.backends import BACKENDS, tested_with
from lfm2_export.families import DRAFTERS, FAMILIES


@dataclass(frozen=True, kw_only=True)
class Supported:
    """One line of the table. ``runtimes``: what the tests open this program with."""

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
                yield Supported(
                    family=family,
                    backend=name,
                    scheme=scheme,
                    file=file,
                    runtimes=tested_with(backend.TESTED_WITH, family, scheme),
                )
    for family in DRAFTERS:  # which nothing else runs
        for name, backend in BACKENDS.items():
            for scheme in backend.DRAFTER_SCHEMES:
                yield Supported(
                    family=family, backend=name, scheme=scheme, file=backend.SCHEMES[scheme], runtimes="lfm2-export"
                )
