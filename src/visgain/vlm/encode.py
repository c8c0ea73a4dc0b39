"""Turn a sample into tokens, and know exactly which of them are answer tokens.

An encoder is a template (how a conversation is written) and an image preparation. Two kinds:

- `ChatEncoder` writes with the processor's own chat template. Answer spans come from the template's generation marks,
  else from rendering each prefix of the conversation and checking that it is a prefix; they are spans of *text*, mapped
  to tokens by character offsets.
- `FrozenEncoder` (`visgain.vlm.frozen`) writes as a published recipe did, which no chat template reproduces.

Every encoder keeps one contract, checked by the tests for every family: the answer tokens of a sample, decoded in
order, are its answers, each with its end-of-turn.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL.Image import Image
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from visgain.errors import EncodingError, ModelError
from visgain.types import IMAGE_MARK, Encoded, Sample, Turn

Span = tuple[int, int]


@runtime_checkable
class Encoder(Protocol):
    """What scoring, training and generation need of a template."""

    @property
    def name(self) -> str: ...

    @property
    def processor(self) -> ProcessorMixin: ...

    @property
    def max_length(self) -> int: ...

    def encode(self, sample: Sample, images: Sequence[Image]) -> Encoded:
        """The sample with `images` in place of its own, at most `max_length` tokens.

        Raises EncodingError if no answer token or not the whole image fits.
        """
        ...

    def encode_all(self, samples: Sequence[Sample], images: Sequence[Image]) -> list[Encoded | EncodingError]:
        """Each of `samples` with the same `images`, which are prepared once; or the error that `encode` raises."""
        ...

    def prompt(self, turns: Sequence[Turn], images: Sequence[Image]) -> Encoded:
        """A conversation that ends with a user turn, ready for the model to answer; it has no answer tokens."""
        ...


# ---------------------------------------------------------------- the chat template


@dataclass(frozen=True, kw_only=True)
class ChatEncoder:
    """Any processor that has a chat template."""

    processor: ProcessorMixin
    image_token_id: int
    max_length: int = 2048
    name: str = "chat"

    def encode(self, sample: Sample, images: Sequence[Image]) -> Encoded:
        text, spans = self._render(sample.turns)
        ids, offsets, model_inputs = self._tokenize(text, images)
        is_answer, turn, chars = _answer_tokens(text, spans, offsets, sample.answers)
        return finish(ids, is_answer, turn, chars, self.image_token_id, self.max_length, model_inputs)

    def encode_all(self, samples: Sequence[Sample], images: Sequence[Image]) -> list[Encoded | EncodingError]:
        with _pictures_once(self.processor):
            return [error_as_value(self.encode, sample, images) for sample in samples]

    def prompt(self, turns: Sequence[Turn], images: Sequence[Image]) -> Encoded:
        text = self._render_text(chat_messages(turns), add_generation_prompt=True)
        ids, _, model_inputs = self._tokenize(text, images)
        return prompt_only(ids, self.image_token_id, model_inputs)

    @cached_property
    def marks_generation(self) -> bool:
        """Whether the chat template says itself which text the assistant generates."""
        return re.search(r"{%-?\s*generation\s*-?%}", self.processor.chat_template or "") is not None

    def ends_turns(self) -> bool:
        """Whether an answer's span goes on after its text, that is, whether the end of the turn is supervised."""
        answer = "probe"
        turns = (Turn(role="user", text="question"), Turn(role="assistant", text=answer))
        text, spans = self._render(turns)
        return text[slice(*spans[0])].partition(answer)[2].strip() != ""

    def _render(self, turns: Sequence[Turn]) -> tuple[str, list[Span]]:
        messages = chat_messages(turns)
        if not self.marks_generation:
            return self._render_prefixes(messages)
        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=self.processor.chat_template,
            return_assistant_tokens_mask=True,
            **self.processor.tokenizer.special_tokens_map,
        )
        return texts[0], list(spans[0])

    def _render_prefixes(self, messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
        """Answer spans of a template without generation marks: what each assistant message adds to the text."""
        text, spans = self._render_text(messages), []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render_text(messages[:number], add_generation_prompt=True)
                after = self._render_text(messages[: number + 1])
                if not (after.startswith(before) and text.startswith(after.rstrip())):
                    raise ModelError(
                        f"the chat template of {self.processor.__class__.__name__} rewrites earlier turns and marks no "
                        "generation, so answers cannot be located; add {% generation %} marks to it"
                    )
                spans.append((len(before), min(len(after), len(text))))
        return text, spans

    def _render_text(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
        texts, _ = render_jinja_template(
            conversations=[messages],
            chat_template=self.processor.chat_template,
            add_generation_prompt=add_generation_prompt,
            **self.processor.tokenizer.special_tokens_map,
        )
        return str(texts[0])

    def _tokenize(self, text: str, images: Sequence[Image]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Ids with images expanded, each id's character span in `text` (images: their placeholder), other inputs."""
        tokenizer = self.processor.tokenizer
        # A template that writes BOS itself must not get a second one.
        bos = tokenizer.bos_token
        special = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
        if not images:
            plain = tokenizer(text, return_offsets_mapping=True, **special)
            return np.asarray(plain["input_ids"]), np.asarray(plain["offset_mapping"]).reshape(-1, 2), {}
        inputs = dict(self.processor(text=[text], images=list(images), return_tensors="pt", **special))
        expanded = inputs.pop("input_ids")[0].numpy()
        inputs.pop("attention_mask", None)
        plain = tokenizer(text, return_offsets_mapping=True, **special)
        offsets = align_expansion(
            np.asarray(plain["input_ids"]),
            np.asarray(plain["offset_mapping"]).reshape(-1, 2),
            expanded,
            self._placeholder_ids,
        )
        return expanded, offsets, inputs

    @cached_property
    def _placeholder_ids(self) -> set[int]:
        """Ids that stand for a whole image in the text before the processor expands them."""
        tokenizer = self.processor.tokenizer
        names = (getattr(self.processor, name, None) for name in ("image_token", "boi_token"))
        return {int(tokenizer.convert_tokens_to_ids(name)) for name in names if isinstance(name, str)}


def chat_messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as chat messages whose content is a list of image and text parts, in the order they stand in the text.

    The line break that LLaVA's data puts between an image mark and the text is the template's business: it is dropped.
    """
    return [{"role": turn.role, "content": list(_content(turn))} for turn in turns]


def _content(turn: Turn) -> Iterator[dict[str, str]]:
    pieces = turn.text.split(IMAGE_MARK) if turn.role == "user" else [turn.text]
    for number, piece in enumerate(pieces):
        if number > 0:
            yield {"type": "image"}
            piece = piece.removeprefix("\n")
        if number < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece or len(pieces) == 1:
            yield {"type": "text", "text": piece}


def align_expansion(plain: np.ndarray, offsets: np.ndarray, expanded: np.ndarray, placeholders: set[int]) -> np.ndarray:
    """Character spans for `expanded`, which is `plain` with each placeholder replaced by some run of ids.

    `plain`: ids [P]; `offsets`: [P, 2]; `expanded`: ids [T]. Returns [T, 2]; ids of a run get their placeholder's span.
    Text between placeholders must reappear unchanged and in order. Raises EncodingError if it does not.
    """
    where = [i for i, token in enumerate(plain.tolist()) if token in placeholders]
    result = np.empty((len(expanded), 2), dtype=np.int64)
    position = 0
    for number, start in enumerate([-1, *where]):
        stop = where[number] if number < len(where) else len(plain)
        segment = plain[start + 1 : stop]
        found = _find(expanded, segment, position + (number > 0), at_end=number == len(where))
        if found is None or (number == 0 and found != 0):
            raise EncodingError("the processor changed the text around an image, so answer tokens cannot be located")
        if number > 0:
            result[position:found] = offsets[start]
        result[found : found + len(segment)] = offsets[start + 1 : stop]
        position = found + len(segment)
    return result


def _find(ids: np.ndarray, segment: np.ndarray, start: int, *, at_end: bool) -> int | None:
    """First position from `start` at which `segment` stands in `ids`; with `at_end`, only as the very last ids."""
    last = len(ids) - len(segment)
    for position in range(max(start, last) if at_end else start, last + 1):
        if np.array_equal(ids[position : position + len(segment)], segment):
            return position
    return None


@contextmanager
def _pictures_once(processor: ProcessorMixin) -> Iterator[None]:
    """Let `processor` prepare the same pictures only once in this block."""
    real = processor.image_processor
    processor.image_processor = _Remembering(real)
    try:
        yield
    finally:
        processor.image_processor = real


class _Remembering:
    """An image processor that knows its last answer. Processors take what they get apart, so each gets a fresh copy."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self._asked: Any = None
        self._answer: Any = None

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        asked = (_flat(images), args, kwargs)
        known = self._asked is not None and asked[1:] == self._asked[1:] and _same_pictures(asked[0], self._asked[0])
        if not known:
            self._asked, self._answer = asked, self._real(images, *args, **kwargs)
        answer = copy.copy(self._answer)
        answer.data = dict(answer.data)
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _flat(images: Any) -> list[Any]:
    return [inner for item in images for inner in _flat(item)] if isinstance(images, list | tuple) else [images]


def _same_pictures(some: list[Any], others: list[Any]) -> bool:
    """Some processors hand on the pictures that they got, some a copy of each."""
    return len(some) == len(others) and all(
        one is other or (isinstance(one, Image) and one == other) for one, other in zip(some, others, strict=True)
    )


# ---------------------------------------------------------------- shared by all encoders


def error_as_value(encode: Callable[..., Encoded], *args: Any) -> Encoded | EncodingError:
    try:
        return encode(*args)
    except EncodingError as error:
        return error


def _answer_tokens(
    text: str, spans: Sequence[Span], offsets: np.ndarray, answers: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which tokens are answer tokens, of which turn, and where in the answer: bool [T], int32 [A], int32 [A, 2]."""
    if len(spans) != len(answers):
        raise EncodingError(f"the template wrote {len(spans)} answers where the sample has {len(answers)}")
    is_answer = np.zeros(len(offsets), dtype=bool)
    turns, chars = [], []
    for number, ((start, stop), answer) in enumerate(zip(spans, answers, strict=True)):
        first = text.find(answer.strip(), start, stop)
        if first < 0:
            raise EncodingError(f"the template changed answer {number}, so its tokens cannot be located")
        first -= len(answer) - len(answer.lstrip())
        # A token belongs to the answer if any of its characters does: many tokenizers join a word with the space before
        # it, which the template may have put outside the span. Zero-width tokens do not.
        inside = (offsets[:, 1] > start) & (offsets[:, 0] < stop) & (offsets[:, 1] > offsets[:, 0])
        is_answer |= inside
        turns.append(np.full(int(inside.sum()), number, dtype=np.int32))
        chars.append(np.clip(offsets[inside] - first, 0, len(answer)).astype(np.int32))
    return is_answer, np.concatenate(turns), np.concatenate(chars)


def finish(
    ids: np.ndarray,
    is_answer: np.ndarray,
    turn: np.ndarray,
    chars: np.ndarray,
    image_token_id: int,
    max_length: int,
    model_inputs: Mapping[str, Any],
) -> Encoded:
    """Cut to `max_length` and check what is left. Raises EncodingError if an image was cut or no answer token fits."""
    n_image_tokens = int((ids == image_token_id).sum())
    truncated = len(ids) > max_length
    if truncated:
        if int((ids[:max_length] == image_token_id).sum()) < n_image_tokens:
            raise EncodingError(
                f"{n_image_tokens} image tokens do not fit into --max-length {max_length} with the text before them"
            )
        ids, is_answer = ids[:max_length], is_answer[:max_length]
        turn, chars = turn[: int(is_answer.sum())], chars[: int(is_answer.sum())]
        model_inputs = {
            name: value[:, :max_length] if name in PER_TOKEN_INPUTS else value for name, value in model_inputs.items()
        }
    if not is_answer[1:].any():
        raise EncodingError(f"no answer token fits into --max-length {max_length}")
    return Encoded(
        input_ids=ids.astype(np.int64),
        is_answer=is_answer,
        turn=turn,
        chars=chars,
        n_image_tokens=n_image_tokens,
        truncated=truncated,
        model_inputs=model_inputs,
    )


def prompt_only(ids: np.ndarray, image_token_id: int, model_inputs: Mapping[str, Any]) -> Encoded:
    """An Encoded without answer tokens."""
    return Encoded(
        input_ids=ids.astype(np.int64),
        is_answer=np.zeros(len(ids), dtype=bool),
        turn=np.zeros(0, dtype=np.int32),
        chars=np.zeros((0, 2), dtype=np.int32),
        n_image_tokens=int((ids == image_token_id).sum()),
        model_inputs=model_inputs,
    )


PER_TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids", "cross_attention_mask")
"""Model inputs of shape [1, T, ...], one value a token, that must be cut and padded with the ids."""


def without_end_of_turn(encoded: Encoded) -> Encoded:
    """`encoded` with end-of-turn tokens (those of zero width) no longer answer tokens. May raise EncodingError."""
    words = encoded.chars[:, 1] > encoded.chars[:, 0]
    if not words.any():
        raise EncodingError("the answers are empty and end-of-turn tokens are ignored")
    is_answer = encoded.is_answer.copy()
    is_answer[is_answer] = words
    return replace(encoded, is_answer=is_answer, turn=encoded.turn[words], chars=encoded.chars[words])
