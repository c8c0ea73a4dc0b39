"""From rows to what the model takes, in worker processes: reading, decoding, blurring, preparing, tokenising.

What comes back from a worker is a unit of the plan: its conversations grouped by what their pictures really show, each
distinct picture decoded and prepared once, seen and blind; and the records of the rows that need no model.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset

from visgain.counterfactuals import Condition, Counterfactual, Drop
from visgain.data import Dataset
from visgain.errors import EncodingError, ImageError, ModelError, VisgainError
from visgain.scoring.unit import Change, Unit, taken_alike
from visgain.types import IMAGE_MARK, Encoded, ImageRef, Sample, Skipped, TokenScores, Turn
from visgain.vlm.encode import PER_TOKEN_INPUTS, Encoder, without_end_of_turn

_NONE = np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Fed:
    """A unit of the plan, ready for the model. `records[i][k]` is the record to be of `units[i].rows[k]`."""

    part: int
    units: Sequence[Unit]
    records: Sequence[Sequence[TokenScores]]
    done: Sequence[TokenScores | Skipped]  # text-only and skipped rows


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A decoded picture with a hash of its pixels."""

    image: Image
    digest: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """A conversation as the model reads it, and, where it is to be scored so, without its pictures."""

    sample: Sample
    encoded: Encoded
    dropped: Encoded | None = None


@dataclass(frozen=True, kw_only=True)
class Feed(MapDataset[Fed]):
    """(part, rows of a unit) -> Fed. Picklable if its members are, and knows nothing of the model's weights."""

    dataset: Dataset
    encoder: Encoder
    counterfactual: Condition
    seed: int
    end_of_turn: str = "score"
    per_image: bool = False  # whether each of several pictures is also blinded on its own

    def __getitem__(self, item: tuple[int, Sequence[int]]) -> Fed:
        part, rows = item
        done: list[TokenScores | Skipped] = []
        groups: dict[tuple[str, ...], list[tuple[Sample, list[Picture]]]] = {}
        decoded: dict[str, Picture] = {}
        for number in rows:
            sample = self.dataset[number]
            if isinstance(sample, Skipped):
                done.append(sample)
                continue
            try:
                pictures = [_decode(image, decoded) for image in sample.images]
            except ImageError as error:
                done.append(skipped(sample, str(error)))
                continue
            groups.setdefault(tuple(picture.digest for picture in pictures), []).append((sample, pictures))
        units, records = [], []
        for group in groups.values():
            samples, pictures = [sample for sample, _ in group], group[0][1]
            encoded, unreadable = self._encoded(samples, pictures)
            done += unreadable
            if not pictures:
                done += map(_record, encoded)
                continue
            for alike in _grouped(encoded):
                try:
                    units.append(self._unit(alike, pictures))
                except EncodingError as error:
                    done += [skipped(row.sample, str(error)) for row in alike]
                else:
                    records.append(list(map(_record, alike)))
        return Fed(part=part, units=units, records=records, done=done)

    def require_blind(self) -> None:
        """Raises ModelError if no conversation at all can be read without a picture, and pictures are to be dropped."""
        if not isinstance(self.counterfactual, Drop):
            return
        turns = (Turn(role="user", text="What is this?"), Turn(role="assistant", text="A dog."))
        [read] = self.encoder.encode_all([Sample(row=0, id="0", turns=turns)], [])
        if isinstance(read, EncodingError):
            raise ModelError(f"a conversation without pictures cannot be read ({read}); use another --counterfactual")

    def _encoded(self, samples: Sequence[Sample], pictures: Sequence[Picture]) -> tuple[list[Row], list[Skipped]]:
        """Conversations about the same pictures, and those that cannot be encoded."""
        rows: list[Row] = []
        unreadable: list[Skipped] = []
        images = [picture.image for picture in pictures]
        for sample, encoded in zip(samples, self.encoder.encode_all(samples, images), strict=True):
            try:
                rows.append(self._row(sample, self._cut(encoded)))
            except EncodingError as error:
                unreadable.append(skipped(sample, str(error)))
        return rows, unreadable

    def _row(self, sample: Sample, encoded: Encoded) -> Row:
        """Raises EncodingError if the sample is to be scored without its pictures and cannot be."""
        if not (isinstance(self.counterfactual, Drop) and sample.images):
            return Row(sample=sample, encoded=encoded)
        bare = replace(sample, images=(), turns=tuple(map(_without_marks, sample.turns)))
        dropped = self._cut(self.encoder.encode_all([bare], [])[0])
        # Without the image tokens, more of an answer may fit into the longest sequence.
        dropped = _first_answers(dropped, len(encoded.turn)) if encoded.truncated else dropped
        _require_same_answers(dropped, encoded)
        return Row(sample=sample, encoded=encoded, dropped=dropped)

    def _unit(self, rows: Sequence[Row], pictures: Sequence[Picture]) -> Unit:
        """`rows` with a blind side. Raises EncodingError if the counterfactual cannot stand where the pictures do."""
        encoded = [row.encoded for row in rows]
        if isinstance(self.counterfactual, Drop):
            return Unit.dropped(encoded, [row.dropped for row in rows if row.dropped is not None])
        if not isinstance(self.counterfactual, Counterfactual):
            return Unit.masked(encoded)
        seen, blind = [picture.image for picture in pictures], self._blind(pictures, self.counterfactual)
        # With one picture it is the blind side once more.
        alone = range(len(pictures)) if self.per_image and len(pictures) > 1 else ()
        return Unit.of(
            encoded,
            self._inputs(rows[0], blind),
            [self._inputs(rows[0], [*seen[:k], blind[k], *seen[k + 1 :]]) for k in alone],
        )

    def _inputs(self, row: Row, images: Sequence[Image]) -> Mapping[str, Any]:
        """The model inputs of `row` with other pictures. Raises EncodingError if these take other tokens."""
        other = self._cut(self.encoder.encode_all([row.sample], images)[0])
        if not np.array_equal(other.input_ids, row.encoded.input_ids):
            raise EncodingError("the counterfactual changed the number of image tokens")
        return other.model_inputs

    def _cut(self, encoded: Encoded | EncodingError) -> Encoded:
        if isinstance(encoded, EncodingError):
            raise encoded
        return without_end_of_turn(encoded) if self.end_of_turn == "ignore" else encoded

    def _blind(self, pictures: Sequence[Picture], counterfactual: Counterfactual) -> list[Image]:
        # Seeded by what a picture shows: it has the same counterfactual wherever it appears, so that conversations
        # about it can share the blind picture too, and no order, other row or resumption changes what is drawn.
        shown = {picture.digest for picture in pictures}
        return [
            counterfactual(
                picture.image,
                rng=np.random.default_rng([self.seed, int(picture.digest, 16)]),
                other=lambda picture=picture: self._other(picture, shown),  # type: ignore[misc]
            )
            for picture in pictures
        ]

    def _other(self, picture: Picture, shown: Set[str]) -> Image:
        """A picture to stand for `picture`, from a row drawn at random, that shows nothing of what is `shown`.

        None of the conversation's other pictures either, which would go on telling what it is asked about.
        Raises EncodingError if none is found.
        """
        rng = np.random.default_rng([self.seed, int(picture.digest, 16)])
        for _ in range(1000):
            other = self.dataset[int(rng.integers(len(self.dataset)))]
            if isinstance(other, Skipped) or not other.images:
                continue
            try:
                found = _decode(other.images[0], {})
            except ImageError:
                continue
            if found.digest not in shown:
                return found.image
        raise EncodingError("the dataset holds no other picture to swap in")


