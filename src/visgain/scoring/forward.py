"""Encoded samples in, the NLL of every answer token out. The exact reference that faster ways are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32

from visgain.types import Encoded
from visgain.vlm.batch import pad_batch
from visgain.vlm.load import VLM
from visgain.vlm.logits import answer_logits, token_nll
from visgain.vlm.pack import placed


@torch.inference_mode()
def answer_nll(vlm: VLM, samples: Sequence[Encoded]) -> list[Float32[np.ndarray, " A"]]:
    """NLL in nats of each sample's answer tokens, teacher-forced, from one padded forward pass.

    `samples` must have equal signatures (visgain.vlm.batch).
    """
    pad_id = vlm.tokenizer.pad_token_id
    batch = pad_batch(samples, 0 if pad_id is None else pad_id).to(vlm.device)
    inputs = {name: placed(value, vlm.model) for name, value in batch.inputs.items()}
    logits = answer_logits(vlm.model, inputs, batch.is_answer)
    nll = token_nll(logits, inputs["input_ids"][batch.is_answer])
    counts = [len(sample.turn) for sample in samples]
    return [part.astype(np.float32) for part in np.split(nll.cpu().numpy(), np.cumsum(counts)[:-1])]
