"""What a sweep is asked for: the plan's file, read and checked by name.

In: a YAML file. Out: a ``Plan`` of checkpoints, backends, schemes, variants, exceptions and gates; each typo is one
line with its place. Paths in it count from the plan's own folder. No checkpoint is opened and nothing is written here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from lfm2_export import paths
from lfm2_export.backends import BACKENDS
from lfm2_export.calibration.text import SELF
from lfm2_export.checkpoint import CheckpointRequest
from lfm2_export.choices import AlgorithmName, BudgetName
from lfm2_export.errors import ConfigError, Lfm2ExportError
from lfm2_export.messages import named, shown
from lfm2_export.mixing.budget import parse_size
from lfm2_export.quant.schemes import SCHEMES
from lfm2_export.source import BUNDLED, HUB_ID
from lfm2_export.spelling import did_you_mean
from lfm2_export.sweep.document import Value, read

DEFAULT_MAX_TOKENS = 4096
DEFAULT_RETRIES = 2
_MOST_RETRIES, _MOST_THREADS, _MOST_TOKENS = 10, 1024, 1 << 20
_KEYS = (
    "output",
    "checkpoints",
    "backends",
    "schemes",
    "settings",
    "variants",
    "cells",
    "gates",
    "quality",
    "impossible",
    "threads",
    "retries",
)
_CHECKPOINT_KEYS = ("checkpoint", "name", "revision", "config_from", "lora", "offline")
_WHERE = ("checkpoint", "backend", "scheme", "variant")
_GATES = ("max_kl", "min_top1", "max_bytes")
REFUSE, SKIP = "refuse", "skip"
# Of a name that becomes a folder's.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Gates:
    """What a cell must hold; None: anything. ``max_kl`` in nats, ``min_top1`` a share, ``max_bytes`` of its program's
    files."""

    max_kl: float | None = None
    min_top1: float | None = None
    max_bytes: int | None = None

    @property
    def need_figures(self) -> bool:
        """Whether the model must be run for them."""
        return self.max_kl is not None or self.min_top1 is not None

    def over(self, other: Gates) -> Gates:
        """These, and where one is not given the other's."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return replace(other, **given)


@dataclass(frozen=True, kw_only=True)
class PlannedCheckpoint:
    """``name`` is its cells'. ``line``: where the plan has it."""

    name: str
    request: CheckpointRequest
    line: int


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Settings of ``export`` under a name; the plan's only one has none."""

    name: str | None
    settings: Mapping[str, Setting]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """An argument of ``export``, and where the plan has it."""

    value: Any
    line: int


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An exception: what differs for the cells that ``where`` (checkpoint, backend, scheme, variant) names."""

    where: Mapping[str, str]
    settings: Mapping[str, Setting]
    gates: Gates
    skip: bool
    line: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole plan; ``schemes`` None: each backend's default. ``text`` None: the bundled held-out text; ``measure``:
    whether quality is measured at all. ``threads`` of a cell, None: as many as the machine has for it. ``lines``: of
    the plan's keys."""

    path: Path
    output: Path
    checkpoints: tuple[PlannedCheckpoint, ...]
    backends: tuple[str, ...]
    schemes: tuple[str, ...] | None
    variants: tuple[Variant, ...]
    rules: tuple[Rule, ...]
    gates: Gates
    measure: bool
    text: Path | None
    max_tokens: int
    skip_impossible: bool
    threads: int | None
    retries: int
    lines: Mapping[str, int]

    def error(self, message: str, *, line: int) -> ConfigError:
        return ConfigError(f"{paths.shown(self.path)}:{line}: {message}")


