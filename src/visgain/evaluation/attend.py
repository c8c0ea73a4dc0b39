"""Attention to the picture made stronger while a model answers, through transformers' attention interface.

- `Boost` (PAI, Liu et al. 2024): before the softmax, the last query's score s over image tokens becomes s + alpha |s|.
- `Redistribute` (VAR, Kang et al. 2025, arXiv 2503.03321): after the softmax, in heads that look at the picture, a part
  of the attention that goes to sink tokens is given to the image tokens that are not.

Rows that are edited are computed plainly; all others by scaled-dot-product attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from visgain.errors import ModelError
from visgain.vlm.attention import attending

EDITED = "visgain_edited"
"""Name of the attention under which edits run."""


@runtime_checkable
class Edit(Protocol):
    """What is done to attention."""

    @property
    def is_image(self) -> Bool[Tensor, "B T"]:
        """Which tokens of the prompts, padded on the left, are of a picture."""
        ...

    def first_row(self, layer: int, n_layers: int, n_queries: int) -> int:
        """The first of the last `n_queries` tokens whose attention is edited in this layer; n_queries for none."""
        ...

    def weights(
        self, scores: Float[Tensor, "B H Q K"], is_image: Bool[Tensor, "B K"], layer: int
    ) -> Float[Tensor, "B H Q K"]:
        """Attention weights from masked scores."""
        ...


@dataclass(frozen=True, kw_only=True)
class Boost:
    """In layers [first, stop), for the token that predicts the next one."""

    is_image: Bool[Tensor, "B T"]
    alpha: float
    first: int
    stop: int

    def first_row(self, layer: int, n_layers: int, n_queries: int) -> int:
        return n_queries - 1 if self.first <= layer < self.stop else n_queries

    def weights(
        self, scores: Float[Tensor, "B H Q K"], is_image: Bool[Tensor, "B K"], layer: int
    ) -> Float[Tensor, "B H Q K"]:
        return boosted(scores, is_image, self.alpha).softmax(-1)


def boosted(scores: Float[Tensor, "B H Q K"], is_image: Bool[Tensor, "B K"], alpha: float) -> Float[Tensor, "B H Q K"]:
    return torch.where(is_image[:, None, None], scores + alpha * scores.abs(), scores)


@dataclass(frozen=True, kw_only=True)
class Redistribute:
    """For tokens after the picture, in all layers from `first` on but the last.

    A token is a sink in a layer if its state there, divided by its root mean square, exceeds `tau` in one of `dims`. A
    head looks at the picture where it gives it at least `least` of its attention, at most `rho` of that to sinks; there
    all sinks keep the share `p`.
    """

    is_image: Bool[Tensor, "B T"]
    dims: Sequence[int]
    p: float
    rho: float
    least: float
    tau: float
    first: int
    sinks: dict[int, Bool[Tensor, "B K"]] = field(default_factory=dict)  # layer -> of all tokens so far

    def first_row(self, layer: int, n_layers: int, n_queries: int) -> int:
        if not self.first <= layer < n_layers - 1:
            return n_queries
        is_prompt = n_queries == self.is_image.shape[1]
        return int(last_of(self.is_image).min()) + 1 if is_prompt else 0

    def weights(
        self, scores: Float[Tensor, "B H Q K"], is_image: Bool[Tensor, "B K"], layer: int
    ) -> Float[Tensor, "B H Q K"]:
        weights = scores.softmax(-1)
        moved = redistributed(weights, is_image, self.sinks[layer], p=self.p, rho=self.rho, least=self.least)
        n_queries, n_keys = scores.shape[2:]
        query = torch.arange(n_keys - n_queries, n_keys, device=scores.device)
        comes_after = query[None] > last_of(self.is_image)[:, None]
        return torch.where(comes_after[:, None, :, None], moved, weights)

    def see(self, layer: int, states: Float[Tensor, "B T D"]) -> None:
        """Note which tokens are sinks; `states` go into the layer."""
        normal = states.float() * states.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        new = normal[..., list(self.dims)].abs().amax(-1) > self.tau
        self.sinks[layer] = torch.cat([self.sinks[layer], new], dim=1) if layer in self.sinks else new


def last_of(is_image: Bool[Tensor, "B T"]) -> Int64[Tensor, " B"]:
    """Position of each row's last image token; -1 where there is none."""
    numbers = torch.arange(1, is_image.shape[1] + 1, device=is_image.device)
    return (is_image * numbers).amax(-1) - 1


