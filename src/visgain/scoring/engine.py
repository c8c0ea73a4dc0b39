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
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from visgain.errors import ModelError
from visgain.scoring.forward import answer_nll
from visgain.scoring.unit import Rows, Unit, equal
from visgain.types import Encoded
from visgain.vlm.batch import is_hidden
from visgain.vlm.encode import PER_TOKEN_INPUTS
from visgain.vlm.forward import pack_nll
from visgain.vlm.load import VLM
from visgain.vlm.logits import answer_logits, token_nll
from visgain.vlm.pack import Branch, branches, pack, placed, row_positions
from visgain.vlm.precision import can_widen, widened

NLL = Float32[np.ndarray, " A"]
PerCondition = tuple[NLL, ...]
"""NLLs of one conversation: seen, blind, and if a unit asks for it blind to its first picture alone, its second ..."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}
"""Largest difference in nats to the plain forward at which a way counts as exact. In 16 bits the plain forward is
itself off by about as much; a wrong mask or position is off by more."""


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
        "attention_mask": torch.from_numpy(~is_hidden(row, vlm.image_token_id)[None, :stop]).long(),
        "position_ids": row_positions(vlm.model, row)[..., start:stop],
    }
    for name, value in row.model_inputs.items():
        if name in PER_TOKEN_INPUTS:
            inputs[name] = value[:, start:stop]
        elif start == 0:
            inputs[name] = value
    return {name: placed(value, vlm.model) for name, value in inputs.items()}


# ---------------------------------------------------------------- the engine


class Extent(NamedTuple):
    """How far conversations go: tokens of the longest, and of the longest that shares some; most pictures."""

    tokens: int = 0
    shared: int = 0
    pictures: int = 0


def extent(units: Sequence[Unit], image_token_id: int) -> Extent:
    """The furthest of `units` in each respect."""
    sharing = [unit for unit in units if branches(unit.rows, image_token_id)[0].n_shared]
    return Extent(
        tokens=max(len(row.input_ids) for unit in units for row in unit.rows),
        shared=max((len(row.input_ids) for unit in sharing for row in unit.rows), default=0),
        pictures=max(_n_pictures(row.input_ids == image_token_id) for unit in units for row in unit.rows),
    )


def _n_pictures(is_image: np.ndarray) -> int:
    """Runs of image tokens, of which a picture may have several."""
    return int(np.count_nonzero(np.diff(is_image.astype(np.int8), prepend=0) == 1))


@dataclass(kw_only=True)
class Engine:
    """A model and the way in which it computes. `pack_tokens` shrinks where the memory turns out to be too small.

    `tried`: how far the way was compared with the plain forward. It is trusted so far; what goes further is compared
    when it comes.
    """

    vlm: VLM
    way: str
    pack_tokens: int
    tried: Extent = field(default_factory=Extent)

    def score(self, units: Sequence[Unit]) -> list[PerCondition]:
        """NLLs in nats of the answer tokens of each row in each condition, unit after unit. The units are of one kind.

        All conditions run in the same shapes, so that what is subtracted was rounded alike. Raises ModelError if a
        single conversation is too large for the device's memory.
        """
        try:
            return self._nlls(self.way, units) if self._is_trusted(units) else self._compared(units)
        except torch.OutOfMemoryError as error:
            smaller = halves(units)
            if smaller is None:
                size = len(units[0].rows[0].input_ids)
                raise ModelError(
                    f"out of memory on {self.vlm.device} with one conversation of {size} tokens"
                ) from error
        torch.cuda.empty_cache()
        self.pack_tokens = max(1, self.pack_tokens // 2)
        return [nlls for half in smaller for nlls in self.score(half)]

    def _is_trusted(self, units: Sequence[Unit]) -> bool:
        further = extent(units, self.vlm.image_token_id)
        return self.way == "single" or all(new <= tried for new, tried in zip(further, self.tried, strict=True))

    def _compared(self, units: Sequence[Unit]) -> list[PerCondition]:
        """In the engine's way if that agrees with the plain forward, else in that."""
        plain = self._nlls("single", units)
        if _disagreement(self.vlm, self.way, units, _joined(plain), TOLERANCE[self.vlm.model.dtype]) is not None:
            return plain
        self.tried = Extent(*map(max, extent(units, self.vlm.image_token_id), self.tried))
        return self._nlls(self.way, units)

    def _nlls(self, way: str, units: Sequence[Unit]) -> list[PerCondition]:
        conditions = zip(*(unit.conditions() for unit in units), strict=True)
        nlls = [WAYS[way](self.vlm, groups) for groups in conditions]
        return list(zip(*nlls, strict=True))

    def n_tokens(self, unit: Unit) -> int:
        """Tokens that `unit` takes in one condition."""
        if self.way in ("shared", "mutual", "cached"):
            return sum(branch.n_tokens for branch in branches(unit.rows, self.vlm.image_token_id))
        return sum(len(row.input_ids) for row in unit.rows)


