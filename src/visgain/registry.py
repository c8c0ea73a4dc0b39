"""Name -> object, loaded when asked for.

A registry entry is either the object or a `"module:attribute"` string that is imported on first use, so that listing
names costs nothing. Other packages add entries through Python entry points in the group `visgain.<kind>`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, cast, get_type_hints

from visgain.errors import ConfigError, UnknownName

T = TypeVar("T")


def suggest(name: str, known: Iterable[str]) -> str:
    """A sentence that helps with a mistyped name: the nearest known one, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"


def spec_of(name: str, made: Any) -> str:
    """The canonical text of a dataclass with the value of every option, which `Registry.make` reads back."""
    options = _options(made)
    return name + ":" * bool(options) + ",".join(f"{key}={value}" for key, value in options.items())


def _options(made: Any) -> dict[str, Any]:
    return {option.name: getattr(made, option.name) for option in fields(made)}


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

    def make(self, spec: str) -> Any:
        """What `name` or `name:key=value,key=value` says, where entries are dataclasses whose fields have defaults.

        Raises UnknownName or ConfigError.
        """
        name, _, text = spec.partition(":")
        kind = cast("Any", self.get(name.strip()))
        defaults = _options(kind())
        types = get_type_hints(kind)
        known = ",".join(f"{key}={value}" for key, value in defaults.items())
        valid = f"options of {name.strip()}: {known}" if defaults else f"{name.strip()} takes no options"
        options: dict[str, Any] = {}
        for option in text.split(",") if text else ():
            key, equals, value = (part.strip() for part in option.partition("="))
            if not equals or key not in defaults or key in options:
                raise ConfigError(f"{self.kind} {spec!r}: {option.strip()!r} is not one new key=value; {valid}")
            try:
                options[key] = types[key](value)
            except ValueError:
                raise ConfigError(
                    f"{self.kind} {spec!r}: {key} is {value!r}, not {types[key].__name__}; {valid}"
                ) from None
        return kind(**options)

    def _plugins(self) -> dict[str, EntryPoint]:
        group = f"visgain.{self.kind.replace(' ', '_')}s"
        return {point.name: point for point in entry_points(group=group)}
