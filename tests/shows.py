"""What a test shows: the cells of the support table (``lfm2_export.tested``) that it proves when it passes.

``@shows("genai", "greedy", family=of("checkpoint"), scheme=of("scheme"))`` stands at a test; ``of`` reads one of its
parameters. Out: the cells of a collected test, which ``tests.recording`` writes down beside how it ended.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from lfm2_export.families import DRAFTERS, FAMILIES
from lfm2_export.quant.schemes import SCHEMES
from lfm2_export.source import ASSETS, BUNDLED
from lfm2_export.tested import FEATURES, RUNTIMES, Cell

MARK = "shows"


@dataclass(frozen=True)
class Of:
    """A test's parameter; ``pick`` makes a name (or several, or None: nothing is shown) of its value."""

    parameter: str
    pick: Callable[[Any], Any]


Named = str | tuple[str, ...] | Of


def of(parameter: str, pick: Callable[[Any], Any] = lambda value: value) -> Of:
    """What a parameter says; the name of a bundled checkpoint stands for its family."""
    return Of(parameter, pick)


def shows(runtime: Named, *features: str, family: Named, scheme: Named) -> pytest.MarkDecorator:
    """That a test which passes has seen ``features`` of a runtime, with every program of ``family`` and ``scheme``."""
    return getattr(pytest.mark, MARK)(runtime, features, family, scheme)


def cells_of(item: pytest.Item) -> tuple[Cell, ...]:
    """What a collected test shows.

    Raises:
        ValueError: a name is none of the table's.
    """
    found = set()
    for mark in item.iter_markers(MARK):
        runtime, features, family, scheme = mark.args
        named = (_names(item, runtime), _names(item, family), _names(item, scheme), features)
        found |= {_checked(item, *names) for names in itertools.product(*named)}
    return tuple(sorted(found))


def _names(item: pytest.Item, named: Named) -> Iterable[str]:
    if isinstance(named, Of):
        callspec = getattr(item, "callspec", None)
        if callspec is None or named.parameter not in callspec.params:
            raise ValueError(f"{item.nodeid}: has no parameter {named.parameter}, which its mark 'shows' reads")
        named = named.pick(callspec.params[named.parameter])
    names = () if named is None else (named,) if isinstance(named, str) else named
    return [_family_of(name) if name in BUNDLED else name for name in names]


@cache
def _family_of(checkpoint: str) -> str:
    family: str = json.loads((ASSETS / checkpoint / "config.json").read_text())["model_type"]
    return family


def _checked(item: pytest.Item, runtime: str, family: str, scheme: str, feature: str) -> Cell:
    known = ((runtime, RUNTIMES), (family, {*FAMILIES, *DRAFTERS}), (scheme, SCHEMES), (feature, FEATURES))
    for name, names in known:
        if name not in names:
            raise ValueError(f"{item.nodeid}: 'shows' names {name}, which is none of {', '.join(sorted(names))}")
    return Cell(runtime=runtime, family=family, scheme=scheme, feature=feature)
