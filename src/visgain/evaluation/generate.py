"""Answers to many prompts: batched by length, padded on the left, with the model's own key-value cache.

Which prompts go together depends on the prompts alone and not on what is answered already, so an interrupted run that
is resumed gives the same answers as one that was not.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from visgain.errors import EncodingError, ModelError
from visgain.types import IMAGE_MARK, Encoded, ImageRef, Sample, Turn
from visgain.vlm.batch import pad_batch, signature
from visgain.vlm.encode import Encoder
from visgain.vlm.load import VLM
from visgain.vlm.pack import placed
from visgain.vlm.template import end_of_turn
from visgain.vlm.threads import computing_with, n_threads

WINDOW = 4
"""Batches whose prompts are prepared and then sorted by their length in tokens: bounds the pictures in memory."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A conversation that ends with a user's turn, and its pictures."""

    turns: tuple[Turn, ...]
    images: tuple[ImageRef, ...] = ()

    @classmethod
    def plain(cls, text: str, images: Sequence[ImageRef] = ()) -> Ask:
        """One question, its pictures in front of it."""
        marks = f"{IMAGE_MARK}\n" * len(images)
        return cls(turns=(Turn(role="user", text=marks + text),), images=tuple(images))

    @classmethod
    def first_of(cls, sample: Sample) -> Ask:
        """The turns of `sample` up to the first answer, with the pictures that they mention."""
        first = next(i for i, turn in enumerate(sample.turns) if turn.role == "assistant")
        turns = sample.turns[:first]
        return cls(turns=turns, images=sample.images[: sum(turn.text.count(IMAGE_MARK) for turn in turns)])


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """An `Ask` as the model reads it."""

    ask: Ask
    images: tuple[Image, ...]
    encoded: Encoded


@runtime_checkable
class Decoder(Protocol):
    """How tokens are chosen."""

    @property
    def spec(self) -> str:
        """Name and options: what a result depends on."""
        ...

    def __call__(
        self, vlm: VLM, encoder: Encoder, prompts: Sequence[Prompt], max_new_tokens: int
    ) -> Int64[Tensor, "B new"]:
        """New tokens for each prompt, padded on the right after an end of turn."""
        ...


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """The most likely token."""

    @property
    def spec(self) -> str:
        return "greedy"

    def __call__(
        self, vlm: VLM, encoder: Encoder, prompts: Sequence[Prompt], max_new_tokens: int
    ) -> Int64[Tensor, "B new"]:
        return generated(vlm, prompts, max_new_tokens)


GREEDY = Greedy()


