"""Attention over a pack: several conversations in one sequence, each seeing only its own past.

A pack is a tree of segments (visgain.vlm.pack). A token attends to the segments on the way from its own up to the root,
and to what stands before it in its own. That is what causal attention computes for each conversation alone, so the
result is exact wherever a model's attention is causal, with or without a sliding window.

The function is registered with transformers' attention interface and called by every decoder layer. It cuts the pack
into its segments and hands each to transformers' own scaled-dot-product attention, so that no work is done for pairs
of tokens that do not see each other, and grouped heads and scaling are the library's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PACKED = "visgain_packed"
"""Name of the attention under which packs run."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens [start, stop) of a pack; they follow those of segment `parent`, or begin a conversation (None)."""

    start: int
    stop: int
    parent: int | None


@dataclass(kw_only=True)
class Layout:
    """The shape of one pack, and the masks that follow from it (made when first asked for, then shared by all layers).

    `wanted`: positions [N], ascending, whose final hidden states are used; the last layer computes no others.
    `block`: for each token the number of the picture it belongs to, 0 for text. Where `mutual` is set, the tokens of a
    picture also see each other's future, as in Gemma 3. `hidden`: tokens that no token sees; a token that would see
    nothing at all sees itself.
    """

    segments: Sequence[Segment]
    wanted: Int64[Tensor, " N"]
    block: Int64[Tensor, " T"]
    mutual: bool = False
    hidden: Bool[Tensor, " T"] | None = None
    last_attention: nn.Module | None = None
    _masks: dict[Any, Tensor | None] = field(default_factory=dict)
    _rows: dict[int, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.segments[-1].stop

    def way(self, number: int) -> list[slice]:
        """The stretches of the pack that segment `number` can see, in the order of the conversation, its own last."""
        segment = self.segments[number]
        above = [] if segment.parent is None else self.way(segment.parent)
        return [*above, slice(segment.start, segment.stop)]

    def rows(self, number: int) -> Int64[Tensor, " R"]:
        """Those of segment `number`'s tokens that are wanted, counted from its start."""
        if number not in self._rows:
            segment = self.segments[number]
            inside = self.wanted[(self.wanted >= segment.start) & (self.wanted < segment.stop)]
            self._rows[number] = inside - segment.start
        return self._rows[number]

    def is_cheaper_square(self, number: int, window: int | None) -> bool:
        """Whether to compute the short way above segment `number` once more rather than to mask.

        Kernels skip half of a causal square, and nothing of a rectangle with a mask.
        """
        segment, size = self.segments[number], _size(self.way(number))
        return self._is_causal(size, window) and size < 2 * (segment.stop - segment.start)

    def _is_causal(self, size: int, window: int | None) -> bool:
        return (window is None or window >= size) and not self.mutual and self.hidden is None

    def mask(self, number: int, window: int | None, *, trimmed: bool, like: Tensor) -> Float[Tensor, "Q K"] | None:
        """0 where segment `number`'s tokens (only the wanted ones if `trimmed`) see their chain, -inf elsewhere.

        None if that is the plain causal mask of a conversation's beginning.
        """
        key = (number, window, trimmed, like.dtype)
        if key not in self._masks:
            self._masks[key] = self._make_mask(number, window, trimmed=trimmed, like=like)
        return self._masks[key]

    def _make_mask(self, number: int, window: int | None, *, trimmed: bool, like: Tensor) -> Tensor | None:
        block = along(self.block, self.way(number), dim=0)
        size = self.segments[number].stop - self.segments[number].start
        own = torch.arange(len(block) - size, len(block), device=block.device)
        if not trimmed and size == len(block) and self._is_causal(size, window):
            return None
        own = own[self.rows(number)] if trimmed else own
        distance = own[:, None] - torch.arange(len(block), device=block.device)[None, :]
        seen = distance >= 0
        if self.mutual:
            seen |= (block[own][:, None] == block[None, :]) & (block[own][:, None] > 0)
        if window is not None:
            seen &= distance < window
        if self.hidden is not None:
            seen &= ~along(self.hidden, self.way(number), dim=0)
            seen |= (distance == 0) & ~seen.any(dim=1, keepdim=True)
        return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))


def along(values: Tensor, way: Sequence[slice], dim: int) -> Tensor:
    """The stretches `way` of dimension `dim`, side by side; a view where there is only one."""
    parts = [values.narrow(dim, piece.start, piece.stop - piece.start) for piece in way]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _size(way: Sequence[slice]) -> int:
    return sum(piece.stop - piece.start for piece in way)


_active: Layout | None = None
"""The pack that runs now. The attention interface passes nothing of ours through every model's forward."""


@contextmanager
def attending(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let `model`'s language part, and no other part, attend by the function registered as `name`."""
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    config._attn_implementation = {"": name}  # the text would be handed on to a vision part's configuration inside
    try:
        yield
    finally:
        config._attn_implementation = {"": before}


@contextmanager
def packed(model: PreTrainedModel, layout: Layout) -> Iterator[None]:
    """Run `model`'s language part on the pack that `layout` describes. Not reentrant, and for one thread."""
    global _active
    _active = layout
    try:
        with attending(model, PACKED):
            yield
    finally:
        _active = None


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B G T D"],
    value: Float[Tensor, "B G T E"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "B T H E"], None]:
    """Attention of one layer over the active pack, in transformers' calling convention.

    Raises NotImplementedError for what it cannot express; whoever tries packs falls back to another way.
    """
    layout = _active
    if layout is None or {query.shape[2], key.shape[2]} != {layout.length} or query.shape[0] != 1:
        # Not the pack but a picture, or not of the pack alone; what this cannot be, the self-check will find.
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return plain
    for name in ("softcap", "s_aux", "position_bias", "cache"):
        if options.get(name) is not None:
            raise NotImplementedError(f"attention with {name} in a pack")
    trimmed = module is layout.last_attention
    parts = []
    for number, segment in enumerate(layout.segments):
        rows = layout.rows(number) if trimmed else None
        if rows is not None and len(rows) == 0:
            continue
        way, own = layout.way(number), slice(segment.start, segment.stop)
        square = rows is None and layout.is_cheaper_square(number, sliding_window)
        queries = along(query, way if square else [own], dim=2)
        queries = queries if rows is None else queries[:, :, rows]
        mask = None if square else layout.mask(number, sliding_window, trimmed=trimmed, like=query)
        attended, _ = sdpa_attention_forward(
            module,
            queries,
            along(key, way, dim=2),
            along(value, way, dim=2),
            None if mask is None else mask[None, None],
            dropout=options.get("dropout", 0.0),
            scaling=scaling,
            is_causal=True,
        )
        parts.append(attended if rows is not None else attended[:, own.start - own.stop :])
    # Put together once, not written segment by segment: in training each such write would copy the whole gradient.
    if not trimmed:
        return torch.cat(parts, dim=1), None
    shape = (1, query.shape[2], query.shape[1], value.shape[-1])
    if not parts:
        return query.new_zeros(shape), None
    wanted = torch.cat(parts, dim=1)
    result = wanted.new_zeros(shape)  # of what attention gave: autocast gives 16 bits for queries of 32
    result[:, layout.wanted] = wanted
    return result, None


AttentionInterface.register(PACKED, packed_attention)
