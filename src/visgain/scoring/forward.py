"""Encoded samples in, the NLL of every answer token out. The exact reference that faster ways are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor
from torch.nn.functional import pad

from visgain.types import Encoded
from visgain.vlm.batch import is_hidden, pad_batch
from visgain.vlm.load import VLM
from visgain.vlm.logits import answer_logits, token_nll
from visgain.vlm.pack import placed, row_positions


@torch.inference_mode()
def answer_nll(vlm: VLM, samples: Sequence[Encoded]) -> list[Float32[np.ndarray, " A"]]:
    """NLL in nats of each sample's answer tokens, teacher-forced, from one padded forward pass.

    `samples` must have equal signatures (visgain.vlm.batch).
    """
    pad_id = vlm.tokenizer.pad_token_id
    batch = pad_batch(samples, 0 if pad_id is None else pad_id).to(vlm.device)
    known = batch.inputs | _without_masked(vlm, samples)
    inputs = {name: placed(value, vlm.model) for name, value in known.items()}
    logits = answer_logits(vlm.model, inputs, batch.is_answer)
    nll = token_nll(logits, inputs["input_ids"][batch.is_answer])
    counts = [len(sample.turn) for sample in samples]
    return [part.astype(np.float32) for part in np.split(nll.cpu().numpy(), np.cumsum(counts)[:-1])]


def _without_masked(vlm: VLM, samples: Sequence[Encoded]) -> dict[str, Tensor]:
    """Inputs that hide masked pictures: their tokens count as padding, and every token keeps its position."""
    if not any(sample.masked for sample in samples):
        return {}
    length = max(len(sample.input_ids) for sample in samples)
    short = [length - len(sample.input_ids) for sample in samples]
    shown = [torch.from_numpy(~is_hidden(sample, vlm.image_token_id))[None].long() for sample in samples]
    positions = [row_positions(vlm.model, sample) for sample in samples]
    return {
        "attention_mask": torch.cat([pad(mask, (0, n)) for mask, n in zip(shown, short, strict=True)]),
        "position_ids": torch.cat([pad(each, (0, n)) for each, n in zip(positions, short, strict=True)], dim=-2),
    }