def read_plan(path: str | Path) -> Plan:
    """A plan's file.

    Raises:
        ConfigError: it cannot be read, or asks for something that there is not; the line is named.
    """
    root = read(Path(path))
    keys = root.mapping("a plan", _KEYS)
    for name in ("output", "checkpoints"):
        if name not in keys:
            raise root.error(f"a plan needs {name}; add the key")
    folder = Path(path).absolute().parent
    settings = _settings(keys.get("settings"), folder)
    quality = keys.get("quality")
    measure = quality is None or quality.content is not False
    text, max_tokens = _quality(quality if measure else None, folder)
    plan = Plan(
        path=Path(path),
        output=_path(keys["output"].text("output"), folder),
        checkpoints=_checkpoints(keys["checkpoints"], folder),
        backends=_distinct(keys, "backends", "backend", BACKENDS) or ("onnx",),
        schemes=_distinct(keys, "schemes", "scheme", SCHEMES),
        variants=_variants(keys.get("variants"), settings, folder),
        rules=(),
        gates=_gates(keys.get("gates")),
        measure=measure,
        text=text,
        max_tokens=max_tokens,
        skip_impossible=_optional(keys, "impossible", lambda one: one.choice("impossible", (REFUSE, SKIP))) == SKIP,
        threads=_optional(keys, "threads", lambda one: one.integer("threads", least=1, most=_MOST_THREADS)),
        retries=_retries(keys.get("retries")),
        lines=root.key_lines,
    )
    rules = tuple(_rule(one, plan, folder) for one in keys["cells"].items("cells")) if "cells" in keys else ()
    _check_gates(keys, plan, rules)
    _check_output(plan, keys["output"].line)
    return replace(plan, rules=rules)


def _optional(keys: Mapping[str, Value], name: str, read: Callable[[Value], Any]) -> Any:
    return read(keys[name]) if name in keys else None


def _retries(value: Value | None) -> int:
    return DEFAULT_RETRIES if value is None else value.integer("retries", least=0, most=_MOST_RETRIES)


