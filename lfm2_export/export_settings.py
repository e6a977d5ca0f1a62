"""What an export is asked for, and what that means: all that can be refused before a checkpoint is opened.

In: the arguments of ``export``. Out: ``ExportSettings``, each of the right kind, and the ``ExportChoice`` that they
make for each backend: its schemes, an algorithm, its own settings.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING

from lfm2_export.backends import BACKENDS, Backend, get_backend, option_flag
from lfm2_export.calibration.request import choose_algorithm
from lfm2_export.checkpoint import CheckpointRequest
from lfm2_export.errors import ExportError
from lfm2_export.messages import shown
from lfm2_export.mixing import MixRequest, check_mixable, make_budget
from lfm2_export.quant.schemes import Scheme, get_scheme

if TYPE_CHECKING:
    from lfm2_export.backends.weights.plan import WeightPlan
    from lfm2_export.config import ModelConfig

_PATH = (str, os.PathLike)
_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "checkpoint": (_PATH, "a name"),
    "output": (_PATH, "a name"),
    "algorithm": ((str, NoneType), "a name or None"),
    "revision": ((str, NoneType), "a name or None"),
    "calibrate": ((*_PATH, NoneType), "a name or None"),
    "statistics": ((*_PATH, NoneType), "a name or None"),
    "budget": ((str, NoneType), "a name or None"),
    "config_from": ((*_PATH, NoneType), "a name or None"),
    "lora": ((*_PATH, NoneType), "a name or None"),
    "target": ((*_PATH, NoneType), "a folder or None"),
    "measure": ((*_PATH, NoneType), "a file or None"),
    "target_size": ((str, int, NoneType), "bytes, a size such as 700MB, or None"),
    "target_bits": ((int, float, NoneType), "a number or None"),
    "group_size": ((int, NoneType), "an integer or None"),
}


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """The arguments of ``export`` (pipeline.py), under its names; ``source`` is the checkpoint that it names.

    Raises:
        ExportError: one is of another kind, or ``output`` names nothing.
    """

    source: CheckpointRequest
    backend: str | Sequence[str]
    scheme: str | Sequence[str] | None
    output: str | Path
    group_size: int | None
    exclude: str | Sequence[str]
    algorithm: str | None
    calibrate: str | Path | None
    statistics: str | Path | None
    target_bits: float | None
    target_size: str | int | None
    budget: str | None
    measure: str | Path | None
    requantize_table: bool
    options: Mapping[str, int | str | None]

    def __post_init__(self) -> None:
        _names("backend", self.backend)
        _names("scheme", self.scheme or [])
        _names("exclude", self.exclude)
        given = {**vars(self), **vars(self.source), "checkpoint": self.source.name}
        for name, (kinds, expected) in _KINDS.items():
            _check_kind(name, given[name], kinds, expected)
        if not str(self.output).strip():
            raise ExportError(f"output={str(self.output)!r} names no folder; give a name, or . for this one")

    def choices(self) -> tuple[ExportChoice, ...]:
        """What the settings mean, for each backend in the order given.

        Raises:
            ExportError, QuantizationError: they name what there is not, or do not fit each other.
        """
        backends = {name: get_backend(name) for name in _names("backend", self.backend)}
        if not backends:
            raise ExportError(f"no backend was given; known backends: {', '.join(BACKENDS)}")
        options = _checked_options(backends, self.options)
        budget = make_budget(self.target_bits, self.target_size, self.budget)
        algorithm = choose_algorithm(self.algorithm, self.calibrate, self.statistics)
        excluded = _names("exclude", self.exclude)
        uniform = self.group_size is not None or bool(excluded)
        widths = MixRequest(budget=budget, by_default=not uniform, algorithm=algorithm, text=self.measure)
        schemes = _schemes(backends, None if self.scheme is None else _names("scheme", self.scheme))
        together = list({one.name: one for found in schemes.values() for one in found}.values())
        self._check_quantized(together, excluded)
        schemes = {name: [_customize(one, self.group_size, excluded) for one in own] for name, own in schemes.items()}
        check_mixable([one for own in schemes.values() for one in own], widths, self.group_size)
        return tuple(
            ExportChoice(
                backend=name,
                lowering=lowering,
                schemes=tuple(schemes[name]),
                algorithm=algorithm,
                widths=widths,
                options=options[name],
            )
            for name, lowering in backends.items()
        )

    def for_drafter(self, choice: ExportChoice) -> ExportChoice:
        """The same for a drafter, whose widths are the scheme's own: nothing is measured on it alone. Its table and
        head are stored as its layers are: what it loses there is a proposal now and then, what a block reads is half.

        Raises:
            ExportError: the backend has no drafters of a scheme, or something was asked for that they have not.
        """
        for scheme in choice.schemes:
            if scheme.name not in choice.lowering.DRAFTER_SCHEMES:
                known = ", ".join(choice.lowering.DRAFTER_SCHEMES) or "none"
                raise ExportError(
                    f"scheme {scheme.name!r}: backend {choice.backend} has no drafters of it, only: {known}; pass "
                    "one of onnx's fp32, q8 and q4"
                )
        names = ("calibrate", "statistics", "target_bits", "target_size", "budget", "measure")
        for name in names:
            if (value := getattr(self, name)) is not None:
                raise ExportError(f"{option_flag(name)} {value}: is not for drafters; leave it out")
        schemes = tuple(replace(one, embedding=one.linear, head=one.linear) for one in choice.schemes)
        return replace(choice, schemes=schemes, widths=MixRequest(by_default=False, algorithm=choice.algorithm))

    def _check_quantized(self, schemes: Sequence[Scheme], excluded: Sequence[str]) -> None:
        """Refuses what is asked for of quantized weights where no scheme has any."""
        if not any(scheme.has_groups for scheme in schemes):
            names = ", ".join(scheme.name for scheme in schemes)
            given: dict[str, object] = {"--group-size": self.group_size, "--exclude": " ".join(excluded) or None}
            given |= {"--calibrate": self.calibrate, "--statistics": self.statistics}
            for option, value in given.items():
                if value is not None:
                    raise ExportError(
                        f"{option} {value}: scheme {names} quantizes nothing; leave it out or ask for a quantized "
                        "scheme"
                    )


@dataclass(frozen=True, kw_only=True)
class ExportChoice:
    """A backend by its name and module, and what it is to make. ``widths``: how those of mixed schemes are found, once
    the checkpoint is open; ``options``: the backend's own settings that were given."""

    backend: str
    lowering: Backend
    schemes: tuple[Scheme, ...]
    algorithm: str
    widths: MixRequest
    options: Mapping[str, int | str]

    def make_plan(self, config: ModelConfig, scheme: Scheme) -> WeightPlan:
        """How the backend stores every weight under these settings."""
        return self.lowering.make_plan(config, scheme, self.options)


