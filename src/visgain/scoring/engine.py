"""The ways to compute NLLs, from the fastest to the plainest, and the check that decides between them.

All are exact where a model does what they assume. Whether it does is not looked up by its name but tried: at the start,
a few rows of the dataset are scored one by one, by the model's own unaided forward, and then in each way, until one
agrees. The ways:

- shared    several pictures in a pack, conversations about one picture share its tokens (visgain.vlm.pack)
- mutual    the same, where the tokens of a picture see each other's future, as in Gemma 3
- cached    the tokens that conversations share go through the model once and stay in its own cache
- packed    several conversations in a pack, nothing shared
- single    one conversation after the other

The canary is part of the check: another picture must change the scores, or the pictures do not reach the model.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from visgain.errors import ModelError
from visgain.scoring.forward import answer_nll
from visgain.types import Encoded
from visgain.vlm.batch import signature
from visgain.vlm.encode import PER_TOKEN_INPUTS
from visgain.vlm.forward import pack_nll
from visgain.vlm.load import VLM
from visgain.vlm.logits import answer_logits, token_nll
from visgain.vlm.pack import Branch, branches, pack, placed, row_positions

NLL = Float32[np.ndarray, " A"]
Rows = Sequence[Encoded]
"""Conversations about the same pictures in the same condition."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}
"""Largest difference in nats to the plain forward at which a way counts as exact. In 16 bits the plain forward is
itself off by about as much; a wrong mask or position is off by more."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Conversations about the same pictures. `seen` and `blind` are the model inputs that hold the pictures.

    The rows' own inputs are those with a value a token.
    """

    rows: Rows
    seen: Mapping[str, Any]
    blind: Mapping[str, Any]

    @classmethod
    def of(cls, rows: Rows, blind: Mapping[str, Any]) -> Unit:
        """From rows that hold their pictures, which are the same, and the first one's inputs when blind."""
        return cls(
            rows=[replace(row, model_inputs=_split(row.model_inputs)[0]) for row in rows],
            seen=_split(rows[0].model_inputs)[1],
            blind=_split(blind)[1],
        )

    def rows_with(self, pictures: Mapping[str, Any]) -> Rows:
        """The rows with `pictures` (`seen`, `blind` or any other) among their inputs."""
        return [replace(row, model_inputs={**row.model_inputs, **pictures}) for row in self.rows]

    @property
    def kind(self) -> Any:
        """Units of the same kind can go side by side."""
        return signature(self.rows_with(self.seen)[0])


