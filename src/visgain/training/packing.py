"""What goes through the model at once in training, and the ways to compute the NLL of its active tokens.

A step's rows are cut into passes. In a pack, whole conversations stand in one sequence without padding, each a segment
of its own that sees nothing of the others, at the positions that it has alone; in a padded batch, they are the rows.
Either way gives each active token the same NLL, so how a step is cut changes nothing but the time that it takes.

Which ways a model can take is tried, not looked up (`choose_way`), as in scoring:

- packed   conversations side by side, attention segment by segment; logits of active tokens alone, in chunks
- mutual   the same, where the tokens of a picture see each other's future, as in Gemma 3
- padded   rows of a batch; logits as before
- whole    rows of a batch through the model's own forward, for models whose body is not apart from their head
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor
from transformers import PreTrainedModel

from visgain.errors import ModelError
from visgain.training.collate import TrainingRow
from visgain.types import Encoded
from visgain.vlm.attention import Layout, packed
from visgain.vlm.batch import pad_batch, signature
from visgain.vlm.forward import only_wanted, states_nll
from visgain.vlm.logits import answer_logits, output_head, token_nll
from visgain.vlm.pack import pack_apart, placed

TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}
"""Largest difference in nats to the model's own forward at which a way counts as exact; what 16 bits lose is more."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Inputs of one forward pass, and the tokens in it that carry loss: at least one, if need be of weight 0.

    The hidden states at `place` [2, N] (row, position) predict `targets` [N] of `weight` [N]. `layout`: of a pack.
    """

    inputs: Mapping[str, Any]
    place: Int64[Tensor, "2 N"]
    targets: Int64[Tensor, " N"]
    weight: Float32[Tensor, " N"]
    layout: Layout | None = None

    def to(self, device: torch.device) -> Pass:
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        layout = self.layout
        if layout is not None:
            hidden = None if layout.hidden is None else layout.hidden.to(device)
            layout = replace(layout, wanted=layout.wanted.to(device), block=layout.block.to(device), hidden=hidden)
        place, targets, weight = (value.to(device) for value in (self.place, self.targets, self.weight))
        return Pass(inputs=inputs, place=place, targets=targets, weight=weight, layout=layout)


@contextmanager
def laid_out(model: PreTrainedModel, one: Pass) -> Iterator[None]:
    """Let `model` run on the pass, and on nothing else, until the backward pass is over.

    With gradient checkpointing the layers run a second time in the backward pass, where they must find the same.
    """
    if one.layout is None:
        yield
        return
    with packed(model, one.layout), only_wanted(model, one.layout):
        yield


# ---------------------------------------------------------------- rows -> pass


def pack_rows(
    model: PreTrainedModel, rows: Sequence[TrainingRow], image_token_id: int, *, mutual: bool = False
) -> Pass:
    """`rows` as one pack, none of them sharing anything with another."""
    chosen = _computed(rows)
    made = pack_apart(model, list(map(_answering, rows, chosen)), image_token_id, mutual=mutual)
    return Pass(
        inputs=made.inputs,
        place=torch.stack([torch.zeros_like(made.layout.wanted), made.layout.wanted]),
        targets=made.targets,
        weight=_weights(rows, chosen),
        layout=made.layout,
    )


def pad_rows(model: PreTrainedModel, rows: Sequence[TrainingRow], pad_id: int) -> Pass:
    """`rows` as a padded batch."""
    chosen = _computed(rows)
    batch = pad_batch(list(map(_answering, rows, chosen)), pad_id)
    row, position = batch.is_answer.nonzero(as_tuple=True)
    return Pass(
        inputs={name: placed(value, model) for name, value in batch.inputs.items()},
        place=torch.stack([row, position - 1]),
        targets=batch.inputs["input_ids"][row, position],
        weight=_weights(rows, chosen),
    )


def _computed(rows: Sequence[TrainingRow]) -> list[Bool[np.ndarray, " _"]]:
    """Which answer tokens of each row are computed: the active ones, or if there are none in all rows, a single one.

    So every part of the model has a gradient, if of zeros, as ranks that wait for each other expect. Nothing predicts
    the token at position 0.
    """
    chosen = [row.active & (row.encoded.is_answer.nonzero()[0] > 0) for row in rows]
    if not any(some.any() for some in chosen):
        chosen[0][-1] = True
    return chosen


def _answering(row: TrainingRow, chosen: Bool[np.ndarray, " A"]) -> Encoded:
    """The row with `chosen` as its only answer tokens."""
    encoded = row.encoded
    is_answer = encoded.is_answer.copy()
    is_answer[is_answer] = chosen
    return replace(encoded, is_answer=is_answer, turn=encoded.turn[chosen], chars=encoded.chars[chosen])


def _weights(rows: Sequence[TrainingRow], chosen: Sequence[np.ndarray]) -> Float32[Tensor, " N"]:
    return torch.from_numpy(np.concatenate([row.weight[some] for row, some in zip(rows, chosen, strict=True)]))


# ---------------------------------------------------------------- pass -> nll


def body_nll(
    model: PreTrainedModel, forward: Callable[..., Any], one: Pass, inputs: Mapping[str, Any]
) -> Float32[Tensor, " N"]:
    """NLL of the targets: the body of `model`, then the states that predict them through its head, in chunks.

    `forward`: the model's own.
    """
    if model.base_model is model:
        raise ModelError(f"the body of {type(model).__name__} is not apart from its head")
    output = model.base_model(**inputs, use_cache=False, return_dict=True)
    row, position = one.place
    output.last_hidden_state = output.last_hidden_state[row, position][None]
    return states_nll(model, output, one.targets, forward)


def whole_nll(
    model: PreTrainedModel, forward: Callable[..., Any], one: Pass, inputs: Mapping[str, Any]
) -> Float32[Tensor, " N"]:
    """The same by the model's own forward, with all logits of the targets at once."""
    row, position = one.place
    wanted = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    wanted[row, position + 1] = True
    return token_nll(answer_logits(forward, inputs, wanted, head=output_head(model)), one.targets)


