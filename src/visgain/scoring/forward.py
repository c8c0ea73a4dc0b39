"""Encoded samples in, the NLL of every answer token out. The exact reference that faster ways are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32

from visgain.errors import ModelError
from visgain.types import Encoded
from visgain.vlm.batch import pad_batch
from visgain.vlm.load import VLM
from visgain.vlm.logits import answer_logits, token_nll


@torch.inference_mode()
def answer_nll(vlm: VLM, samples: Sequence[Encoded]) -> list[Float32[np.ndarray, " A"]]:
    """NLL in nats of each sample's answer tokens, teacher-forced, from one padded forward pass.

    `samples` must have equal signatures (visgain.vlm.batch). Raises ModelError when the device's memory is exhausted.
    """
    pad_id = vlm.tokenizer.pad_token_id
    batch = pad_batch(samples, 0 if pad_id is None else pad_id).to(vlm.device)
    try:
        logits = answer_logits(vlm.model, batch.inputs, batch.is_answer)
        nll = token_nll(logits, batch.inputs["input_ids"][batch.is_answer])
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"out of memory on {vlm.device} with {batch.is_answer.numel()} tokens in a batch; lower --batch-tokens"
        ) from error
    counts = [len(sample.turn) for sample in samples]
    return [part.astype(np.float32) for part in np.split(nll.cpu().numpy(), np.cumsum(counts)[:-1])]