def _distinct(keys: Mapping[str, Value], key: str, what: str, known: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of a list, each once."""
    if key not in keys:
        return None
    found: dict[str, int] = {}
    for one in keys[key].items(key):
        name = one.choice(what, known)
        if name in found:
            raise one.error(f"{what} {name} is there already, in line {found[name]}; give it once")
        found[name] = one.line
    return tuple(found)


def _path(text: str, folder: Path) -> Path:
    return Path(os.path.normpath(folder / Path(text).expanduser()))


def _checkpoints(value: Value, folder: Path) -> tuple[PlannedCheckpoint, ...]:
    found: dict[str, PlannedCheckpoint] = {}
    for one in value.items("checkpoints"):
        planned = _checkpoint(one, folder)
        if (other := found.get(planned.name)) is not None:
            same = other.request == planned.request
            raise one.error(
                f"checkpoint {named(planned.name)} is there already, in line {other.line}; "
                + ("give it once" if same else "give one of the two another name (name: ...)")
            )
        found[planned.name] = planned
    return tuple(found.values())


def _checkpoint(value: Value, folder: Path) -> PlannedCheckpoint:
    if isinstance(value.content, str):
        keys: Mapping[str, Value] = {"checkpoint": value}
    else:
        keys = value.mapping("a checkpoint", _CHECKPOINT_KEYS)
        if "checkpoint" not in keys:
            raise value.error(
                "a checkpoint needs the key checkpoint: a folder, a GGUF file, a Hub id or a bundled name"
            )
    place = _source(keys["checkpoint"], "checkpoint", folder)
    name = (
        keys["name"].text("name")
        if "name" in keys
        else re.sub(r"[^A-Za-z0-9._-]+", "-", Path(place).name).strip(".-_")[:64]
    )
    if not _NAME.fullmatch(name):
        at = keys.get("name", value)
        raise at.error(f"name {shown(name)}: up to 64 letters, digits, dots and dashes, a letter first; give another")
    return PlannedCheckpoint(
        name=name,
        line=value.line,
        request=CheckpointRequest(
            name=place,
            revision=_optional(keys, "revision", lambda one: one.text("revision")),
            offline=bool(_optional(keys, "offline", lambda one: one.truth("offline"))),
            config_from=_optional(keys, "config_from", lambda one: _source(one, "config_from", folder)),
            lora=_optional(keys, "lora", lambda one: str(_existing(one, "lora", folder))),
        ),
    )


def _source(value: Value, what: str, folder: Path) -> str:
    """A checkpoint as ``open_checkpoint`` takes it, folders from the plan's on."""
    name = value.text(what)
    if name in BUNDLED:
        return name
    place = _path(name, folder)
    if paths.exists(place, ConfigError):
        return str(place)
    if HUB_ID.fullmatch(name) or (name.lower().endswith(".gguf") and name.count("/") >= 2 and name[0] not in "./~"):
        return name
    raise value.error(
        f"{what} {shown(name)}: no such folder or file ({paths.shown(place, 100)}), bundled name or Hub id"
        f"{did_you_mean(name, BUNDLED)}"
    )


def _existing(value: Value, what: str, folder: Path) -> Path:
    place = _path(value.text(what), folder)
    if not paths.exists(place, ConfigError):
        raise value.error(f"{what}: there is no {paths.shown(place)}; check the spelling")
    return place


def _calibrate(value: Value, what: str, folder: Path) -> str:
    name = value.text(what)
    if name in ("default", SELF):
        return name
    place = _path(name, folder)
    if not paths.is_file(place, ConfigError):
        hint = did_you_mean(name, ("default", SELF))
        raise value.error(
            f"{what} {shown(name)}: default, self or a file expected{hint}; no file {paths.shown(place, 100)}"
        )
    return str(place)


def _size(value: Value, what: str) -> int:
    """Bytes, or a size with a unit."""
    if type(value.content) is int and value.content >= 0:
        return value.content
    try:
        return parse_size(value.text(what))
    except Lfm2ExportError as error:
        raise value.error(
            f"{what}: bytes, or a size such as 700MB or 1.2GB expected, found {shown(value.content)}"
        ) from error


_Reader = Callable[[Value, str, Path], Any]


def _file(value: Value, what: str, folder: Path) -> str:
    return str(_existing(value, what, folder))


# Of ``export``'s arguments those that a plan may set. A file of statistics that does not exist yet several cells would
# write at once.
_SETTINGS: Mapping[str, _Reader] = {
    "group_size": lambda one, what, folder: one.integer(what, least=1, most=1 << 20),
    "exclude": lambda one, what, folder: tuple(item.text(what) for item in one.items(what)),
    "algorithm": lambda one, what, folder: one.choice(what, get_args(AlgorithmName)),
    "calibrate": _calibrate,
    "statistics": _file,
    "target_bits": lambda one, what, folder: one.number(what, least=0, most=32),
    "target_size": lambda one, what, folder: _size(one, what),
    "budget": lambda one, what, folder: one.choice(what, get_args(BudgetName)),
    "measure": _file,
    "requantize_table": lambda one, what, folder: one.truth(what),
}
# Those of them that name a file, whose content counts.
FILES = ("calibrate", "statistics", "measure")


def _readers() -> dict[str, _Reader]:
    own = {
        name: (
            (lambda one, what, folder: one.integer(what, least=0, most=1 << 30))
            if option.kind is int
            else (lambda one, what, folder: one.text(what))
        )
        for backend in BACKENDS.values()
        for name, option in backend.OPTIONS.items()
    }
    return {**_SETTINGS, **own}


def _settings(value: Value | None, folder: Path) -> dict[str, Setting]:
    """Settings of ``export`` by its names for them."""
    if value is None:
        return {}
    readers = _readers()
    found = {
        name: Setting(value=readers[name](one, name, folder), line=one.line)
        for name, one in value.mapping("settings", readers).items()
    }
    if "calibrate" in found and "statistics" in found:
        raise value.error(
            "calibrate and statistics: a plan's cells would write the file at once; give one of the two",
            line=found["statistics"].line,
        )
    return found


def _variants(value: Value | None, settings: Mapping[str, Setting], folder: Path) -> tuple[Variant, ...]:
    if value is None:
        return (Variant(name=None, settings=settings),)
    found = []
    for name, one in value.entries("variants").items():
        if not _NAME.fullmatch(name):
            raise value.error(
                f"variant {shown(name)}: up to 64 letters, digits, dots and dashes, a letter first; give another name",
                line=value.key_lines[name],
            )
        own = {} if one.content is None else _settings(one, folder)
        found.append(Variant(name=name, settings={**settings, **own}))
    if not found:
        raise value.error("variants is empty; name at least one, or leave the key out")
    return tuple(found)


def _gates(value: Value | None) -> Gates:
    if value is None:
        return Gates()
    keys = value.mapping("gates", _GATES)
    return Gates(
        max_kl=_optional(keys, "max_kl", lambda one: one.number("max_kl", least=0, most=1e9)),
        min_top1=_optional(keys, "min_top1", lambda one: one.number("min_top1", least=0, most=1)),
        max_bytes=_optional(keys, "max_bytes", lambda one: _size(one, "max_bytes")),
    )


def _quality(value: Value | None, folder: Path) -> tuple[Path | None, int]:
    if value is None or value.content is True:
        return None, DEFAULT_MAX_TOKENS
    keys = value.mapping("quality", ("text", "max_tokens"))
    tokens = _optional(keys, "max_tokens", lambda one: one.integer("max_tokens", least=96, most=_MOST_TOKENS))
    return _optional(keys, "text", lambda one: _existing(one, "text", folder)), tokens or DEFAULT_MAX_TOKENS


def _rule(value: Value, plan: Plan, folder: Path) -> Rule:
    keys = value.mapping("an entry of cells", (*_WHERE, "settings", "gates", "skip"))
    known: Mapping[str, list[str]] = {
        "checkpoint": [one.name for one in plan.checkpoints],
        "backend": list(plan.backends),
        "scheme": list(plan.schemes or dict.fromkeys(BACKENDS[name].DEFAULT_SCHEME for name in plan.backends)),
        "variant": [one.name for one in plan.variants if one.name is not None],
    }
    where = {name: keys[name].choice(f"{name} of this plan:", known[name]) for name in _WHERE if name in keys}
    if not where:
        raise value.error(
            f"an entry of cells says which ones: by {', '.join(_WHERE)}; for all of them use the plan's own"
        )
    if not keys.keys() & {"settings", "gates", "skip"}:
        raise value.error("an entry of cells changes something: settings, gates or skip; add one")
    return Rule(
        where=where,
        settings=_settings(keys.get("settings"), folder),
        gates=_gates(keys.get("gates")),
        skip=bool(_optional(keys, "skip", lambda one: one.truth("skip"))),
        line=value.line,
    )


def _check_gates(keys: Mapping[str, Value], plan: Plan, rules: tuple[Rule, ...]) -> None:
    if plan.measure:
        return
    if plan.gates.need_figures:
        raise keys["gates"].error("gates on max_kl and min_top1 need figures; leave `quality: false` out")
    for rule in rules:
        if rule.gates.need_figures:
            raise plan.error("gates on max_kl and min_top1 need figures; leave `quality: false` out", line=rule.line)


def _check_output(plan: Plan, line: int) -> None:
    """Refuses a place where the sweep would write into a checkpoint, or that is taken."""
    output = paths.real(plan.output, ConfigError)
    if paths.is_file(output, ConfigError):
        raise plan.error(f"output {paths.shown(output)} is a file; give a folder's name", line=line)
    for one in plan.checkpoints:
        for place in (one.request.name, one.request.config_from, one.request.lora):
            if place is None or place in BUNDLED or not Path(place).is_absolute():
                continue
            source = paths.real(place, ConfigError)
            if output == source or output.is_relative_to(source):
                raise plan.error(
                    f"output lies in checkpoint {named(one.name)} ({source}); give another folder", line=line
                )
            if source.is_relative_to(output / "cells"):
                raise plan.error(
                    f"checkpoint {named(one.name)} lies where the sweep writes, in cells/; give another output",
                    line=line,
                )
