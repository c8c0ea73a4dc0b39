"""The original LLaVA-1.5 templates, to the token and the label.

Source: the published recipe as stated in docs/method.md, section 3. `llava-1.5` is the tuning stage (template "v1",
pictures padded to a square), `llava-1.5-align` the pre-training stage (template "plain", pictures cropped).
Text before, between and after images is tokenised in separate pieces, which matters for tokenizers that mark the
beginning of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL.Image import Image
from transformers import ProcessorMixin

from visgain.errors import EncodingError
from visgain.types import IMAGE_MARK, Encoded, Sample, Turn
from visgain.vlm.encode import Span, error_as_value, finish, prompt_only

SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PAD_COLOUR = (122, 116, 104)


@dataclass(frozen=True, kw_only=True)
class LlavaEncoder:
    r"""Template "v1": `SYSTEM USER: <image>\n{question} ASSISTANT: {answer}</s>USER: ...`, BOS in front.

    Supervised: from the first token of each answer through its `</s>`, in every turn.
    """

    processor: ProcessorMixin
    image_token_id: int
    max_length: int = 2048
    name: str = "llava-1.5"

    def encode(self, sample: Sample, images: Sequence[Image]) -> Encoded:
        return self._encode(sample, self._image_inputs(images))

    def encode_all(self, samples: Sequence[Sample], images: Sequence[Image]) -> list[Encoded | EncodingError]:
        inputs = self._image_inputs(images)
        return [error_as_value(self._encode, sample, inputs) for sample in samples]

    def _encode(self, sample: Sample, inputs: dict[str, Any]) -> Encoded:
        text, spans = self.write(sample.turns)
        ids, offsets = self._tokenize(text, inputs)
        end = self.processor.tokenizer.eos_token
        is_answer = np.zeros(len(ids), dtype=bool)
        turns, chars = [], []
        for number, (start, stop) in enumerate(spans):
            # A token that starts with the space before the answer is the answer's first token.
            inside = (offsets[:, 1] > start) & (offsets[:, 0] < stop)
            is_answer |= inside
            turns.append(np.full(int(inside.sum()), number, dtype=np.int32))
            length = stop - len(self._end_of_turn(end)) - start
            chars.append(np.clip(offsets[inside] - start, 0, length).astype(np.int32))
        return finish(
            ids, is_answer, np.concatenate(turns), np.concatenate(chars), self.image_token_id, self.max_length, inputs
        )

    def prompt(self, turns: Sequence[Turn], images: Sequence[Image]) -> Encoded:
        text, _ = self.write(turns)
        inputs = self._image_inputs(images)
        ids, _ = self._tokenize(text, inputs)
        return prompt_only(ids, self.image_token_id, inputs)

    def write(self, turns: Sequence[Turn]) -> tuple[str, list[Span]]:
        """The conversation as one line (without BOS), and the span of each answer with its end-of-turn."""
        end = self._end_of_turn(self.processor.tokenizer.eos_token)
        text, spans = SYSTEM_PROMPT + " ", []
        for turn in turns:
            if turn.role == "user":
                text += f"USER: {images_first(turn.text)} ASSISTANT:"
            else:
                text += " "
                spans.append((len(text), len(text) + len(turn.text) + len(end)))
                text += turn.text + end
        return text, spans

    def _end_of_turn(self, eos: str) -> str:
        return eos

    def _prepare(self, image: Image) -> Image:
        return pad_to_square(image)

    def _image_inputs(self, images: Sequence[Image]) -> dict[str, Any]:
        if not images:
            return {}
        # The picture is square already; do_pad would be a second, different padding.
        prepared = [self._prepare(image) for image in images]
        return dict(self.processor.image_processor(prepared, do_pad=False, return_tensors="pt"))

    def _tokenize(self, text: str, image_inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Ids with images expanded, and each id's character span in `text`."""
        tokenizer = self.processor.tokenizer
        ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        offsets: list[Span] = [(0, 0)] * len(ids)
        position = 0
        for number, piece in enumerate(text.split(IMAGE_MARK)):
            if number > 0:
                run = self._image_run(image_inputs)
                ids += [self.image_token_id] * run
                offsets += [(position - len(IMAGE_MARK), position)] * run
            encoded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
            ids += encoded["input_ids"]
            offsets += [(start + position, stop + position) for start, stop in encoded["offset_mapping"]]
            position += len(piece) + len(IMAGE_MARK)
        return np.asarray(ids), np.asarray(offsets, dtype=np.int64)

    def _image_run(self, image_inputs: dict[str, Any]) -> int:
        """Number of image tokens of one picture: its patches, and the class token if the strategy keeps it."""
        if "pixel_values" not in image_inputs:
            raise EncodingError("the text has more image marks than the sample has images")
        height, width = image_inputs["pixel_values"].shape[-2:]
        patch = self.processor.patch_size
        classes = int(self.processor.vision_feature_select_strategy != "default")
        return int((height // patch) * (width // patch) + classes)


class LlavaAlignEncoder(LlavaEncoder):
    """Template "plain": the image, the caption and a line break. The human's text is dropped.

    Supervised: the caption and the line break.
    """

    def write(self, turns: Sequence[Turn]) -> tuple[str, list[Span]]:
        marks = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
        captions = [turn.text for turn in turns if turn.role == "assistant"]
        if len(captions) > 1:
            raise EncodingError("the plain template takes one caption; this sample has several turns")
        text = IMAGE_MARK * marks
        spans = [(len(text), len(text) + len(caption) + 1) for caption in captions]
        return text + "".join(caption + "\n" for caption in captions), spans

    def _end_of_turn(self, eos: str) -> str:
        return "\n"

    def _prepare(self, image: Image) -> Image:
        return image


def images_first(text: str) -> str:
    """A user turn with its image marks moved to the front, each on a line of its own, as LLaVA's preprocessing does."""
    marks = text.count(IMAGE_MARK)
    return (f"{IMAGE_MARK}\n" * marks + text.replace(IMAGE_MARK, "").strip()).strip() if marks else text


def pad_to_square(image: Image) -> Image:
    """`image` centred on a square of its longer side in CLIP's mean colour."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = PILImage.new("RGB", (side, side), PAD_COLOUR)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square