def _grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows about the same pictures, together where the model takes the pictures alike."""
    groups: list[list[Row]] = []
    for row in rows:
        group = next((group for group in groups if taken_alike(group[0].encoded, row.encoded)), None)
        if group is None:
            groups.append([row])
        else:
            group.append(row)
    return groups


def _decode(image: ImageRef, decoded: dict[str, Picture]) -> Picture:
    if image.key not in decoded:
        opened = image.open()
        digest = hashlib.blake2b(f"{opened.size}".encode() + opened.tobytes(), digest_size=8)
        decoded[image.key] = Picture(image=opened, digest=digest.hexdigest())
    return decoded[image.key]


def _without_marks(turn: Turn) -> Turn:
    """A turn without its pictures. A line break beside one goes with it, but one stays between two texts."""
    text = re.sub(rf"(\n?){IMAGE_MARK}(\n?)", lambda found: "\n" if found[1] and found[2] else "", turn.text)
    return replace(turn, text=text) if turn.role == "user" else turn


def _first_answers(encoded: Encoded, n: int) -> Encoded:
    """`encoded` up to its `n`-th answer token, if it has more."""
    if len(encoded.turn) <= n:
        return encoded
    size = int(encoded.is_answer.nonzero()[0][n - 1]) + 1
    own = {name: value[:, :size] for name, value in encoded.model_inputs.items() if name in PER_TOKEN_INPUTS}
    return replace(
        encoded,
        input_ids=encoded.input_ids[:size],
        is_answer=encoded.is_answer[:size],
        turn=encoded.turn[:n],
        chars=encoded.chars[:n],
        model_inputs={**encoded.model_inputs, **own},
    )


def _require_same_answers(dropped: Encoded, seen: Encoded) -> None:
    """Raises EncodingError unless both are scored on the same answer tokens, one by one."""
    if dropped.is_answer[0]:
        raise EncodingError("without its picture nothing stands before the answer, so its first token has no score")
    size = min(len(dropped.token_id), len(seen.token_id))
    pairs = ((dropped.token_id, seen.token_id), (dropped.turn, seen.turn), (dropped.chars, seen.chars))
    for one, other in pairs:
        differs = (one[:size] != other[:size]).reshape(size, -1).any(axis=1)
        if differs.any() or len(one) != len(other):
            place = int(differs.argmax()) if differs.any() else size
            raise EncodingError(f"without its picture the answer is other tokens, from token {place} on")


def _record(row: Row) -> TokenScores:
    """The record of a row before it is measured."""
    sample, encoded = row.sample, row.encoded
    return TokenScores(
        row=sample.row,
        id=sample.id,
        fingerprint=sample.fingerprint,
        source=sample.source,
        n_images=len(sample.images),
        n_image_tokens=encoded.n_image_tokens,
        n_prompt_tokens=encoded.n_prompt_tokens,
        truncated=encoded.truncated,
        token_id=encoded.token_id.astype(np.int32),
        turn=encoded.turn,
        chars=encoded.chars,
        nll_seen=_NONE,
        nll_blind=_NONE,
    )


def skipped(sample: Sample | TokenScores, reason: str) -> Skipped:
    """`sample` as a row that cannot be scored."""
    return Skipped(
        row=sample.row,
        id=sample.id,
        reason=reason,
        source=sample.source,
        fingerprint=sample.fingerprint,
        n_images=len(sample.images) if isinstance(sample, Sample) else sample.n_images,
    )


# ---------------------------------------------------------------- worker processes


def feed(source: Feed, items: Iterable[tuple[int, Sequence[int]]], workers: int) -> Iterator[Fed]:
    """`source` of each of `items`, in order, prepared ahead by `workers` processes (0: by this one, when asked for).

    `items` is read as the workers take them up, so it may decide late.
    """
    if workers == 0:
        yield from map(source.__getitem__, items)
        return
    loader = DataLoader(
        _Thin(source),
        sampler=items,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=8,
        collate_fn=_same,
        worker_init_fn=_start_worker,
        # A dataset in memory is shared by a fork and copied by anything else.
        multiprocessing_context="fork" if sys.platform == "linux" else None,
    )
    for thin in loader:
        yield _converted(thin, np.ndarray, torch.from_numpy)


@contextmanager
def deaths_told() -> Iterator[None]:
    """Turn PyTorch's error about a worker that died into one line. It comes wherever its parent happens to be."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise VisgainError(
            "a process that prepares rows died, perhaps for want of memory; the same command resumes, "
            "with fewer --workers if need be"
        ) from error


class _Thin(MapDataset[Fed]):
    """A feed whose tensors are arrays: they travel through a pipe, and need no shared memory, which is often scarce."""

    def __init__(self, source: Feed) -> None:
        self.source = source

    def __getitem__(self, item: tuple[int, Sequence[int]]) -> Fed:
        return _converted(self.source[item], torch.Tensor, torch.Tensor.numpy)


def _converted(fed: Fed, kind: type, convert: Callable[[Any], Any]) -> Fed:
    """`fed` with those model inputs that are of `kind` converted."""

    def one(value: Any) -> Any:
        if isinstance(value, Change):
            return replace(value, values=convert(value.values))
        return convert(value) if isinstance(value, kind) else value

    def each(inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: one(value) for name, value in inputs.items()}

    units = [
        replace(
            unit,
            rows=[replace(row, model_inputs=each(row.model_inputs)) for row in unit.rows],
            seen=each(unit.seen),
            blind=each(unit.blind),
            blind_to=[each(changes) for changes in unit.blind_to],
            blind_rows=[replace(row, model_inputs=each(row.model_inputs)) for row in unit.blind_rows],
        )
        for unit in fed.units
    ]
    return replace(fed, units=units)


def _same(item: Any) -> Any:
    return item


def _start_worker(number: int) -> None:
    # An interruption is told to the process that the user started; it ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this worker when its parent was killed: it would wait for ever, and hold the parent's locks."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
