"""What an export is asked for, and what that means: all that can be refused before a checkpoint is opened.

In: the arguments of ``export``. Out: ``ExportSettings``, each of the right kind, and the ``ExportChoice`` that they
make: a backend, schemes, an algorithm.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType

from lfm2_export.backends import BACKENDS, Backend, get_backend, option_flag
from lfm2_export.calibration.request import choose_algorithm
from lfm2_export.checkpoint import CheckpointRequest
from lfm2_export.errors import ExportError
from lfm2_export.messages import shown
from lfm2_export.mixing import MixRequest, check_mixable, make_budget
from lfm2_export.quant.schemes import Scheme, get_scheme

_PATH = (str, os.PathLike)
_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "checkpoint": (_PATH, "a name"),
    "output": (_PATH, "a name"),
    "backend": ((str,), "a name"),
    "algorithm": ((str, NoneType), "a name or None"),
    "revision": ((str, NoneType), "a name or None"),
    "calibrate": ((*_PATH, NoneType), "a name or None"),
    "statistics": ((*_PATH, NoneType), "a name or None"),
    "budget": ((str, NoneType), "a name or None"),
    "config_from": ((*_PATH, NoneType), "a name or None"),
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
    backend: str
    scheme: str | Sequence[str]
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
        _names("scheme", self.scheme)
        _names("exclude", self.exclude)
        given = {**vars(self), **vars(self.source), "checkpoint": self.source.name}
        for name, (kinds, expected) in _KINDS.items():
            _check_kind(name, given[name], kinds, expected)
        if not str(self.output).strip():
            raise ExportError(f"output={str(self.output)!r} names no folder; give a name, or . for this one")

    def choice(self) -> ExportChoice:
        """What the settings mean.

        Raises:
            ExportError, QuantizationError: they name what there is not, or do not fit each other.
        """
        lowering = get_backend(self.backend)
        options = _checked_options(self.backend, self.options)
        budget = make_budget(self.target_bits, self.target_size, self.budget)
        algorithm = choose_algorithm(self.algorithm, self.calibrate, self.statistics)
        excluded = _names("exclude", self.exclude)
        uniform = self.group_size is not None or bool(excluded)
        widths = MixRequest(budget=budget, by_default=not uniform, algorithm=algorithm, text=self.measure)
        schemes = self._customized(_schemes(lowering, self.backend, _names("scheme", self.scheme)), excluded)
        check_mixable(schemes, widths, self.group_size)
        return ExportChoice(lowering=lowering, schemes=schemes, algorithm=algorithm, widths=widths, options=options)

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
                    f"scheme {scheme.name!r}: backend {self.backend} has no drafters of it, only: {known}; pass one of "
                    "onnx's fp32, q8 and q4"
                )
        names = ("calibrate", "statistics", "target_bits", "target_size", "budget", "measure")
        for name in names:
            if (value := getattr(self, name)) is not None:
                raise ExportError(f"{option_flag(name)} {value}: is not for drafters; leave it out")
        schemes = tuple(replace(one, embedding=one.linear, head=one.linear) for one in choice.schemes)
        return replace(choice, schemes=schemes, widths=MixRequest(by_default=False, algorithm=choice.algorithm))

    def _customized(self, schemes: Sequence[Scheme], excluded: Sequence[str]) -> tuple[Scheme, ...]:
        """The schemes with what was asked for in those that quantize; that is refused where none does."""
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
        return tuple(_customize(one, self.group_size, excluded) if one.has_groups else one for one in schemes)


@dataclass(frozen=True, kw_only=True)
class ExportChoice:
    """A backend and what it is to make. ``widths``: how those of mixed schemes are found, once the checkpoint is open;
    ``options``: the backend's own settings that were given."""

    lowering: Backend
    schemes: tuple[Scheme, ...]
    algorithm: str
    widths: MixRequest
    options: Mapping[str, int | str]


def _names(what: str, value: str | Sequence[str]) -> list[str]:
    """One name or several; a text is one, not a list of its letters."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ExportError(f"{what}={shown(value)}: a name, or a list of names expected")
    return list(names)


def _check_kind(name: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ExportError(f"{name}={shown(value)}: {expected} expected")


def _checked_options(backend: str, options: Mapping[str, int | str | None]) -> dict[str, int | str]:
    """Those that were given, all of them the backend's."""
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if option := get_backend(backend).OPTIONS.get(name):
            _check_kind(name, value, option.kind, "an integer or None" if option.kind is int else "a name or None")
            continue
        owners = [other for other, one in BACKENDS.items() if name in one.OPTIONS]
        if not owners:
            known = sorted(get_backend(backend).OPTIONS) or ["none"]
            raise ExportError(f"export: {shown(name)} is no setting of backend {backend}; it has: {', '.join(known)}")
        raise ExportError(
            f"{option_flag(name)} {shown(value)}: is for backend {' or '.join(owners)}, not for {backend}; pass "
            f"--backend {owners[0]} or leave it out"
        )
    return given


def _schemes(lowering: Backend, backend: str, names: Sequence[str]) -> list[Scheme]:
    if not names:
        raise ExportError("no scheme was given; pass --scheme q4, for instance")
    found = [get_scheme(name) for name in dict.fromkeys(names)]
    for one in found:
        if one.name not in lowering.SCHEMES:
            raise ExportError(
                f"scheme {one.name!r} is not for backend {backend}; its schemes: {', '.join(lowering.SCHEMES)}"
            )
    return found


def _customize(scheme: Scheme, group_size: int | None, exclude: Sequence[str]) -> Scheme:
    grouped = scheme if group_size is None else scheme.with_group_size(group_size)
    return grouped.with_exclude(exclude)