def _split(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model inputs that have a value a token, and the others."""
    own = {name: value for name, value in inputs.items() if name in PER_TOKEN_INPUTS}
    return own, {name: value for name, value in inputs.items() if name not in own}


# ---------------------------------------------------------------- the ways


def shared(vlm: VLM, groups: Sequence[Rows], *, mutual: bool = False) -> list[NLL]:
    return _pack_nll(vlm, [branch for rows in groups for branch in branches(rows, vlm.image_token_id)], mutual=mutual)


def mutual(vlm: VLM, groups: Sequence[Rows]) -> list[NLL]:
    return shared(vlm, groups, mutual=True)


def packed(vlm: VLM, groups: Sequence[Rows]) -> list[NLL]:
    return _pack_nll(vlm, [Branch(rows=[row], n_shared=0) for rows in groups for row in rows])


def cached(vlm: VLM, groups: Sequence[Rows]) -> list[NLL]:
    parts = [branch for rows in groups for branch in branches(rows, vlm.image_token_id)]
    return [nll for part in parts for nll in (_after_cache(vlm, part) if part.n_shared else single(vlm, [part.rows]))]


def single(vlm: VLM, groups: Sequence[Rows]) -> list[NLL]:
    return [answer_nll(vlm, [row])[0] for rows in groups for row in rows]


Way = Callable[[VLM, Sequence[Rows]], list[NLL]]
WAYS: Mapping[str, Way] = {way.__name__: way for way in (shared, mutual, cached, packed, single)}


def _pack_nll(vlm: VLM, parts: Sequence[Branch], *, mutual: bool = False) -> list[NLL]:
    return pack_nll(vlm.model, pack(vlm.model, parts, vlm.image_token_id, mutual=mutual))


@torch.inference_mode()
def _after_cache(vlm: VLM, branch: Branch) -> list[NLL]:
    """The shared tokens once, then each conversation on a copy of the cache that they leave."""
    inputs = _span_inputs(vlm, branch.rows[0], 0, branch.n_shared)
    cache = vlm.model.base_model(**inputs, use_cache=True).past_key_values
    nlls = []
    for row in branch.rows:
        inputs = _span_inputs(vlm, row, branch.n_shared, len(row.input_ids))
        is_answer = torch.from_numpy(row.is_answer[None, branch.n_shared :]).to(vlm.device)
        logits = answer_logits(vlm.model, inputs | {"past_key_values": copy.deepcopy(cache)}, is_answer)
        nlls.append(token_nll(logits, inputs["input_ids"][is_answer]).cpu().numpy())
    return nlls


def _span_inputs(vlm: VLM, row: Encoded, start: int, stop: int) -> dict[str, Any]:
    """Inputs for tokens [start, stop) of `row`, with its pictures if that is where they are."""
    inputs: dict[str, Any] = {
        "input_ids": torch.from_numpy(row.input_ids[None, start:stop]),
        "attention_mask": torch.ones(1, stop, dtype=torch.int64),
        "position_ids": row_positions(vlm.model, row)[..., start:stop],
    }
    for name, value in row.model_inputs.items():
        if name in PER_TOKEN_INPUTS:
            inputs[name] = value[:, start:stop]
        elif start == 0:
            inputs[name] = value
    return {name: placed(value, vlm.model) for name, value in inputs.items()}


# ---------------------------------------------------------------- the engine


@dataclass(kw_only=True)
class Engine:
    """A model and the way in which it computes. `pack_tokens` shrinks where the memory turns out to be too small."""

    vlm: VLM
    way: str
    pack_tokens: int

    def score(self, units: Sequence[Unit]) -> list[tuple[NLL, NLL]]:
        """(seen, blind) NLLs in nats of the answer tokens of each row, unit after unit.

        The two conditions run in the same shapes, so that what is subtracted was rounded alike. Raises ModelError if a
        single conversation is too large for the device's memory.
        """
        try:
            seen = WAYS[self.way](self.vlm, [unit.rows_with(unit.seen) for unit in units])
            blind = WAYS[self.way](self.vlm, [unit.rows_with(unit.blind) for unit in units])
            return list(zip(seen, blind, strict=True))
        except torch.OutOfMemoryError as error:
            smaller = halves(units)
            if smaller is None:
                size = len(units[0].rows[0].input_ids)
                raise ModelError(
                    f"out of memory on {self.vlm.device} with one conversation of {size} tokens"
                ) from error
        torch.cuda.empty_cache()
        self.pack_tokens = max(1, self.pack_tokens // 2)
        return [pair for half in smaller for pair in self.score(half)]

    def n_tokens(self, unit: Unit) -> int:
        """Tokens that `unit` takes in one condition."""
        if self.way in ("shared", "mutual", "cached"):
            return sum(branch.n_tokens for branch in branches(unit.rows, self.vlm.image_token_id))
        return sum(len(row.input_ids) for row in unit.rows)


def halves(units: Sequence[Unit]) -> tuple[list[Unit], list[Unit]] | None:
    """`units` in two, in order: by units, else by the rows of the only one; None if there is but one row."""
    if len(units) > 1:
        return list(units[: len(units) // 2]), list(units[len(units) // 2 :])
    rows = units[0].rows
    if len(rows) == 1:
        return None
    return [replace(units[0], rows=rows[: len(rows) // 2])], [replace(units[0], rows=rows[len(rows) // 2 :])]


def scored(engine: Engine, units: Iterable[Unit]) -> Iterator[tuple[Unit, list[tuple[NLL, NLL]]]]:
    """Each of `units` with the (seen, blind) NLLs of its rows, as packs of at most `engine.pack_tokens` fill up.

    A pack holds units whose inputs go side by side. The same units in the same order make the same packs.
    """
    waiting: dict[Any, list[Unit]] = {}
    sizes: dict[Any, int] = {}
    for unit in units:
        kind, size = unit.kind, engine.n_tokens(unit)
        if kind in waiting and sizes[kind] + size > engine.pack_tokens:
            yield from _by_unit(engine, waiting.pop(kind))
            sizes.pop(kind)
        waiting.setdefault(kind, []).append(unit)
        sizes[kind] = sizes.get(kind, 0) + size
    for pack_of_units in waiting.values():
        yield from _by_unit(engine, pack_of_units)


def _by_unit(engine: Engine, units: Sequence[Unit]) -> Iterator[tuple[Unit, list[tuple[NLL, NLL]]]]:
    pairs = iter(engine.score(units))
    for unit in units:
        yield unit, list(itertools.islice(pairs, len(unit.rows)))


# ---------------------------------------------------------------- the choice


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The way that was chosen, and why the ones before it were not; `finite`: whether all NLLs of the probes are."""

    way: str
    rejected: Mapping[str, str]
    finite: bool


def choose_way(vlm: VLM, probes: Sequence[Unit], ways: Iterable[str] = WAYS) -> Choice:
    """The first of `ways` that scores `probes` as the model's plain forward does.

    Raises ModelError if no way agrees, or if the pictures do not reach the model.
    """
    reference = _all_nll(vlm, "single", probes)
    _check_canary(vlm, probes, reference)
    rejected: dict[str, str] = {}
    for way in ways:
        reason = _disagreement(vlm, way, probes, reference)
        if reason is None:
            return Choice(way=way, rejected=rejected, finite=bool(np.isfinite(reference).all()))
        rejected[way] = reason
    reasons = "; ".join(f"{way}: {reason}" for way, reason in rejected.items())
    raise ModelError(f"no way of scoring agrees with the model's own forward ({reasons})")


def _all_nll(vlm: VLM, way: str, units: Sequence[Unit]) -> Float32[np.ndarray, "2 A"]:
    """NLLs of all answer tokens of `units` in their order, seen and blind, from packs as large as can be."""
    engine = Engine(vlm=vlm, way=way, pack_tokens=sum(len(row.input_ids) for unit in units for row in unit.rows))
    found = {id(unit): pairs for unit, pairs in scored(engine, units)}
    pairs = [np.stack(pair) for unit in units for pair in found[id(unit)]]
    return np.concatenate(pairs, axis=1)


def _disagreement(vlm: VLM, way: str, probes: Sequence[Unit], reference: Float32[np.ndarray, "2 A"]) -> str | None:
    """Why `way` cannot be used, or None."""
    try:
        difference = np.abs(_all_nll(vlm, way, probes) - reference)
    except Exception as error:  # a model that does not take packs may fail anywhere, in any manner
        return (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__
    # Where the reference is not finite, the guard against that has its say later.
    worst = float(difference[np.isfinite(reference)].max(initial=0.0))
    return None if worst <= TOLERANCE[vlm.model.dtype] else f"off by {worst:.2g} nats"


def _check_canary(vlm: VLM, probes: Sequence[Unit], reference: Float32[np.ndarray, "2 A"]) -> None:
    """Raises ModelError if the counterfactual, or another picture in the first one's place, changes no score."""
    blurred = any(not _equal(unit.seen, unit.blind) for unit in probes)
    if blurred and np.array_equal(*reference):
        raise ModelError(
            f"{vlm.name} answers the same with the picture and with the counterfactual: pictures do not reach the model"
        )
    swapped = [
        replace(unit, blind=other.seen)
        for unit, other in itertools.pairwise(probes)
        if unit.kind == other.kind
        and unit.rows[0].n_image_tokens == other.rows[0].n_image_tokens
        and not _equal(unit.seen, other.seen)
    ]
    if swapped and np.array_equal(*_all_nll(vlm, "single", swapped)):
        raise ModelError(f"{vlm.name} answers the same about another picture: the pictures do not reach the model")


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(not isinstance(value, torch.Tensor) or torch.equal(value, other[name]) for name, value in one.items())


def with_longest(unit: Unit, length: int) -> Unit:
    """`unit` with its first row once more, its end repeated until it has `length` tokens.

    Windows, and positions that are scaled by length, show only in long conversations, and the probes may be short.
    """
    row = unit.rows[0]
    size = len(row.input_ids)
    tail = max(1, size - int(row.is_answer.argmax()))
    index = np.concatenate([np.arange(size), size - tail + np.arange(max(0, length - size)) % tail])
    is_answer = row.is_answer[index]
    n = int(is_answer.sum())
    inputs = {name: value[:, torch.from_numpy(index)] for name, value in row.model_inputs.items()}
    longest = replace(
        row,
        input_ids=row.input_ids[index],
        is_answer=is_answer,
        turn=np.zeros(n, np.int32),
        chars=np.zeros((n, 2), np.int32),
        model_inputs=inputs,
    )
    return replace(unit, rows=[*unit.rows, longest])
