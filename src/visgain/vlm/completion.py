r"""Processors that know no chat: PaliGemma, BLIP-2, InstructBLIP.

They write one question about a picture themselves, with the picture's tokens and what else goes in front, and leave the
model to complete it. What they write in front of the question is taken as it is; then come

    {question}\n{answer}</s>{question}\n{answer}</s>...     if the processor ends a question with a line break
    {question} {answer}</s>{question} {answer}</s>...       if it does not

with the tokenizer's own end. Supervised: each answer with its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from PIL import Image as PILImage
from PIL.Image import Image
from transformers import ProcessorMixin
from transformers.utils import logging

from visgain.errors import EncodingError
from visgain.types import IMAGE_MARK, Encoded, Sample, Turn
from visgain.vlm.chat import Answer
from visgain.vlm.encode import (
    answer_tokens,
    error_as_value,
    finish,
    pictures_once,
    processed,
    prompt_only,
    refuse_image_tokens,
    token_spans,
)

Ids = Int64[np.ndarray, " _"]


@dataclass(frozen=True, kw_only=True)
class CompletionEncoder:
    """`mark`: what the processor wants before a question, once a picture. `gap`: between a question and its answer."""

    processor: ProcessorMixin
    image_token_id: int
    mark: str
    gap: str
    max_length: int = 2048
    name: str = "completion"

    def encode(self, sample: Sample, images: Sequence[Image]) -> Encoded:
        lead, inputs = self._lead(sample.turns, images)
        text, answers = self._write(sample.turns)
        tokens = self.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.concatenate([lead, np.asarray(tokens["input_ids"], dtype=np.int64)])
        spans = np.concatenate([np.zeros((len(lead), 2), np.int64), token_spans(tokens["offset_mapping"], text)])
        is_answer, turn, chars = answer_tokens(answers, spans, sample.answers)
        inputs = _with_types(inputs, is_answer)
        return finish(ids, is_answer, turn, chars, self.image_token_id, self.max_length, inputs)

    def encode_all(self, samples: Sequence[Sample], images: Sequence[Image]) -> list[Encoded | EncodingError]:
        with pictures_once(self.processor):
            return [error_as_value(self.encode, sample, images) for sample in samples]

    def prompt(self, turns: Sequence[Turn], images: Sequence[Image]) -> Encoded:
        lead, inputs = self._lead(turns, images)
        text, _ = self._write(turns)
        ids = np.concatenate([lead, _ids(self.processor, text.rstrip(" "))])
        return prompt_only(ids, self.image_token_id, _with_types(inputs, np.zeros(len(ids), dtype=bool)))

    def _write(self, turns: Sequence[Turn]) -> tuple[str, list[Answer]]:
        """The conversation from its first question on, and its answers."""
        end = self.processor.tokenizer.eos_token
        text, answers = "", []
        for turn in turns:
            if turn.role == "user":
                text += self._question(turn)
            else:
                answers.append(Answer(start=len(text), stop=len(text) + len(turn.text + end), first=len(text)))
                text += turn.text + end
        return text, answers

    def _question(self, turn: Turn) -> str:
        question = turn.text.replace(IMAGE_MARK, "").strip()
        return question + self.gap if question or self.gap == "\n" else ""

    def _lead(self, turns: Sequence[Turn], images: Sequence[Image]) -> tuple[Ids, dict[str, Any]]:
        """Ids before the first question, and the model's inputs for the pictures.

        Raises EncodingError for pictures in a later turn, and for none or more of them than the processor takes.
        """
        if not images:
            raise EncodingError("this model completes a question about a picture; this row has none")
        if turns[0].role != "user":
            raise EncodingError("this model completes a question; this row begins with an answer")
        if any(IMAGE_MARK in turn.text for turn in turns[1:] if turn.role == "user"):
            raise EncodingError("this model takes pictures before the first question alone; this row has a later one")
        refuse_image_tokens(turns, [self.processor.tokenizer.convert_ids_to_tokens(self.image_token_id)])
        question = self._question(turns[0]).rstrip(" ")
        ids, inputs = _read(self.processor, self.mark * len(images) + question.removesuffix("\n"), images)
        if len(images) > 1:
            alone, _ = _read(self.processor, self.mark, images[:1])
            if (ids == self.image_token_id).sum() != len(images) * (alone == self.image_token_id).sum():
                raise EncodingError(f"{type(self.processor).__name__} takes one picture; this row has {len(images)}")
        return _without_end(ids, _ids(self.processor, question)), inputs


def completion_encoder(processor: ProcessorMixin, image_token_id: int, max_length: int) -> CompletionEncoder | None:
    """An encoder for a processor that puts a picture before a question on its own; None if it does not."""
    token, picture = processor.tokenizer.convert_ids_to_tokens(image_token_id), PILImage.new("RGB", (64, 64))
    try:
        with _no_warnings():
            bare, marked = (_read(processor, mark + "probe", [picture])[0] for mark in ("", token))
    except EncodingError:
        return None
    counts = [int((ids == image_token_id).sum()) for ids in (bare, marked)]
    gaps = [gap for gap in ("\n", " ") if _ends_with(bare, _ids(processor, "probe" + gap.rstrip(" ")))]
    if counts[0] == 0 or not gaps or processor.tokenizer.eos_token is None:
        return None
    return CompletionEncoder(
        processor=processor,
        image_token_id=image_token_id,
        mark=token if counts[0] == counts[1] else "",
        gap=gaps[0],
        max_length=max_length,
    )


def _read(processor: ProcessorMixin, text: str, images: Sequence[Image]) -> tuple[Ids, dict[str, Any]]:
    inputs = processed(processor, text, images)
    inputs.pop("labels", None)
    return inputs.pop("input_ids")[0].numpy(), inputs


def _ids(processor: ProcessorMixin, text: str) -> Ids:
    return np.asarray(processor.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)


def _ends_with(ids: Ids, end: Ids) -> bool:
    return len(end) <= len(ids) and np.array_equal(ids[len(ids) - len(end) :], end)


def _without_end(ids: Ids, end: Ids) -> Ids:
    if not _ends_with(ids, end):
        raise EncodingError("the processor changed the question, so answer tokens cannot be located")
    return ids[: len(ids) - len(end)]


def _with_types(inputs: Mapping[str, Any], is_answer: Bool[np.ndarray, " T"]) -> dict[str, Any]:
    """`inputs` with token types, if the model takes any: 0 for what it reads both ways, 1 from the first answer on."""
    types = torch.from_numpy(is_answer).cumsum(0).clamp(max=1)[None]
    return {**inputs, "token_type_ids": types} if "token_type_ids" in inputs else dict(inputs)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Processors warn of what is tried here on purpose."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