def halves(units: Sequence[Unit]) -> tuple[list[Unit], list[Unit]] | None:
    """`units` in two, in order: by units, else by the rows of the only one; None if there is but one row."""
    if len(units) > 1:
        return list(units[: len(units) // 2]), list(units[len(units) // 2 :])
    half = len(units[0].rows) // 2
    return ([units[0].some(slice(half))], [units[0].some(slice(half, None))]) if half else None


def scored(engine: Engine, units: Iterable[Unit]) -> Iterator[tuple[Unit, list[PerCondition]]]:
    """Each of `units` with the NLLs of its rows, as packs of at most `engine.pack_tokens` fill up.

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


def _by_unit(engine: Engine, units: Sequence[Unit]) -> Iterator[tuple[Unit, list[PerCondition]]]:
    nlls = iter(engine.score(units))
    for unit in units:
        yield unit, list(itertools.islice(nlls, len(unit.rows)))


# ---------------------------------------------------------------- the choice


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The way that was chosen, and why the ones before it were not.

    `tried`: the extent of the probes. `finite`: whether all their NLLs are.
    """

    way: str
    rejected: Mapping[str, str]
    tried: Extent
    finite: bool


def choose_way(vlm: VLM, probes: Sequence[Unit], ways: Iterable[str] = WAYS) -> Choice:
    """The first of `ways` that scores `probes` as the model's plain forward does.

    Raises ModelError if no way agrees, or if the pictures do not reach the model.
    """
    _check_blind(vlm, probes[-1])
    probes = [*probes, _otherwise(probes[-1])]  # two units at least whose pictures can be mixed up in a pack
    reference = _all_nll(vlm, "single", probes)
    _check_canary(vlm, probes, reference)
    rejected: dict[str, str] = {}
    for way in ways:
        reason = _disagreement(vlm, way, probes, reference, TOLERANCE[vlm.model.dtype])
        if reason is None:
            reason = _disagreement_in_float32(vlm, way, probes)
        if reason is None:
            tried, finite = extent(probes, vlm.image_token_id), bool(np.isfinite(reference).all())
            return Choice(way=way, rejected=rejected, tried=tried, finite=finite)
        rejected[way] = reason
    reasons = "; ".join(f"{way}: {reason}" for way, reason in rejected.items())
    raise ModelError(f"no way of scoring agrees with the model's own forward ({reasons})")


def _all_nll(vlm: VLM, way: str, units: Sequence[Unit]) -> Float32[np.ndarray, "2 A"]:
    """NLLs of all answer tokens of `units` in their order, seen and blind, from packs as large as can be."""
    units = [replace(unit, blind_to=()) for unit in units]  # where one picture is blind, nothing else is different
    n_tokens = sum(len(row.input_ids) for unit in units for row in unit.rows)
    engine = Engine(vlm=vlm, way=way, pack_tokens=n_tokens, tried=extent(units, vlm.image_token_id))
    found = {id(unit): nlls for unit, nlls in scored(engine, units)}
    return _joined([nlls for unit in units for nlls in found[id(unit)]])


def _joined(nlls: Sequence[tuple[np.ndarray, ...]]) -> Float32[np.ndarray, "2 A"]:
    """Seen and blind."""
    return np.concatenate([np.stack(one[:2]) for one in nlls], axis=1)


def _disagreement(
    vlm: VLM, way: str, probes: Sequence[Unit], reference: Float32[np.ndarray, "2 A"], tolerance: float
) -> str | None:
    """Why `way` cannot be used, or None."""
    try:
        found = _all_nll(vlm, way, probes)
    except Exception as error:  # a model that does not take packs may fail anywhere, in any manner
        return (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__
    worst = _off_by(found, reference)
    return None if worst <= tolerance else f"off by {worst:.2g} nats"


def _disagreement_in_float32(vlm: VLM, way: str, probes: Sequence[Unit]) -> str | None:
    """The same for a model of 16 bits, in whose rounding a small mistake can hide; None also where nothing can be said.

    The model's own kernels may round to fewer bits than float32 has, so not all of its precision is asked for.
    """
    if way == "single" or not can_widen(vlm.model):
        return None
    with widened(vlm.model):
        try:
            reference = _all_nll(vlm, "single", probes)
        except Exception:  # a model that is made for 16 bits
            return None
        return _disagreement(vlm, way, probes, reference, tolerance=0.01)


def _off_by(found: Float32[np.ndarray, "*n"], reference: Float32[np.ndarray, "*n"]) -> float:
    """The largest difference; where the reference is not finite, the guard against that has its say later."""
    finite = np.isfinite(reference)
    return float(np.abs(found[finite] - reference[finite]).max(initial=0.0))


def _otherwise(unit: Unit) -> Unit:
    """The same conversations about other pictures: the blind ones, or, where there are none, the seen ones dimmed."""
    if not unit.blind_rows:
        return replace(unit, seen=unit.blind, blind=unit.seen)
    dimmed = {
        name: value / 2 if isinstance(value, Tensor) and value.is_floating_point() and "mask" not in name else value
        for name, value in unit.seen.items()
    }
    return replace(unit, seen=dimmed, blind=dimmed if unit.blind else {})


def _check_blind(vlm: VLM, unit: Unit) -> None:
    """Raises ModelError if the model cannot leave pictures out, or if masking its image tokens does not hide them."""
    if not unit.blind_rows:
        return
    how, mend = "hide" if unit.blind else "do without", "use another --counterfactual"
    try:
        blind, other = (_blind_nll(vlm, each) for each in (unit, _otherwise(unit)))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model that must have pictures, or takes no positions, may fail in any manner
        reason = (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__
        raise ModelError(f"{vlm.name} cannot {how} its pictures ({reason}); {mend}") from error
    # What directly follows a picture is predicted from its last token, which still holds a patch of it, as in CAL.
    after = np.concatenate([_follows_picture(row, vlm.image_token_id) for row in unit.blind_rows])
    if _off_by(other[~after], blind[~after]) > TOLERANCE[vlm.model.dtype]:
        raise ModelError(
            f"{vlm.name} sees its pictures in other ways than by attention to their tokens, so masking these does not "
            f"hide them; {mend}, e.g. drop"
        )


def _blind_nll(vlm: VLM, unit: Unit) -> NLL:
    _, rows, *_ = unit.conditions()
    return np.concatenate(single(vlm, [rows]))


def _follows_picture(row: Encoded, image_token_id: int) -> Bool[np.ndarray, " A"]:
    """Which answer tokens come directly after an image token."""
    before = np.append(False, row.input_ids[:-1] == image_token_id)
    return np.asarray(before[row.is_answer])


def _check_canary(vlm: VLM, probes: Sequence[Unit], reference: Float32[np.ndarray, "2 A"]) -> None:
    """Raises ModelError if the counterfactual, or another picture in the first one's place, changes no score."""
    blurred = any(unit.blind_rows or not equal(unit.seen, unit.blind) for unit in probes)
    if blurred and np.array_equal(*reference):
        raise ModelError(
            f"{vlm.name} answers the same with the picture and with the counterfactual: pictures do not reach the model"
        )
    swapped = [
        replace(unit, blind=other.seen, blind_rows=())
        for unit, other in itertools.pairwise(probes)
        if unit.kind == other.kind
        and unit.rows[0].n_image_tokens == other.rows[0].n_image_tokens
        and not equal(unit.seen, other.seen)
    ]
    if swapped and np.array_equal(*_all_nll(vlm, "single", swapped)):
        raise ModelError(f"{vlm.name} answers the same about another picture: the pictures do not reach the model")


def with_longest(unit: Unit, length: int) -> Unit:
    """`unit` with its first row once more, its answer tokens repeated at the end until it has `length` tokens.

    Windows, and positions that are scaled by length, show only in long conversations, and the probes may be short.
    """
    more = max(0, length - len(unit.rows[0].input_ids))
    return replace(
        unit,
        rows=[*unit.rows, _lengthened(unit.rows[0], more)],
        blind_rows=[*unit.blind_rows, *(_lengthened(row, more) for row in unit.blind_rows[:1])],
    )


def _lengthened(row: Encoded, more: int) -> Encoded:
    """`row` and `more` of its answer tokens."""
    # Of the answers alone: there may be a picture between them, which must not stand there twice.
    index = np.concatenate([np.arange(len(row.input_ids)), np.resize(row.is_answer.nonzero()[0], more)])
    is_answer = row.is_answer[index]
    n = int(is_answer.sum())
    inputs = {name: value[:, torch.from_numpy(index)] for name, value in row.model_inputs.items()}
    return replace(
        row,
        input_ids=row.input_ids[index],
        is_answer=is_answer,
        turn=np.zeros(n, np.int32),
        chars=np.zeros((n, 2), np.int32),
        model_inputs=inputs,
    )
