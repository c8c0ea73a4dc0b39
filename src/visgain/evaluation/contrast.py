"""Contrastive decoding: the next token's logits with the picture against those of a second branch that sees less.

The formulas, of logits `seen` (with the picture) and `other` (the second branch), or of their log-softmax where a tilde
stands; `t` counts generated tokens from 1. Tokens whose logit is more than -ln(beta) below the largest are left out.

- vcd       (1 + alpha) seen - alpha other, cut at beta                          Leng et al. 2023, arXiv 2311.16922
- pai       gamma (~seen - ~other) + ~other, cut at 0.1; gamma 1 is ~seen        Liu et al. 2024, arXiv 2407.21771
- m3id      ~seen + (1 - e^-lt) / e^-lt (~seen - ~other) where max p < alpha     Favero et al. 2024, arXiv 2403.14003
- guidance  other + scale (seen - other)                                         as in LACING, arXiv 2411.12591
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessor

from visgain.errors import ModelError
from visgain.evaluation.generate import left_batch
from visgain.types import Encoded
from visgain.vlm.load import VLM
from visgain.vlm.pack import row_positions

Logits = Float[Tensor, "B V"]
PAI_CUT = 0.1


def vcd(seen: Logits, other: Logits, alpha: float, beta: float) -> Logits:
    return cut((1 + alpha) * seen - alpha * other, seen, beta)


def pai(seen: Logits, other: Logits, gamma: float) -> Logits:
    seen, other = seen.log_softmax(-1), other.log_softmax(-1)
    return seen if gamma == 1 else cut(gamma * (seen - other) + other, seen, PAI_CUT)


def m3id(seen: Logits, other: Logits, alpha: float, forgetting: float, t: int) -> Logits:
    seen, other = seen.log_softmax(-1), other.log_softmax(-1)
    weight = math.expm1(forgetting * t)  # (1 - e^-lt) / e^-lt
    unsure = seen.amax(-1, keepdim=True) < math.log(alpha)
    return torch.where(unsure, seen + weight * (seen - other), seen)


def guidance(seen: Logits, other: Logits, scale: float) -> Logits:
    return other + scale * (seen - other)


def cut(values: Logits, seen: Logits, beta: float) -> Logits:
    """-inf where `seen` is more than -ln(beta) below its largest."""
    return values.masked_fill(seen < seen.amax(-1, keepdim=True) + math.log(beta), float("-inf"))


Combine = Callable[[Logits, Logits, int], Logits]
"""(seen, other, t) -> the logits to choose by."""


class SecondBranch:
    """The same model on another prompt for each row, with a cache of its own, fed the tokens that were chosen.

    `aside`: a context in which the branch runs, e.g. without the attention hooks of the first. Raises ModelError for a
    model that sees by cross-attention, whose masks over pictures would have to grow with every token, and for one that
    keeps its cache to itself.
    """

    def __init__(
        self,
        vlm: VLM,
        prompts: Sequence[Encoded],
        soft: Float[Tensor, "N D"] | None = None,
        aside: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if any("cross_attention_mask" in prompt.model_inputs for prompt in prompts):
            raise ModelError(f"{vlm.name} sees by cross-attention, where a second branch is not supported")
        self._vlm, self._aside = vlm, aside
        self._inputs = left_batch(vlm, prompts)
        self._mask: Tensor = self._inputs["attention_mask"]
        self._position = left_positions(vlm, prompts).to(vlm.device)
        self._cache: Any = None
        if soft is not None:
            self._inputs = _softened(vlm, self._inputs, soft)

    def __call__(self, token: Int64[Tensor, " B"] | None) -> Logits:
        """Logits after the prompts (None), or after one more token in each row."""
        if token is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(token), 1)], dim=1)
            self._position = self._position[..., -1:] + 1
            self._inputs = {"input_ids": token[:, None], "attention_mask": self._mask}
        with self._aside(), _own_positions(self._vlm):
            output = self._vlm.model(
                **self._inputs, position_ids=self._position, past_key_values=self._cache, use_cache=True
            )
        self._cache = getattr(output, "past_key_values", None)
        if self._cache is None:
            raise ModelError(f"{self._vlm.name} does not hand out its cache, which a second branch needs")
        logits: Tensor = output.logits[:, -1].float()
        return logits


def left_positions(vlm: VLM, prompts: Sequence[Encoded]) -> Int64[Tensor, "*axes B T"]:
    """Position ids of prompts that are padded on the left, each row's as if it were alone."""
    alone = [row_positions(vlm.model, prompt) for prompt in prompts]
    length = max(one.shape[-1] for one in alone)
    return torch.cat([pad(one, (length - one.shape[-1], 0)) for one in alone], dim=-2)


def _softened(vlm: VLM, inputs: dict[str, Any], soft: Float[Tensor, "N D"]) -> dict[str, Any]:
    """Without pictures: `soft` (one row, or one for each of a picture's tokens) stands where image tokens are."""
    ids = inputs["input_ids"]
    embeds = vlm.model.get_input_embeddings()(ids)
    where = ids == vlm.image_token_id
    n = int(where.sum())
    if n % len(soft) or soft.shape[-1] != embeds.shape[-1]:
        raise ModelError(
            f"the soft image has {len(soft)} rows of {soft.shape[-1]} numbers; the prompts have {n} image tokens of "
            f"{embeds.shape[-1]}"
        )
    embeds[where] = soft.to(embeds).repeat(n // len(soft), 1)
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}


@contextmanager
def _own_positions(vlm: VLM) -> Iterator[None]:
    """Keep what the first branch's forward left in the model about its positions (M-RoPE's offset)."""
    body = vlm.model.base_model
    kept = getattr(body, "rope_deltas", None)
    try:
        yield
    finally:
        if hasattr(body, "rope_deltas"):
            body.rope_deltas = kept


class Contrast(LogitsProcessor):  # type: ignore[misc]
    """Combines the logits of `generate` with those of a second branch, which is fed the same tokens."""

    def __init__(self, branch: SecondBranch, combine: Combine) -> None:
        self._branch, self._combine = branch, combine
        self._t = 0

    def __call__(self, input_ids: Int64[Tensor, "B T"], scores: Logits) -> Logits:
        other = self._branch(None if self._t == 0 else input_ids[:, -1])
        self._t += 1
        return self._combine(scores.float(), other, self._t)
