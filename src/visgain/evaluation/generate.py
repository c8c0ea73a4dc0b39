"""Greedy answers to many questions, batched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm

from visgain.types import Sample, Turn
from visgain.vlm.batch import pad_batch
from visgain.vlm.encode import Encoder
from visgain.vlm.load import VLM


@torch.inference_mode()
def generate_answers(
    vlm: VLM,
    encoder: Encoder,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    description: str = "answering",
) -> list[str]:
    """The model's greedy answer to the first question of each sample, in the order of `samples`.

    Prompts are batched by length and padded on the left. Raises ImageError or EncodingError for a sample that cannot be
    asked: evaluation leaves nothing out.
    """
    prompts = [encoder.prompt(_question(sample), [image.open() for image in sample.images]) for sample in samples]
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].input_ids), i))
    tokenizer = vlm.tokenizer
    pad_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    answers = [""] * len(samples)
    with tqdm(total=len(samples), desc=description, unit="row", mininterval=0.5) as progress:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = pad_batch([prompts[i] for i in chosen], pad_id, side="left").to(vlm.device)
            output = vlm.model.generate(
                **batch.inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad_id
            )
            new = output[:, batch.is_answer.shape[1] :]
            for i, text in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[i] = text.strip()
            progress.update(len(chosen))
    return answers


def _question(sample: Sample) -> tuple[Turn, ...]:
    """The turns up to the first answer."""
    first_answer = next(i for i, turn in enumerate(sample.turns) if turn.role == "assistant")
    return sample.turns[:first_answer]
