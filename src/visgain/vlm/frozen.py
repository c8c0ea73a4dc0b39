"""The encoder of the frozen profiles: writes a conversation as a published recipe does, to the token and the label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64
from PIL import Image as PILImage
from PIL.Image import Image
from transformers import ProcessorMixin

from visgain.errors import EncodingError
from visgain.types import IMAGE_MARK, Encoded, Sample, Turn
from visgain.vlm.encode import error_as_value, finish, prompt_only, refuse_image_tokens
from visgain.vlm.profiles import Profile

PAD_COLOUR = (122, 116, 104)
"""CLIP's mean colour, its fractions cut off."""

NARROWEST = 1 / 200
"""Short side by long side of what is cropped: the short side grows to the tower's, and the long side with it."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Where an answer stands in the text that a template wrote."""

    number: int  # which answer of the sample it is, from 0
    start: int  # [start, stop) carries loss
    stop: int
    text_start: int  # [text_start, text_stop) is the answer's own text, perhaps without the white space around it
    text_stop: int
    skipped: int  # characters of white space that the template left out in front
    length: int  # of the answer as the sample has it

    def covers(self, offsets: Int64[np.ndarray, "T 2"]) -> Bool[np.ndarray, " T"]:
        """Which tokens belong to it: a mark of the piece's beginning may have no width."""
        begin, end = offsets[:, 0], offsets[:, 1]
        inside = ((begin >= self.start) | (end > self.start)) & (begin < self.stop)
        return np.asarray(inside & (self.start < self.stop))

    def chars(self, offsets: Int64[np.ndarray, "A 2"]) -> Int32[np.ndarray, "A 2"]:
        """Spans of its tokens in the sample's text. What follows the text has no width and stands at its end."""
        clipped = np.clip(offsets, self.text_start, self.text_stop) - self.text_start + self.skipped
        inside: np.ndarray = clipped.astype(np.int32)
        after = offsets[:, 0] >= self.text_stop
        inside[after] = self.length
        # A lone space before the text counts with the first character, as a lone byte of it would.
        before = (inside[:, 1] == self.skipped) & ~after
        inside[before, 1] = self.skipped + 1
        return inside


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Text that is tokenised in one go, except around its image marks."""

    text: str
    answers: tuple[Answer, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FrozenEncoder:
    """`profile` with the tokenizer and image processor of a LLaVA whose vision tower takes squares of `side` pixels."""

    profile: Profile
    processor: ProcessorMixin
    image_token_id: int
    side: int
    max_length: int

    @property
    def name(self) -> str:
        return self.profile.name

    def encode(self, sample: Sample, images: Sequence[Image]) -> Encoded:
        return self._encode(sample, self._image_inputs(images))

    def encode_all(self, samples: Sequence[Sample], images: Sequence[Image]) -> list[Encoded | EncodingError]:
        inputs = self._image_inputs(images)
        return [error_as_value(self._encode, sample, inputs) for sample in samples]

    def prompt(self, turns: Sequence[Turn], images: Sequence[Image]) -> Encoded:
        inputs = self._image_inputs(images)
        ids = [self._tokenize(piece.text, inputs)[0] for piece in self._write(turns)]
        return prompt_only(np.concatenate([self._bos(), *ids]), self.image_token_id, inputs)

    def _encode(self, sample: Sample, inputs: dict[str, Any]) -> Encoded:
        bos = self._bos()
        ids, is_answer, turn, chars = [bos], [np.zeros(len(bos), dtype=bool)], [], []
        for piece in self._write(sample.turns):
            piece_ids, offsets = self._tokenize(piece.text, inputs)
            supervised = np.zeros(len(piece_ids), dtype=bool)
            for answer in piece.answers:
                mine = answer.covers(offsets)
                supervised |= mine
                turn.append(np.full(int(mine.sum()), answer.number, dtype=np.int32))
                chars.append(answer.chars(offsets[mine]))
            ids.append(piece_ids)
            is_answer.append(supervised)
        return finish(
            np.concatenate(ids),
            np.concatenate(is_answer),
            np.concatenate(turn),
            np.concatenate(chars),
            self.image_token_id,
            self.max_length,
            inputs,
        )

    # ---------------------------------------------------------------- text

    def _write(self, turns: Sequence[Turn]) -> list[Piece]:
        """The conversation without BOS.

        Raises EncodingError if it has more answers than the template takes, or text that the model takes for a picture.
        """
        refuse_image_tokens(turns, {IMAGE_MARK, self.processor.tokenizer.convert_ids_to_tokens(self.image_token_id)})
        most, n_answers = self.profile.most_answers, sum(turn.role == "assistant" for turn in turns)
        if most is not None and n_answers > most:
            raise EncodingError(f"--template {self.name} takes {most} answer; this sample has {n_answers}")
        pieces: list[Piece] = []
        text, answers, number = self.profile.system, [], 0
        for turn in turns:
            if turn.role == "user":
                text += self._question(turn.text)
            else:
                answer, written = self._answer(turn.text, start=len(text), number=number)
                answers.append(answer)
                text += written
                number += 1
            if self.profile.turn_by_turn:
                pieces.append(Piece(text=text, answers=tuple(answers)))
                text, answers = "", []
        return pieces or [Piece(text=text, answers=tuple(answers))]

    def _question(self, text: str) -> str:
        said = self.profile.user_text(text)
        if not said and self.profile.empty_user is not None:
            return self.profile.empty_user
        return self.profile.user.format(text=said)

    def _answer(self, text: str, start: int, number: int) -> tuple[Answer, str]:
        """An answer that is written from character `start` on, and what is written."""
        profile, said = self.profile, self.profile.answer_text(text)
        form = profile.answer if said or profile.empty_answer is None else profile.empty_answer
        written = form.format(text=said, end=self.processor.tokenizer.eos_token)
        text_start = start + (form.index("{text}") if "{text}" in form else 0)
        answer = Answer(
            number=number,
            start=start,
            stop=start + len(written),
            text_start=text_start,
            text_stop=text_start + len(said),
            skipped=text.index(said),
            length=len(text),
        )
        return answer, written

    def _bos(self) -> np.ndarray:
        bos = self.processor.tokenizer.bos_token_id
        return np.asarray([] if bos is None else [bos], dtype=np.int64)

    def _tokenize(self, text: str, image_inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Ids [T] with images expanded, and each id's character span in `text` [T, 2] (images: their mark)."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0
        for number, part in enumerate(text.split(IMAGE_MARK)):
            if number > 0:
                run = self._image_run(image_inputs)
                ids += [self.image_token_id] * run
                offsets += [(position - len(IMAGE_MARK), position)] * run
            encoded = self.processor.tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
            ids += encoded["input_ids"]
            offsets += [(start + position, stop + position) for start, stop in encoded["offset_mapping"]]
            position += len(part) + len(IMAGE_MARK)
        return np.asarray(ids, dtype=np.int64), np.asarray(offsets, dtype=np.int64).reshape(-1, 2)

    # ---------------------------------------------------------------- pictures

    def _image_inputs(self, images: Sequence[Image]) -> dict[str, Any]:
        """Pictures as the recipe prepares them, whatever the processor's own settings for shape say."""
        if not images:
            return {}
        square = {"height": self.side, "width": self.side}
        squash = self.profile.pictures == "squash"
        prepared = [pad_to_square(image) for image in images] if self.profile.pictures == "pad" else list(images)
        for width, height in (image.size for image in prepared):
            if not squash and min(width, height) < NARROWEST * max(width, height):
                raise EncodingError(f"a picture of {width} x {height} pixels is too narrow to be cropped")
        inputs = self.processor.image_processor(
            prepared,
            do_resize=True,
            size=square if squash else {"shortest_edge": self.side},
            resample=PILImage.Resampling.BICUBIC,
            do_center_crop=not squash,
            crop_size=square,
            do_pad=False,  # where it is due, it is done
            return_tensors="pt",
        )
        return dict(inputs)

    def _image_run(self, image_inputs: dict[str, Any]) -> int:
        """Number of image tokens of one picture: its patches, and what the tower adds, less the class token."""
        if "pixel_values" not in image_inputs:
            raise EncodingError("the text has more image marks than the sample has images")
        height, width = image_inputs["pixel_values"].shape[-2:]
        patches = (height // self.processor.patch_size) * (width // self.processor.patch_size)
        dropped = int(self.processor.vision_feature_select_strategy == "default")
        return int(patches + self.processor.num_additional_image_tokens - dropped)


def pad_to_square(image: Image) -> Image:
    """`image` in the middle of a square of its longer side in PAD_COLOUR; an odd rest goes below or to the right."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = PILImage.new("RGB", (side, side), PAD_COLOUR)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square
