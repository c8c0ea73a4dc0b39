"""Turn a sample into tokens, and know exactly which of them are answer tokens.

An encoder is a template (how a conversation is written) and an image preparation. Two kinds:

- `ChatEncoder` writes with the processor's own chat template, which also tells where the answers stand in the text
  (`visgain.vlm.chat`); the tokenizer's character offsets map that to tokens.
- `FrozenEncoder` (`visgain.vlm.frozen`) writes as a published recipe did, which no chat template reproduces;
  `visgain.vlm.completion` is for processors that know no chat.

Every encoder keeps one contract, checked by the tests for every family: the answer tokens of a sample, decoded in
order, are its answers, each with its end-of-turn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL.Image import Image
from transformers import ProcessorMixin

from visgain.errors import EncodingError
from visgain.types import IMAGE_MARK, Encoded, Sample, Turn
from visgain.vlm.chat import Answer, ChatTemplate, Span, token_text


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
    """Any processor, with its chat template or another."""

    processor: ProcessorMixin
    template: ChatTemplate
    image_token_id: int
    max_length: int = 2048
    name: str = "chat"

    def encode(self, sample: Sample, images: Sequence[Image]) -> Encoded:
        refuse_image_tokens(sample.turns, self._placeholders)
        text, answers = self.template.write(sample.turns)
        ids, offsets, model_inputs = self._tokenize(text, images)
        is_answer, turn, chars = answer_tokens(answers, offsets, sample.answers)
        return finish(ids, is_answer, turn, chars, self.image_token_id, self.max_length, model_inputs)

    def encode_all(self, samples: Sequence[Sample], images: Sequence[Image]) -> list[Encoded | EncodingError]:
        with pictures_once(self.processor):
            return [error_as_value(self.encode, sample, images) for sample in samples]

    def prompt(self, turns: Sequence[Turn], images: Sequence[Image]) -> Encoded:
        refuse_image_tokens(turns, self._placeholders)
        ids, _, model_inputs = self._tokenize(self.template.write_prompt(turns), images)
        return prompt_only(ids, self.image_token_id, model_inputs)

    def _tokenize(self, text: str, images: Sequence[Image]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Ids with images expanded, each id's character span in `text` (images: their placeholder), other inputs."""
        tokenizer = self.processor.tokenizer
        # A template that writes BOS itself must not get a second one.
        bos = tokenizer.bos_token
        special = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
        try:
            inputs = processed(self.processor, text, images, **special)
        except EncodingError:
            if images:
                raise
            inputs = {"input_ids": tokenizer(text, return_tensors="pt", **special)["input_ids"]}
        expanded = inputs.pop("input_ids")[0].numpy()
        plain = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        ids, spans = np.asarray(plain["input_ids"], dtype=np.int64), token_spans(plain["offset_mapping"], text)
        placeholders = (
            {int(tokenizer.convert_tokens_to_ids(token)) for token in self._placeholders} if images else set()
        )
        return expanded, align_expansion(ids, spans, expanded, placeholders), inputs

    @cached_property
    def _placeholders(self) -> set[str]:
        """Tokens that stand for a picture in the text before the processor expands them, or after."""
        names = (token_text(getattr(self.processor, name, None)) for name in ("image_token", "boi_token"))
        return {self.processor.tokenizer.convert_ids_to_tokens(self.image_token_id), *filter(None, names)}


def refuse_image_tokens(turns: Sequence[Turn], tokens: Collection[str]) -> None:
    """Raises EncodingError if a text holds what the model would take for a picture, image marks apart."""
    for number, turn in enumerate(turns):
        text = turn.text.replace(IMAGE_MARK, "") if turn.role == "user" else turn.text
        for token in tokens:
            if token in text:
                raise EncodingError(f"turn {number} contains {token!r}, which this model takes for a picture")


