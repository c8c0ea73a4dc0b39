"""Conversations about the same pictures, as the model takes them: seen, blind, and blind to one picture at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from visgain.types import Encoded
from visgain.vlm.batch import signature
from visgain.vlm.encode import PER_TOKEN_INPUTS

Rows = Sequence[Encoded]
"""Conversations about the same pictures in the same condition."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """Values [n] that stand in an input from `start` on, in the order of memory, in place of those that are there."""

    start: int
    values: Any  # a tensor, or an array on its way out of a worker

    @classmethod
    def between(cls, one: Tensor, other: Tensor) -> Change:
        """What makes `other` of `one`, which has its shape: the stretch from the first difference to the last."""
        differs = (one != other).flatten().nonzero()
        start, stop = (int(differs[0]), int(differs[-1]) + 1) if len(differs) else (0, 0)
        return cls(start=start, values=other.flatten()[start:stop].clone())

    def made(self, value: Tensor) -> Tensor:
        changed = value.flatten().clone()
        changed[self.start : self.start + len(self.values)] = self.values
        return changed.view(value.shape)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Conversations about the same pictures. `seen` and `blind` are the model inputs that hold the pictures.

    `blind_rows`: the rows as the model reads them blind, if they are not `rows` with other pictures: without pictures,
    or with pictures that are masked.
    `blind_to[k]` is what becomes of `seen` when picture k alone gives way to its counterfactual: all inputs of all
    pictures for each of them would be many times as much. Empty where nobody asks.
    The rows' own inputs are those with a value a token.
    """

    rows: Rows
    seen: Mapping[str, Any]
    blind: Mapping[str, Any]
    blind_to: Sequence[Mapping[str, Any]] = ()
    blind_rows: Rows = ()

    @classmethod
    def of(cls, rows: Rows, blind: Mapping[str, Any], blind_to: Iterable[Mapping[str, Any]] = ()) -> Unit:
        """From rows that hold their pictures, which are taken alike, and the first one's inputs when blind."""
        seen = _split(rows[0].model_inputs)[1]
        return cls(
            rows=[replace(row, model_inputs=_split(row.model_inputs)[0]) for row in rows],
            seen=seen,
            blind=_split(blind)[1],
            blind_to=[_changes(seen, _split(inputs)[1]) for inputs in blind_to],
        )

    @classmethod
    def dropped(cls, rows: Rows, without: Rows) -> Unit:
        """From rows as in `of`, and each of them without its pictures."""
        return replace(cls.of(rows, {}), blind_rows=tuple(without))

    @classmethod
    def masked(cls, rows: Rows) -> Unit:
        """From rows as in `of`, whose pictures are the same when blind, and hidden."""
        unit = cls.of(rows, rows[0].model_inputs)
        return replace(unit, blind_rows=tuple(replace(row, masked=True) for row in unit.rows))

    def some(self, which: slice) -> Unit:
        """The same about some of the rows."""
        return replace(self, rows=self.rows[which], blind_rows=self.blind_rows[which])

    def conditions(self) -> Iterator[Rows]:
        """The rows as the model reads them: seen, blind, blind to one picture after the other."""
        pictures = self.pictures()
        yield self.rows_with(next(pictures))
        yield _with(self.blind_rows or self.rows, next(pictures))
        yield from map(self.rows_with, pictures)

    def pictures(self) -> Iterator[Mapping[str, Any]]:
        """The inputs that hold the pictures in each of the conditions."""
        yield self.seen
        yield self.blind
        for changes in self.blind_to:
            yield {**self.seen, **{name: _made(change, self.seen.get(name)) for name, change in changes.items()}}

    def rows_with(self, pictures: Mapping[str, Any]) -> Rows:
        """The rows with `pictures` (`seen`, `blind` or any other) among their inputs."""
        return _with(self.rows, pictures)

    @property
    def kind(self) -> Any:
        """Units of the same kind can go side by side, in as many conditions."""
        return signature(self.rows_with(self.seen)[0]), len(self.blind_to)


def _with(rows: Rows, pictures: Mapping[str, Any]) -> Rows:
    return [replace(row, model_inputs={**row.model_inputs, **pictures}) for row in rows]


def _changes(seen: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What to change in `seen` to make it `other`: a Change where an input keeps its shape, else the whole input."""
    return {name: _change(seen.get(name), value) for name, value in other.items()}


def _change(one: Any, other: Any) -> Any:
    tensors = isinstance(one, Tensor) and isinstance(other, Tensor)
    return Change.between(one, other) if tensors and (one.shape, one.dtype) == (other.shape, other.dtype) else other


def _made(change: Any, value: Any) -> Any:
    return change.made(value) if isinstance(change, Change) else change


def taken_alike(one: Encoded, other: Encoded) -> bool:
    """Whether the model takes the same pictures alike in two rows. A Q-Former reads the question beside them."""
    return equal(_split(one.model_inputs)[1], _split(other.model_inputs)[1])


def _split(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model inputs that have a value a token, and the others."""
    own = {name: value for name, value in inputs.items() if name in PER_TOKEN_INPUTS}
    return own, {name: value for name, value in inputs.items() if name not in own}


def equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(not isinstance(value, torch.Tensor) or torch.equal(value, other[name]) for name, value in one.items())
