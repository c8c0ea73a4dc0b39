"""Name -> object, loaded when asked for.

A registry entry is either the object or a `"module:attribute"` string that is imported on first use, so that listing
names costs nothing. Other packages add entries through Python entry points in the group `visgain.<kind>`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, cast

from visgain.errors import UnknownName

T = TypeVar("T")


def suggest(name: str, known: Iterable[str]) -> str:
    """A sentence that helps with a mistyped name: the nearest known one, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"


class Registry(Generic[T]):
    """The named objects of one kind, e.g. counterfactuals."""

    def __init__(self, kind: str, entries: Mapping[str, T | str]) -> None:
        self.kind = kind
        self._entries: dict[str, T | str] = dict(entries)

    def names(self) -> list[str]:
        """Every name, built in or from plug-ins, sorted. Imports nothing."""
        return sorted({*self._entries, *self._plugins()})

    def get(self, name: str) -> T:
        """The object called `name`. Raises UnknownName with the nearest known name."""
        if name in self._entries:
            entry = self._entries[name]
            if isinstance(entry, str):
                module, _, attribute = entry.partition(":")
                entry = self._entries[name] = cast("T", getattr(importlib.import_module(module), attribute))
            return entry
        plugins = self._plugins()
        if name in plugins:
            return cast("T", plugins[name].load())
        raise UnknownName(f"unknown {self.kind} {name!r}: {suggest(name, self.names())}")

    def _plugins(self) -> dict[str, EntryPoint]:
        group = f"visgain.{self.kind.replace(' ', '_')}s"
        return {point.name: point for point in entry_points(group=group)}
