"""Several conversations, and several about one picture, in one sequence without padding.

    head: text before the picture, the same in all     [system prompt]
      branch: one picture in one condition             [picture, text that its conversations begin with]
        leaf: one conversation                         [question, answer, ...]
        leaf: ...
      branch: ...

A branch with one conversation is one segment. Positions go on along the way from head to leaf, so every conversation
has the positions and sees the tokens that it has alone (visgain.vlm.attention); the pictures of a pack are computed
once each by the model's own vision part.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from visgain.types import Encoded
from visgain.vlm.attention import Layout, Segment
from visgain.vlm.batch import concatenated, is_hidden
from visgain.vlm.encode import PER_TOKEN_INPUTS


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Conversations about the same pictures in the same condition. Their `model_inputs` are `rows[0]`'s."""

    rows: Sequence[Encoded]
    n_shared: int  # tokens that all rows begin with, pictures included; 0 if there is but one row

    @property
    def n_tokens(self) -> int:
        return sum(len(row.input_ids) for row in self.rows) - self.n_shared * (len(self.rows) - 1)


@dataclass(frozen=True, kw_only=True)
class Pack:
    """`inputs` go to the model's body, `targets` [N] are predicted at positions `layout.wanted` [N].

    `counts`: how many of these each conversation has, branch by branch.
    """

    inputs: Mapping[str, Any]
    layout: Layout
    targets: Int64[Tensor, " N"]
    counts: Sequence[int]


def shared_prefix(rows: Sequence[Encoded], image_token_id: int) -> int:
    """How many tokens to compute once for all `rows`, which have the same pictures; 0 if nothing can be shared.

    It holds all pictures, and ends where each row still has a token of its own to predict its first answer token from.
    """
    size = _common(rows, min(int(_predicts(row).argmax()) for row in rows))
    return 0 if any((row.input_ids[size:] == image_token_id).any() for row in rows) else size


def branches(rows: Sequence[Encoded], image_token_id: int) -> list[Branch]:
    """`rows`, which have the same pictures, as one branch where they can share a prefix, else as one each."""
    size = shared_prefix(rows, image_token_id) if len(rows) > 1 else 0
    if size:
        return [Branch(rows=rows, n_shared=size)]
    return [Branch(rows=[row], n_shared=0) for row in rows]


def pack(model: PreTrainedModel, packed: Sequence[Branch], image_token_id: int, *, mutual: bool = False) -> Pack:
    """One sequence for all of `packed`, on the model's device. `mutual`: see Layout."""
    pieces = list(_pieces(packed, image_token_id))
    return _pack(model, pieces, [branch.rows for branch in packed], image_token_id, mutual=mutual)


def pack_apart(model: PreTrainedModel, rows: Sequence[Encoded], image_token_id: int, *, mutual: bool = False) -> Pack:
    """The same with nothing shared: each of `rows` is a segment of its own, with pictures of its own."""
    pieces = [_Piece(row=row, span=slice(0, len(row.input_ids)), parent=None) for row in rows]
    return _pack(model, pieces, [[row] for row in rows], image_token_id, mutual=mutual)


def _pack(
    model: PreTrainedModel,
    pieces: Sequence[_Piece],
    branched: Sequence[Sequence[Encoded]],
    image_token_id: int,
    *,
    mutual: bool,
) -> Pack:
    """`branched`: the conversations, those that share pictures together."""
    ids = np.concatenate([piece.row.input_ids[piece.span] for piece in pieces])
    targets = np.flatnonzero(np.concatenate([piece.row.is_answer[piece.span] for piece in pieces]))
    stops = np.cumsum([piece.size for piece in pieces]).tolist()
    segments = [
        Segment(start=stop - piece.size, stop=stop, parent=piece.parent)
        for piece, stop in zip(pieces, stops, strict=True)
    ]
    layout = Layout(
        segments=segments,
        wanted=torch.from_numpy(targets - 1).to(model.device),
        block=torch.from_numpy(_blocks(ids == image_token_id, segments)).to(model.device),
        mutual=mutual,
        hidden=_hidden(pieces, image_token_id, model.device),
        last_attention=last_attention(model),
    )
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(ids)[None]} | _side_by_side(model, pieces)
    inputs |= concatenated([rows[0].model_inputs for rows in branched])
    return Pack(
        inputs={name: placed(value, model) for name, value in inputs.items()},
        layout=layout,
        targets=torch.from_numpy(ids[targets]).to(model.device),
        counts=[len(row.turn) for rows in branched for row in rows],
    )


