"""Selected rows of a dataset, encoded, each answer token with the weight of its loss."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float32
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from visgain.data import Dataset
from visgain.errors import DataError, EncodingError, ImageError
from visgain.scoring.claims import Rank
from visgain.storage import read_selection_table
from visgain.types import Encoded, Sample, Skipped
from visgain.vlm.batch import pad_batch
from visgain.vlm.encode import Encoder, without_end_of_turn

IGNORED = -100
"""The label that carries no loss."""

_TOLD = 3
"""How many of the rows that are left out are named."""


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """An encoded sample and how much the loss of each of its answer tokens weighs; 0 is no loss."""

    encoded: Encoded
    weight: Float32[np.ndarray, " A"]

    @property
    def active(self) -> Bool[np.ndarray, " A"]:
        """Which answer tokens carry loss."""
        active: np.ndarray = self.weight > 0
        return active


class Outline(NamedTuple):
    """How large a sample is."""

    n_images: int
    n_chars: int  # of its text


class Rows(TorchDataset[TrainingRow]):
    """The rows to train on, each with its active tokens, encoded when asked for."""

    def __init__(self, dataset: Dataset, encoder: Encoder, rows: Sequence[int]) -> None:
        self.dataset = dataset
        self.encoder = encoder
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TrainingRow:
        encoded = self._encode(self._sample(index))
        return TrainingRow(encoded=encoded, weight=np.ones(len(encoded.turn), np.float32))

    @property
    def n_selected(self) -> int:
        """How many rows, from the first on, are known to be fit to train on."""
        return len(self)

    def outline(self, index: int) -> Outline:
        """The size of a row, without a look at its pictures."""
        sample = self._sample(index)
        return Outline(len(sample.images), sum(len(turn.text) for turn in sample.turns))

    def _sample(self, index: int) -> Sample:
        row = self.rows[index]
        sample = self.dataset[row]
        if isinstance(sample, Skipped):
            raise DataError(f"row {row} cannot be trained on: {sample.reason}; {_MEND}")
        return sample

    def _encode(self, sample: Sample) -> Encoded:
        try:
            return self.encoder.encode(sample, [image.open() for image in sample.images])
        except (ImageError, EncodingError) as error:
            raise DataError(f"row {sample.row} cannot be trained on: {error}; {_MEND}") from error


_MEND = "`visgain score` and `visgain select --by sample --keep 100` leave such rows out and say why"


class SelectedRows(Rows):
    """The rows of a selection. Masks are joined by token id: the k-th answer token must be the k-th that was scored."""

    def __init__(self, dataset: Dataset, encoder: Encoder, selection: pa.Table, *, end_of_turn: str) -> None:
        super().__init__(dataset, encoder, selection.column("row").to_pylist())
        self.selection = selection
        self.end_of_turn = end_of_turn

    def __getitem__(self, index: int) -> TrainingRow:
        return self.as_chosen(index, self.selection.slice(index, 1).to_pylist()[0])

    def as_chosen(self, index: int, chosen: Mapping[str, Any]) -> TrainingRow:
        """The row with the tokens that `chosen`, a line of a selection, keeps of it."""
        sample = self._sample(index)
        if sample.fingerprint != chosen["fingerprint"]:
            raise DataError(f"row {sample.row} changed since it was scored; score and select again")
        encoded = self._encode(sample)
        if self.end_of_turn == "ignore":
            encoded = without_end_of_turn(encoded)
        return TrainingRow(encoded=encoded, weight=_join(encoded, chosen, sample.row))


def _join(encoded: Encoded, chosen: Mapping[str, Any], row: int) -> Float32[np.ndarray, " A"]:
    """Weights of the encoded answer tokens. A sequence cut shorter now keeps those of what is left."""
    token_id, keep = np.asarray(chosen["token_id"]), np.asarray(chosen["keep"], dtype=bool)
    weight = np.asarray(chosen.get("weight", keep), dtype=np.float32)
    length = len(encoded.turn)
    same = min(length, len(token_id))
    if not np.array_equal(encoded.token_id[:same], token_id[:same]) or (length != same and not encoded.truncated):
        raise DataError(
            f"row {row}: answer tokens differ from those that were scored; train with the tokenizer, the --template "
            "and the --max-length of the scores"
        )
    return np.pad(np.where(keep, weight, np.float32(0))[:same], (0, length - same))


def open_rows(dataset: Dataset, encoder: Encoder, selection: Path | None, *, end_of_turn: str) -> Rows:
    """The rows to train on: those of the selection, or all that can be read."""
    if selection is None:
        skipped = {}
        for row in range(len(dataset)):
            if isinstance(sample := dataset[row], Skipped):
                skipped[row] = sample.reason
        _tell_skipped(dataset, skipped)
        return Rows(dataset, encoder, [row for row in range(len(dataset)) if row not in skipped])
    table = read_selection_table(selection)
    if len(table) == 0:
        raise DataError(f"{selection} keeps no rows; select with a larger --keep")
    return SelectedRows(dataset, encoder, table, end_of_turn=end_of_turn)


def _tell_skipped(dataset: Dataset, skipped: Mapping[int, str]) -> None:
    if not skipped:
        return
    some = "; ".join(f"row {row}: {reason}" for row, reason in islice(skipped.items(), _TOLD))
    if len(skipped) == len(dataset):
        raise DataError(f"no row of {dataset.path} can be trained on ({some})")
    if Rank.here().number == 0:
        more = f"; and {len(skipped) - _TOLD:,} more" if len(skipped) > _TOLD else ""
        tqdm.write(
            f"visgain: {len(skipped):,} of {len(dataset):,} rows cannot be trained on and are left out ({some}{more})",
            sys.stderr,
        )


@dataclass(frozen=True)
class Collator:
    """TrainingRows -> model inputs with `labels` [B, T]: the id where the token is active, else -100."""

    pad_id: int

    def __call__(self, rows: Sequence[TrainingRow]) -> dict[str, Any]:
        batch = pad_batch([row.encoded for row in rows], self.pad_id)
        active = torch.zeros_like(batch.is_answer)
        active[batch.is_answer] = torch.from_numpy(np.concatenate([row.active for row in rows]))
        labels = batch.inputs["input_ids"].masked_fill(~active, IGNORED)
        return {**batch.inputs, "labels": labels}