def processed(processor: ProcessorMixin, text: str, images: Sequence[Image], **options: Any) -> dict[str, Any]:
    """What `processor` makes of a text and its pictures, in tensors, less the attention mask.

    Most take pictures as a list, some as one list a text. Without pictures only inputs with a value a token are kept.
    Raises EncodingError with the processor's own reason if it takes none of that.
    """
    refusals = []
    for given in (list(images), [list(images)]) if images else (None,):
        try:
            inputs = dict(processor(text=[text], images=given, return_tensors="pt", **options))
        except StopIteration:  # how transformers 5.17 says it
            refusals.append(f"its text has more marks than its {len(images)} pictures")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, AssertionError) as error:
            refusals.append(str(error).strip() or type(error).__name__)
        else:
            inputs.pop("attention_mask", None)
            known = inputs if images else {"input_ids", *PER_TOKEN_INPUTS}
            return {name: value for name, value in inputs.items() if name in known}
    raise EncodingError(f"{type(processor).__name__} does not take this row: {refusals[0].splitlines()[0]}")


def token_spans(offsets: Sequence[Span], text: str) -> np.ndarray:
    """[T, 2]: `offsets` of the tokens in `text`, with the spaces that the tokenizer trimmed given back.

    GPT-2's tokenizer and its heirs leave out the space that a token begins with, and give a lone one no width.
    """
    spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    reached = 0
    for number, (start, stop) in enumerate(spans.tolist()):
        if reached < start and not text[reached:start].strip(" "):
            spans[number, 0] = reached
        reached = max(reached, stop)
    return spans


def align_expansion(plain: np.ndarray, offsets: np.ndarray, expanded: np.ndarray, placeholders: set[int]) -> np.ndarray:
    """Character spans for `expanded`, which is `plain` with each placeholder replaced by some run of ids.

    `plain`: ids [P]; `offsets`: [P, 2]; `expanded`: ids [T]. Returns [T, 2]; ids of a run get their placeholder's span,
    ids that were put before or after everything (BOS, EOS) a span of no width. Text between placeholders must reappear
    unchanged and in order. Raises EncodingError if it does not.
    """
    where = [i for i, token in enumerate(plain.tolist()) if token in placeholders]
    result = np.zeros((len(expanded), 2), dtype=np.int64)
    position = 0
    for number, start in enumerate([-1, *where]):
        stop = where[number] if number < len(where) else len(plain)
        segment = plain[start + 1 : stop]
        found = _find(expanded, segment, position + (number > 0), late=number == len(where) > 0)
        if found is None:
            raise EncodingError("the processor changed the text around an image, so answer tokens cannot be located")
        if number > 0:
            result[position:found] = offsets[start]
        result[found : found + len(segment)] = offsets[start + 1 : stop]
        position = found + len(segment)
    return result


def _find(ids: np.ndarray, segment: np.ndarray, start: int, *, late: bool) -> int | None:
    """First position from `start` at which `segment` stands in `ids`, or with `late` the last one."""
    positions = range(start, len(ids) - len(segment) + 1)
    for position in reversed(positions) if late else positions:
        if np.array_equal(ids[position : position + len(segment)], segment):
            return position
    return None


@contextmanager
def pictures_once(processor: ProcessorMixin) -> Iterator[None]:
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


def answer_tokens(
    answers: Sequence[Answer], offsets: np.ndarray, texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which tokens are answer tokens, of which turn, and where in the answer: bool [T], int32 [A], int32 [A, 2].

    `texts`: the answers as the dataset has them, to which character spans are relative.
    """
    is_answer = np.zeros(len(offsets), dtype=bool)
    turns, chars = [np.zeros(0, dtype=np.int32)], [np.zeros((0, 2), dtype=np.int32)]
    for number, (answer, text) in enumerate(zip(answers, texts, strict=True)):
        # A token belongs to the answer if any of its characters does: many tokenizers join a word with the space before
        # it, which the template may have put outside the span. Zero-width tokens do not, nor those that begin after the
        # text and reach into the next turn.
        inside = (offsets[:, 1] > answer.start) & (offsets[:, 0] < answer.stop) & (offsets[:, 1] > offsets[:, 0])
        inside &= (offsets[:, 0] < answer.first + len(text.rstrip())) | (offsets[:, 1] <= answer.stop)
        inside &= ~is_answer
        is_answer |= inside
        turns.append(np.full(int(inside.sum()), number, dtype=np.int32))
        chars.append(np.clip(offsets[inside] - answer.first, 0, len(text)).astype(np.int32))
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
