"""Things found by a name: ours are imported when they are asked for, others may be registered beside them.

In: names with what they stand for, or where it can be imported from ("module" or "module:attribute"). Out: a mapping.
Families, nets, backends and schemes are registered so; nothing else dispatches on their names.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, TypeVar, cast

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping whose values are imported at the first use, in the order of registration."""

    def __init__(self, entries: Mapping[str, T | str]):
        self._entries: dict[str, T | str] = dict(entries)

    def __getitem__(self, name: str) -> T:
        entry = self._entries[name]
        if isinstance(entry, str):
            entry = cast("T", _load(entry))
            self._entries[name] = entry
        return entry

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    def register(self, name: str, value: T) -> None:
        """Adds ``value`` under a name that is free.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._entries:
            raise ValueError(f"{name} is registered already")
        self._entries[name] = value

    @contextmanager
    def registered(self, name: str, value: T) -> Iterator[None]:
        """``register`` for the time of a ``with`` block."""
        self.register(name, value)
        try:
            yield
        finally:
            del self._entries[name]


def _load(place: str) -> object:
    module, _, attribute = place.partition(":")
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded
