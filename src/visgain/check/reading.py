"""Some rows as the model would read them, and what their labels say when they are decoded again.

Nothing here trusts the encoder's own account: answers are looked for in the decoded text of each run of supervised
tokens, truncation is found by encoding without a limit, cropping by changing one strip of a picture after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from PIL.Image import Image
from tqdm import tqdm

from visgain.check.scan import Outline, Scan
from visgain.data import Dataset
from visgain.errors import EncodingError, ImageError, VisgainError
from visgain.types import IMAGE_MARK, Encoded, Sample, Skipped, Turn
from visgain.vlm.encode import Encoder
from visgain.vlm.load import VLM
from visgain.vlm.template import make_encoder

UNCUT = 1 << 30
"""A maximal length that cuts nothing."""

STRIPS = 24
"""Strips of a test picture that are changed one after the other, to see which of them the model sees."""


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """One run of supervised tokens, decoded. `answer` is the one that should stand in it, None if there is none."""

    start: int
    stop: int
    before: str  # text in front of the answer, or the whole text if the answer is not in it
    after: str  # text behind the answer: the end of the turn
    n_before: int  # whole tokens in `before` that are not blank
    answer: str | None
    found: bool


@dataclass(frozen=True, kw_only=True)
class Read:
    """A row as `score` would read it. `reason`: why it would be skipped; `crash`: what would end the run."""

    sample: Sample
    sizes: tuple[tuple[int, int], ...] = ()  # width, height of its pictures
    whole: Encoded | None = None  # without a limit on its length
    cut: Encoded | None = None  # with --max-length
    runs: tuple[Supervised, ...] = ()  # of `whole`
    reason: str = ""
    crash: str = ""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the template makes of a conversation that holds no special text and one plain picture."""

    encoded: Encoded | None = None
    text: str = ""  # decoded, the picture's tokens left out
    ends: tuple[str, ...] = ()  # supervised text behind each answer
    own_text: str = ""  # what the processor's own chat template writes for the same conversation; "" without one
    adds_bos: bool = False  # whether the tokenizer puts BOS in front of a text that begins with it
    visible: float = 1.0  # share of a picture twice as long as high that the model sees
    crash: str = ""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The sampled rows with the model that reads them."""

    vlm: VLM
    encoder: Encoder
    max_length: int
    scan: Scan
    rows: Sequence[Read]
    probe: Probe

    @property
    def tokenizer(self) -> Any:
        return self.vlm.tokenizer

    @property
    def readable(self) -> list[Read]:
        """Rows that become tokens."""
        return [read for read in self.rows if read.whole is not None]

    def is_image(self, encoded: Encoded) -> np.ndarray:
        """Bool [T]: which tokens stand for a piece of a picture."""
        mask: np.ndarray = encoded.input_ids == self.vlm.image_token_id
        return mask


# ---------------------------------------------------------------- which rows


def sample_rows(scan: Scan, n: int) -> list[int]:
    """About `n` rows: spread evenly over the file, every source and every number of pictures in proportion, at least
    one of each where `n` allows; and the longest row of all. The same for the same dataset.
    """
    strata: dict[tuple[str, int], list[Outline]] = {}
    for one in scan.rows:
        strata.setdefault((one.source, len(one.images)), []).append(one)
    largest_first = sorted(strata.values(), key=len, reverse=True)[:n]
    total = sum(map(len, largest_first))
    chosen: set[int] = set()
    for stratum in largest_first:
        quota = min(len(stratum), max(1, round(n * len(stratum) / total)))
        chosen |= {stratum[int((k + 0.5) * len(stratum) / quota)].row for k in range(quota)}
    if scan.rows:
        chosen.add(max(scan.rows, key=lambda one: (one.text, -one.row)).row)
    return sorted(chosen)


# ---------------------------------------------------------------- reading them


def read(vlm: VLM, dataset: Dataset, scan: Scan, rows: Sequence[int], template: str, max_length: int | None) -> Reading:
    """`rows` of `dataset` in `template`. Raises VisgainError if the model has no such template."""
    encoder = make_encoder(vlm, template, max_length)
    uncut = make_encoder(vlm, template, UNCUT)
    samples = [sample for row in rows if not isinstance(sample := dataset[row], Skipped)]
    bar = tqdm(samples, desc="reading", unit="row", mininterval=0.5, leave=False)
    return Reading(
        vlm=vlm,
        encoder=encoder,
        max_length=encoder.max_length,
        scan=scan,
        rows=[_read(encoder, uncut, vlm.tokenizer, sample) for sample in bar],
        probe=probe(vlm, uncut),
    )


def _read(encoder: Encoder, uncut: Encoder, tokenizer: Any, sample: Sample) -> Read:
    whole: Encoded | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    try:
        images = [image.open() for image in sample.images]
        sizes = tuple(image.size for image in images)
        whole = uncut.encode(sample, images)
        cut = whole if len(whole.input_ids) <= encoder.max_length else encoder.encode(sample, images)
    except (EncodingError, ImageError) as error:
        runs = () if whole is None else supervised(tokenizer, whole, sample.answers)
        return Read(sample=sample, sizes=sizes, whole=whole, runs=runs, reason=str(error))
    except Exception as error:  # templates and processors are other people's programs
        return Read(sample=sample, sizes=sizes, whole=whole, crash=told(error))
    runs = supervised(tokenizer, whole, sample.answers)
    return Read(sample=sample, sizes=sizes, whole=whole, cut=cut, runs=runs)


def told(error: BaseException) -> str:
    """An error in one line, with its type if it is none of ours."""
    line = (str(error).strip().splitlines() or [""])[0]
    return line if isinstance(error, VisgainError) else f"{type(error).__name__}: {line}"


# ---------------------------------------------------------------- labels


def decode(tokenizer: Any, ids: np.ndarray) -> str:
    text: str = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def supervised(tokenizer: Any, encoded: Encoded, answers: Sequence[str]) -> tuple[Supervised, ...]:
    """Every run of supervised tokens, with the answer that should be in it: the k-th run has the k-th answer.

    An empty answer has a run of its own only if its end is supervised.
    """
    bounds = np.flatnonzero(np.diff(np.concatenate([[False], encoded.is_answer, [False]]).astype(np.int8)))
    spans = list(zip(bounds[::2].tolist(), bounds[1::2].tolist(), strict=True))
    worded = [answer for answer in answers if answer.strip()]
    answers = worded if len(spans) == len(worded) else answers
    found = []
    for number, (start, stop) in enumerate(spans):
        answer = answers[number] if number < len(answers) else None
        ids = encoded.input_ids[start:stop]
        found.append(_compared(tokenizer, ids, answer, start=start, stop=stop))
    return tuple(found)


def _compared(tokenizer: Any, ids: np.ndarray, answer: str | None, *, start: int, stop: int) -> Supervised:
    text = decode(tokenizer, ids)
    place = -1 if answer is None else text.find(answer.strip())
    before = text[:place] if place >= 0 else text
    after = text[place + len((answer or "").strip()) :] if place >= 0 else ""
    return Supervised(
        start=start,
        stop=stop,
        before=before,
        after=after,
        n_before=_tokens_within(tokenizer, ids, before) if place > 0 and before.strip() else 0,
        answer=answer,
        found=place >= 0,
    )


def _tokens_within(tokenizer: Any, ids: np.ndarray, text: str) -> int:
    """How many of the first of `ids` lie wholly in `text`, their beginning. A token may join the prompt's last sign to
    the answer's first.
    """
    n = 0
    while n < len(ids) and len(decode(tokenizer, ids[: n + 1]).rstrip()) <= len(text.rstrip()):
        n += 1
    return n


def pieces(tokenizer: Any, encoded: Encoded, is_image: np.ndarray, cut: int) -> Iterator[tuple[str, str, int]]:
    """(kind, text, tokens) of `encoded` from left to right; kind is "image", "answer" or "prompt". `cut` is a border.

    Each text is what its tokens add to the decoded text before them: many tokenizers write the space between two words
    only where there are two.
    """
    kinds = np.where(is_image, 2, encoded.is_answer.astype(np.int64))
    cuts = sorted({0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), min(cut, len(kinds)), len(kinds)})
    text_ids = np.where(is_image, -1, encoded.input_ids)
    written = ""
    for start, stop in pairwise(cuts):
        kind = ("prompt", "answer", "image")[int(kinds[start])]
        if kind == "image":
            yield kind, "", stop - start
            continue
        so_far = text_ids[:stop]
        text = decode(tokenizer, so_far[so_far >= 0])
        yield kind, text[len(written) :], stop - start
        written = text


# ---------------------------------------------------------------- the template alone

TURNS = (
    Turn(role="user", text=f"{IMAGE_MARK}\nzero"),
    Turn(role="assistant", text="one"),
    Turn(role="user", text="two"),
    Turn(role="assistant", text="three"),
)


def probe(vlm: VLM, uncut: Encoder) -> Probe:
    """What `uncut` makes of a plain conversation, of one turn where the template takes no more."""
    turns = TURNS[:2] if uncut.name.endswith("-align") else TURNS
    sample = Sample(row=0, id="probe", turns=turns)
    picture = _stripes(None)
    own = _own_text(vlm, turns)
    try:
        encoded = uncut.encode(sample, [picture])
        return Probe(
            encoded=encoded,
            text=decode(vlm.tokenizer, encoded.input_ids[encoded.input_ids != vlm.image_token_id]),
            ends=tuple(run.after for run in supervised(vlm.tokenizer, encoded, sample.answers)),
            own_text=own,
            adds_bos=_adds_bos(vlm.tokenizer, own),
            visible=_visible(uncut, sample),
        )
    except Exception as error:  # as for the rows
        return Probe(own_text=own, adds_bos=_adds_bos(vlm.tokenizer, own), crash=told(error))


def _own_text(vlm: VLM, turns: Sequence[Turn]) -> str:
    """What the processor's own chat template writes, if it has one that works."""
    if not getattr(vlm.processor, "chat_template", None):
        return ""
    messages = [
        {
            "role": turn.role,
            "content": [{"type": "image"}] * turn.text.count(IMAGE_MARK)
            + [{"type": "text", "text": turn.text.replace(f"{IMAGE_MARK}\n", "")}],
        }
        for turn in turns
    ]
    try:
        return str(vlm.processor.apply_chat_template(messages, tokenize=False))
    except Exception:  # told by whoever uses it
        return ""


def _adds_bos(tokenizer: Any, text: str) -> bool:
    bos = tokenizer.bos_token
    return bool(bos) and text.startswith(bos) and tokenizer(text)["input_ids"][:2] == [tokenizer.bos_token_id] * 2


def _stripes(white: int | None) -> Image:
    """A grey picture twice as long as high, one of its strips white."""
    picture = PILImage.new("RGB", (16 * STRIPS, 8 * STRIPS), (90, 100, 110))
    if white is not None:
        picture.paste((255, 255, 255), (16 * white, 0, 16 * (white + 1), 8 * STRIPS))
    return picture


def _visible(encoder: Encoder, sample: Sample) -> float:
    """The share of a long picture that the model sees: of strips that change anything in its inputs when they change.

    Where some do not, two more lie across the border, and are counted as beyond it.
    """
    plain = encoder.encode(sample, [_stripes(None)]).model_inputs
    n = sum(_differ(plain, encoder.encode(sample, [_stripes(k)]).model_inputs) for k in range(STRIPS))
    return 1.0 if n == STRIPS else max(0, n - 2) / STRIPS


def _differ(one: Any, other: Any) -> bool:
    tensors = [name for name, value in one.items() if isinstance(value, torch.Tensor)]
    return any(one[name].shape != other[name].shape or not torch.equal(one[name], other[name]) for name in tensors)
