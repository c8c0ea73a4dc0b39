"""The NLL of the answer tokens of a pack, with no work for states and logits that nobody asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from visgain.vlm.attention import Layout, packed
from visgain.vlm.logits import float32_head, output_head, replaced_forward, token_nll
from visgain.vlm.pack import Pack

CHUNK_LOGITS = 1 << 24
"""Most logits held at a time (64 MiB in float32)."""


@torch.inference_mode()
def pack_nll(model: PreTrainedModel, pack: Pack) -> list[Float32[np.ndarray, " A"]]:
    """NLL in nats of the answer tokens of each conversation of `pack`, in its order."""
    with packed(model, pack.layout), only_wanted(model, pack.layout):
        output = model.base_model(**pack.inputs, use_cache=False, return_dict=True)
    states = output.last_hidden_state[0, pack.layout.wanted]
    output.last_hidden_state = states[None]
    nll = states_nll(model, output, pack.targets).cpu().numpy()
    return np.split(nll, np.cumsum(pack.counts)[:-1])


def states_nll(
    model: PreTrainedModel,
    output: Any,
    targets: Int64[Tensor, " N"],
    forward: Callable[..., Any] | None = None,
) -> Float32[Tensor, " N"]:
    """NLL of `targets` from the final states in `output.last_hidden_state` [1, N, D], a chunk of logits at a time.

    Everything that the model does after its body (soft-capping, scaling) is done by its own forward, whose body is made
    to return a chunk of the states that are there already. `forward`: what to call in place of the model. Where
    gradients are wanted, the backward pass computes each chunk's logits once more, but for the last chunk's, which are
    the first that it needs.
    """
    states, run = output.last_hidden_state, forward or model
    head = output_head(model)

    def chunk_nll(some: Float[Tensor, "1 n D"], wanted: Int64[Tensor, " n"]) -> Float32[Tensor, " n"]:
        output.last_hidden_state = some
        with replaced_forward(model.base_model, lambda *args, **kwargs: output), float32_head(head):
            logits = run(input_ids=wanted[None], use_cache=False, return_dict=True).logits
        return token_nll(logits[0].float(), wanted)

    rows = max(1, CHUNK_LOGITS // model.config.get_text_config(decoder=True).vocab_size)
    chunks = [(states[:, k : k + rows], targets[k : k + rows]) for k in range(0, len(targets), rows)]
    if not torch.is_grad_enabled():
        return torch.cat([chunk_nll(*chunk) for chunk in chunks])
    again = [checkpoint(chunk_nll, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks[:-1]]
    return torch.cat([*again, chunk_nll(*chunks[-1])])


@contextmanager
def only_wanted(model: PreTrainedModel, layout: Layout) -> Iterator[None]:
    """Let the last decoder layer compute only the states at `layout.wanted`; the others come out as garbage.

    Its keys and values are needed everywhere; its queries, the attention's output and the feed-forward part, which are
    computed position by position, are not. Layers that do not have these parts under their usual names are left alone.
    """
    with ExitStack() as stack:
        if layout.last_attention is not None:
            layer = model.get_decoder().layers[-1]
            owners = [(layout.last_attention, "q_proj"), (layout.last_attention, "o_proj"), (layer, "mlp")]
            for part in (getattr(owner, name, None) for owner, name in owners):
                if isinstance(part, nn.Module):
                    stack.enter_context(replaced_forward(part, _at(part.forward, layout.wanted)))
        yield


def _at(forward: Callable[..., Tensor], wanted: Int64[Tensor, " N"]) -> Callable[..., Tensor]:
    """`forward` of a module that works position by position, at positions `wanted` only; zeros elsewhere."""

    def at_wanted(states: Float[Tensor, "B T D"]) -> Float[Tensor, "B T E"]:
        some = forward(states[:, wanted])
        every = some.new_zeros(*states.shape[:2], some.shape[-1])
        every[:, wanted] = some
        return every

    return at_wanted