def redistributed(
    weights: Float[Tensor, "B H Q K"],
    is_image: Bool[Tensor, "B K"],
    is_sink: Bool[Tensor, "B K"],
    *,
    p: float,
    rho: float,
    least: float,
) -> Float[Tensor, "B H Q K"]:
    """Rows still sum to 1. Heads and queries that do not look at the picture are as they were."""
    image, sink = is_image[:, None, None], is_sink[:, None, None]
    to_image = (weights * image).sum(-1, keepdim=True)
    to_visual_sinks = (weights * (image & sink)).sum(-1, keepdim=True)
    receives = weights * (image & ~sink)
    received = receives.sum(-1, keepdim=True)
    looks = (to_image >= least) & (to_visual_sinks <= rho * to_image) & (received > 0)
    freed = (1 - p) * (weights * sink).sum(-1, keepdim=True)
    moved = torch.where(sink, p * weights, weights) + freed * receives / received.clamp_min(1e-30)
    return torch.where(looks, moved, weights)


# ---------------------------------------------------------------- running under an edit

_active: Edit | None = None
_n_layers = 0


@contextmanager
def edited(model: PreTrainedModel, edit: Edit) -> Iterator[None]:
    """Run `model`'s language part under `edit`, from the prompts on. Not reentrant, and for one thread.

    Raises ModelError if the language part's layers are not where most models have them.
    """
    global _active, _n_layers
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(f"{type(model).__name__} has no list of decoder layers, so its attention cannot be edited")
    hooks = [_watched(layer, number, edit) for number, layer in enumerate(layers)] if hasattr(edit, "see") else []
    _active, _n_layers = edit, len(layers)
    try:
        with attending(model, EDITED):
            yield
    finally:
        _active = None
        for hook in hooks:
            hook.remove()


@contextmanager
def unedited() -> Iterator[None]:
    """Within `edited`, run something else without the edit."""
    global _active
    kept, _active = _active, None
    try:
        yield
    finally:
        _active = kept


def _watched(layer: nn.Module, number: int, edit: Any) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _active is not None:
            edit.see(number, args[0] if args else kwargs["hidden_states"])

    return layer.register_forward_pre_hook(note, with_kwargs=True)


def edited_attention(
    module: nn.Module,
    query: Float[Tensor, "B H Q D"],
    key: Float[Tensor, "B G K D"],
    value: Float[Tensor, "B G K E"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "B Q H E"], None]:
    """Attention of one layer in transformers' calling convention, edited where the active edit says so."""
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ModelError(f"the attention of {type(module).__name__} has parts that cannot be edited")
    attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    layer = getattr(module, "layer_idx", None)
    if _active is None or layer is None:
        return attended, None
    n_queries, n_keys = query.shape[2], key.shape[2]
    first = _active.first_row(layer, _n_layers, n_queries)
    if first >= n_queries:
        return attended, None
    known = _active.is_image.shape[1]
    if n_keys < known:
        raise ModelError("a window shorter than the prompt hides the picture, so attention to it cannot be edited")
    is_image = pad(_active.is_image, (0, n_keys - known))
    repeats = query.shape[1] // key.shape[1]
    keys, values = (one.repeat_interleave(repeats, dim=1) for one in (key, value))
    scores = (query[:, :, first:] @ keys.transpose(2, 3)).float() * (scaling or query.shape[-1] ** -0.5)
    if attention_mask is not None:
        scores = scores + attention_mask[:, :, first:n_queries, :n_keys].float()
    weights = _active.weights(scores, is_image, layer).to(values.dtype)
    attended[:, first:] = (weights @ values).transpose(1, 2)
    return attended, None


AttentionInterface.register(EDITED, edited_attention)
AttentionMaskInterface.register(EDITED, eager_mask)