def generated(
    vlm: VLM,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    *,
    contrast: LogitsProcessor | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Int64[Tensor, "B new"]:
    """New tokens by transformers' own loop and cache: the most likely, or drawn where the temperature is above 0.

    What a model's generation settings say about penalties and sampling is overruled: a protocol says how is decoded.
    What is drawn depends on the seed and the prompts, not on what was drawn before.
    """
    inputs = left_batch(vlm, [prompt.encoded for prompt in prompts])
    chosen: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        chosen = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(devices=[vlm.device] if vlm.device.type == "cuda" else []):
        torch.manual_seed(batch_seed(seed, prompts))
        output = vlm.model.generate(
            **inputs,
            **chosen,
            max_new_tokens=max_new_tokens,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=pad_id(vlm),
            eos_token_id=end_ids(vlm),
            logits_processor=LogitsProcessorList([] if contrast is None else [contrast]),
        )
    new: Tensor = output[:, inputs["input_ids"].shape[1] :]
    return new


def left_batch(vlm: VLM, prompts: Sequence[Encoded]) -> dict[str, Any]:
    """What the model takes for prompts side by side, padded on the left: where it is, and in its precision."""
    inputs = pad_batch(prompts, pad_id(vlm), side="left").inputs
    return {name: placed(value, vlm.model) for name, value in inputs.items()}


def batch_seed(seed: int, prompts: Sequence[Prompt]) -> int:
    """A seed for everything random about these prompts, whenever they are answered."""
    digest = hashlib.blake2b(str(seed).encode(), digest_size=7)
    for prompt in prompts:
        digest.update(prompt.encoded.input_ids.tobytes())
    return int.from_bytes(digest.digest(), "little")


def pad_id(vlm: VLM) -> int:
    return 0 if vlm.tokenizer.pad_token_id is None else int(vlm.tokenizer.pad_token_id)


def end_ids(vlm: VLM) -> list[int]:
    """Tokens after which an answer is over: the model's own, the tokenizer's end of text, the template's end of turn.

    Models are tuned to write the last whatever their settings say: those of a base model know its end of text alone.
    """
    known = vlm.model.generation_config.eos_token_id
    ids = known if isinstance(known, list) else [known]
    try:
        turn = end_of_turn(vlm.processor, vlm.image_token_id)
    except (ModelError, EncodingError):  # a chat template that writes no conversation; another is used in its place
        turn = None
    return sorted({int(token) for token in (*ids, vlm.tokenizer.eos_token_id, turn) if token is not None})


def answers(
    vlm: VLM,
    encoder: Encoder,
    asks: Sequence[Ask],
    *,
    max_new_tokens: int,
    batch_size: int,
    decoder: Decoder = GREEDY,
    known: Collection[int] = (),
    description: str = "answering",
) -> Iterator[list[tuple[int, str]]]:
    """(position in `asks`, answer) of one batch after the other; batches that are `known` as a whole are left out.

    Raises ImageError or EncodingError for what cannot be asked: evaluation leaves nothing out. Raises ModelError if a
    single prompt is too large for the device's memory.
    """
    order = sorted(range(len(asks)), key=lambda i: (len(asks[i].images), sum(len(t.text) for t in asks[i].turns), i))
    known = frozenset(known)
    with tqdm(total=len(asks), initial=len(known), desc=description, unit="answer", mininterval=0.5) as progress:
        for window in _cut(order, batch_size * WINDOW):
            if all(i in known for i in window):
                continue
            prompts = {i: _prepared(encoder, asks[i]) for i in window}
            for batch in _batches(prompts, batch_size):
                if all(i in known for i in batch):
                    continue
                texts = _decoded(vlm, encoder, [prompts[i] for i in batch], max_new_tokens, decoder)
                yield list(zip(batch, texts, strict=True))
                progress.update(sum(i not in known for i in batch))


def generate_answers(
    vlm: VLM,
    encoder: Encoder,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    description: str = "answering",
) -> list[str]:
    """The model's greedy answer to the first question of each sample, in their order. Raises as `answers`."""
    asks = [Ask.first_of(sample) for sample in samples]
    batches = answers(vlm, encoder, asks, max_new_tokens=max_new_tokens, batch_size=batch_size, description=description)
    found = dict(itertools.chain.from_iterable(batches))
    return [found[i] for i in range(len(samples))]


def _cut(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (order[start : start + size] for start in range(0, len(order), size))


def _prepared(encoder: Encoder, ask: Ask) -> Prompt:
    images = tuple(image.open() for image in ask.images)
    return Prompt(ask=ask, images=images, encoded=encoder.prompt(ask.turns, images))


def _batches(prompts: Mapping[int, Prompt], size: int) -> Iterator[Sequence[int]]:
    """Prompts that can go side by side, the longest first: if memory is too small, it shows at once."""

    def kind(i: int) -> str:
        return repr(signature(prompts[i].encoded))

    order = sorted(prompts, key=lambda i: (kind(i), -len(prompts[i].encoded.input_ids), i))
    for _, alike in itertools.groupby(order, key=kind):
        yield from _cut(list(alike), size)


@torch.inference_mode()
def _decoded(vlm: VLM, encoder: Encoder, prompts: Sequence[Prompt], max_new_tokens: int, decoder: Decoder) -> list[str]:
    try:
        with computing_with(n_threads(vlm)):
            new = decoder(vlm, encoder, prompts, max_new_tokens)
    except torch.OutOfMemoryError as error:
        if len(prompts) == 1:
            size = len(prompts[0].encoded.input_ids)
            raise ModelError(f"out of memory on {vlm.device} with one prompt of {size} tokens") from error
    else:
        ends = set(end_ids(vlm))
        return [_text(vlm, row, ends) for row in new.tolist()]
    torch.cuda.empty_cache()
    half = len(prompts) // 2
    halves = (prompts[:half], prompts[half:])
    return [text for part in halves for text in _decoded(vlm, encoder, part, max_new_tokens, decoder)]


def _text(vlm: VLM, ids: Sequence[int], ends: Collection[int]) -> str:
    """What stands before the end of the turn; after it there is padding, which may be a token like any other."""
    said = itertools.takewhile(lambda token: token not in ends, ids)
    return str(vlm.tokenizer.decode(list(said), skip_special_tokens=True)).strip()