def _hidden(pieces: Sequence[_Piece], image_token_id: int, device: torch.device) -> Bool[Tensor, " T"] | None:
    """The tokens of masked pictures; None where there are none, as masks cost time."""
    hidden = np.concatenate([is_hidden(piece.row, image_token_id)[piece.span] for piece in pieces])
    return torch.from_numpy(hidden).to(device) if hidden.any() else None


def _side_by_side(model: PreTrainedModel, pieces: Sequence[_Piece]) -> dict[str, Tensor]:
    """Positions and the inputs of a value a token. A row that has no such input, without pictures, has zeros."""
    known = [piece.inputs(model) for piece in pieces]
    shapes = {name: value for inputs in known for name, value in inputs.items()}
    result = {}
    for name, like in shapes.items():
        values = [
            inputs.get(name, like.new_zeros(1, piece.size, *like.shape[2:]))
            for inputs, piece in zip(known, pieces, strict=True)
        ]
        result[name] = torch.cat(values, dim=-1 if name == "position_ids" else 1)
    return result


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A segment to be: tokens `span` of `row`, after the segment `parent`."""

    row: Encoded
    span: slice
    parent: int | None

    @property
    def size(self) -> int:
        return int(self.span.stop - self.span.start)

    def inputs(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Positions and whatever else the model takes a value a token of."""
        named = {name: self.row.model_inputs[name] for name in PER_TOKEN_INPUTS if name in self.row.model_inputs}
        positions = row_positions(model, self.row)[..., self.span]
        return {name: value[:, self.span] for name, value in named.items()} | {"position_ids": positions}


def _pieces(packed: Sequence[Branch], image_token_id: int) -> Iterator[_Piece]:
    head = _head_size(packed, image_token_id)
    if head:
        yield _Piece(row=packed[0].rows[0], span=slice(0, head), parent=None)
    number, root = (1, 0) if head else (0, None)
    for branch in packed:
        first = branch.rows[0]
        yield _Piece(row=first, span=slice(head, branch.n_shared or len(first.input_ids)), parent=root)
        if branch.n_shared:
            for row in branch.rows:
                yield _Piece(row=row, span=slice(branch.n_shared, len(row.input_ids)), parent=number)
            number += len(branch.rows)
        number += 1


def _head_size(packed: Sequence[Branch], image_token_id: int) -> int:
    """Number of tokens before the first picture that all of `packed` begin with.

    Each keeps a token of its own to predict its first answer token from.
    """
    rows = [branch.rows[0] for branch in packed]
    if len(rows) < 2:
        return 0
    size = min(int((_predicts(row) | (row.input_ids == image_token_id)).argmax()) for row in rows)
    # Without pictures, conversations of one branch may part where other branches go on alike.
    return _common(rows, min([size, *(branch.n_shared - 1 for branch in packed if branch.n_shared)]))


def _predicts(row: Encoded) -> np.ndarray:
    """Whether the token after each is an answer token, bool [T]."""
    return np.append(row.is_answer[1:], False)


def _common(rows: Sequence[Encoded], limit: int) -> int:
    """How many of the first `limit` tokens are the same in all rows."""
    first, *others = (row.input_ids[:limit] for row in rows)
    sizes = [len(np.minimum.accumulate(first == other).nonzero()[0]) for other in others]
    return min([limit, *sizes])


def _blocks(is_image: np.ndarray, segments: Sequence[Segment]) -> np.ndarray:
    """int64 [T]: the number of the run of image tokens that each token is in, from 1; 0 for text."""
    begins = is_image & ~np.concatenate([[False], is_image[:-1]])
    starts = np.asarray([segment.start for segment in segments])
    begins[starts] = is_image[starts]
    return np.where(is_image, begins.cumsum(), 0)


def placed(value: Tensor, model: PreTrainedModel) -> Tensor:
    """An input of `model` on its device and, if it is a picture and not numbers of things, in its dtype."""
    return value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)


def row_positions(model: PreTrainedModel, row: Encoded) -> Int64[Tensor, "*axes 1 T"]:
    """The position ids that `model` gives to `row` alone: 0 to T - 1, or the model's own where it has several axes."""
    rope_index = getattr(model.base_model, "get_rope_index", None)
    ids = torch.from_numpy(row.input_ids)[None]
    if rope_index is None:
        return torch.arange(ids.shape[1])[None]
    known = dict(row.model_inputs) | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    taken = inspect.signature(rope_index).parameters
    positions, _ = rope_index(**{name: value for name, value in known.items() if name in taken})
    return torch.as_tensor(positions).cpu()


def last_attention(model: PreTrainedModel) -> nn.Module | None:
    """The attention module of the language part's last layer, if it is where most models have it."""
    layers = getattr(model.get_decoder(), "layers", None)
    return getattr(layers[-1], "self_attn", None) if isinstance(layers, nn.ModuleList) else None