# ---------------------------------------------------------------- the ways


@dataclass(frozen=True, kw_only=True)
class Way:
    """How rows become passes, and those NLLs. `nll(model, forward, pass, inputs)`."""

    name: str
    side_by_side: bool  # in one sequence, of so many tokens; else in a padded batch, of so many rows
    mutual: bool = False
    nll: Callable[..., Tensor] = body_nll

    def make(self, model: PreTrainedModel, rows: Sequence[TrainingRow], *, image_token_id: int, pad_id: int) -> Pass:
        if self.side_by_side:
            return pack_rows(model, rows, image_token_id, mutual=self.mutual)
        return pad_rows(model, rows, pad_id)


PACKED = Way(name="packed", side_by_side=True)
MUTUAL = Way(name="mutual", side_by_side=True, mutual=True)
PADDED = Way(name="padded", side_by_side=False)
WHOLE = Way(name="whole", side_by_side=False, nll=whole_nll)
WAYS = (PACKED, MUTUAL, PADDED, WHOLE)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The way that was chosen, and why the ones before it were not, by their names."""

    way: Way
    rejected: Mapping[str, str]


def choose_way(
    model: PreTrainedModel,
    probes: Sequence[TrainingRow],
    ways: Sequence[Way] = WAYS,
    *,
    image_token_id: int,
    pad_id: int,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Choice:
    """The first of `ways` that gives all answer tokens of `probes` the NLL that the model's own forward gives them.

    `precision`: what it is trained in. A model in float32 is compared in float32 all the same, where less is lost; that
    it also runs in `precision` is seen apart. Raises ModelError if no way agrees.
    """
    ids = {"image_token_id": image_token_id, "pad_id": pad_id}
    probes = [replace(row, weight=np.ones_like(row.weight)) for row in probes]
    training = model.training
    rejected: dict[str, str] = {}
    with ExitStack() as stack:
        stack.callback(model.train, training)
        if coarsest(model) != torch.float32:
            stack.enter_context(precision())
        reference = [_nll(model.eval(), WHOLE, [row], **ids) for row in probes]
        if not any(nll.isfinite().any() for nll in reference):
            raise ModelError(
                "the model's own forward gives no answer token that was tried a finite loss; are its weights damaged?"
            )
        for way in ways:
            reason = _disagreement(model, way, probes, reference, precision, **ids)
            if reason is None:
                return Choice(way=way, rejected=rejected)
            rejected[way.name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected.items())
    raise ModelError(f"no way of training agrees with the model's own forward ({reasons})")


def _disagreement(
    model: PreTrainedModel,
    way: Way,
    probes: Sequence[TrainingRow],
    reference: Sequence[Tensor],
    precision: Callable[[], AbstractContextManager[Any]],
    **ids: int,
) -> str | None:
    """Why `way` cannot be taken, or None."""
    worst = 0.0
    try:
        for numbers in cut(probes, side_by_side=way.side_by_side, most=1 << 30):
            rows = [probes[number] for number in numbers]
            expected = torch.cat([reference[number] for number in numbers])
            difference = (_nll(model.eval(), way, rows, **ids) - expected).abs().nan_to_num(nan=inf)
            worst = max([worst, *difference[expected.isfinite()].tolist()])
            with precision():  # what a model demands in training alone
                _nll(model.train(), way, rows, **ids)
    except Exception as error:  # a model that does not take packs may fail anywhere, in any manner
        return (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__
    return None if worst <= TOLERANCE[coarsest(model)] else f"off by {worst:.2g} nats"


@torch.no_grad()
def _nll(model: PreTrainedModel, way: Way, rows: Sequence[TrainingRow], **ids: int) -> Float32[Tensor, " N"]:
    one = way.make(model, rows, **ids).to(model.device)
    with laid_out(model, one):
        return way.nll(model, model.forward, one, one.inputs).float()


def coarsest(model: PreTrainedModel) -> torch.dtype:
    """The dtype of fewest bits among the weights."""
    dtype: torch.dtype = max({p.dtype for p in model.parameters()} & TOLERANCE.keys(), key=TOLERANCE.__getitem__)
    return dtype


# ---------------------------------------------------------------- rows of a step -> rows of each pass


def cut(rows: Sequence[TrainingRow], *, side_by_side: bool, most: int) -> list[list[int]]:
    """Numbers of `rows` in passes of at most `most` tokens if they go `side_by_side`, else of at most `most` rows.

    The longest first, each into the first pass that has room and takes its pictures, so little room is left and rows of
    a padded batch are of similar length. A conversation is never cut; one that is too long is a pass of its own.
    """
    kinds = _kinds(rows)
    sizes = [len(row.encoded.input_ids) if side_by_side else 1 for row in rows]
    passes: list[list[int]] = []
    room: list[int] = []
    taken: list[Any] = []
    for number in sorted(range(len(rows)), key=lambda number: -len(rows[number].encoded.input_ids)):
        size, kind = sizes[number], kinds[number]
        for k, members in enumerate(passes):
            if size <= room[k] and (kind == taken[k] or () in (kind, taken[k])):
                members.append(number)
                room[k] -= size
                taken[k] = taken[k] or kind
                break
        else:
            passes.append([number])
            room.append(most - size)
            taken.append(kind)
    return [sorted(members) for members in passes]


def go_together(rows: Sequence[TrainingRow]) -> bool:
    """Whether the pictures of `rows` can be inputs of one forward pass."""
    return len(set(_kinds(rows)) - {()}) <= 1


def _kinds(rows: Sequence[TrainingRow]) -> list[Any]:
    """What the pictures of each row are to the model; rows of different kinds go apart, and () goes with any.

    Rows without pictures do, unless the model sees by cross-attention: there a picture belongs to a row by its number.
    """
    crossed = any("cross_attention_mask" in row.encoded.model_inputs for row in rows)
    return [signature(row.encoded) or (("no picture",) if crossed else ()) for row in rows]