def _names(what: str, value: str | Sequence[str]) -> list[str]:
    """One name or several; a text is one, not a list of its letters."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ExportError(f"{what}={shown(value)}: a name, or a list of names expected")
    return list(names)


def _check_kind(name: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ExportError(f"{name}={shown(value)}: {expected} expected")


def _checked_options(
    backends: Mapping[str, Backend], options: Mapping[str, int | str | None]
) -> dict[str, dict[str, int | str]]:
    """Those that were given, to each backend its own; one that is nobody's is refused."""
    given = {name: value for name, value in options.items() if value is not None}
    own: dict[str, dict[str, int | str]] = {backend: {} for backend in backends}
    for name, value in given.items():
        takers = [backend for backend, one in backends.items() if name in one.OPTIONS]
        if not takers:
            raise _nobodys(name, value, backends)
        for backend in takers:
            kind = backends[backend].OPTIONS[name].kind
            _check_kind(name, value, kind, "an integer or None" if kind is int else "a name or None")
            own[backend][name] = value
    return own


def _nobodys(name: str, value: int | str, backends: Mapping[str, Backend]) -> ExportError:
    asked = " and ".join(backends)
    owners = [other for other, one in BACKENDS.items() if name in one.OPTIONS]
    if not owners:
        known = sorted(option for one in backends.values() for option in one.OPTIONS) or ["none"]
        return ExportError(f"export: {shown(name)} is no setting of backend {asked}; it has: {', '.join(known)}")
    return ExportError(
        f"{option_flag(name)} {shown(value)}: is for backend {' or '.join(owners)}, not for {asked}; pass "
        f"--backend {owners[0]} or leave it out"
    )


def _schemes(backends: Mapping[str, Backend], names: Sequence[str] | None) -> dict[str, list[Scheme]]:
    """Each backend's own among the schemes; its default where none were given."""
    if names is None:
        return {backend: [get_scheme(one.DEFAULT_SCHEME)] for backend, one in backends.items()}
    if not names:
        raise ExportError("no scheme was given; pass --scheme q4, for instance")
    found = [get_scheme(name) for name in dict.fromkeys(names)]
    for one in found:
        if not any(one.name in lowering.SCHEMES for lowering in backends.values()):
            there = dict.fromkeys(name for lowering in backends.values() for name in lowering.SCHEMES)
            raise ExportError(
                f"scheme {one.name!r} is not for backend {' or '.join(backends)}; its schemes: {', '.join(there)}"
            )
    own = {backend: [one for one in found if one.name in lowering.SCHEMES] for backend, lowering in backends.items()}
    for backend, mine in own.items():
        if not mine:
            raise ExportError(
                f"backend {backend}: has none of the schemes {', '.join(names)}; its schemes: "
                f"{', '.join(backends[backend].SCHEMES)} (without --scheme: {backends[backend].DEFAULT_SCHEME})"
            )
    return own


def _customize(scheme: Scheme, group_size: int | None, exclude: Sequence[str]) -> Scheme:
    if not scheme.has_groups:
        return scheme
    grouped = scheme if group_size is None else scheme.with_group_size(group_size)
    return grouped.with_exclude(exclude)
