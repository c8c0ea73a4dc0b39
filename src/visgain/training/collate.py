"""Selected rows of a dataset as training batches: vanilla batches, with -100 on every token that is not active."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset as TorchDataset

from visgain.data import Dataset
from visgain.errors import DataError, EncodingError, ImageError
from visgain.storage import read_selection_table
from visgain.types import Encoded, Sample, Skipped
from visgain.vlm.batch import pad_batch
from visgain.vlm.encode import Encoder, without_end_of_turn

IGNORED = -100
"""The label that carries no loss."""


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """An encoded sample and which of its answer tokens are active: bool [A]."""

    encoded: Encoded
    active: np.ndarray


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
        return TrainingRow(encoded=encoded, active=np.ones(len(encoded.turn), dtype=bool))

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
        chosen = self.selection.slice(index, 1).to_pylist()[0]
        sample = self._sample(index)
        if sample.fingerprint != chosen["fingerprint"]:
            raise DataError(f"row {sample.row} changed since it was scored; score and select again")
        encoded = self._encode(sample)
        if self.end_of_turn == "ignore":
            encoded = without_end_of_turn(encoded)
        return TrainingRow(encoded=encoded, active=_join(encoded, chosen, sample.row))


def _join(encoded: Encoded, chosen: dict[str, Any], row: int) -> np.ndarray:
    """Keep mask of the encoded answer tokens. A sequence cut shorter now keeps the mask of what is left."""
    token_id, keep = np.asarray(chosen["token_id"]), np.asarray(chosen["keep"], dtype=bool)
    length = len(encoded.turn)
    same = min(length, len(token_id))
    if not np.array_equal(encoded.token_id[:same], token_id[:same]) or (length != same and not encoded.truncated):
        raise DataError(
            f"row {row}: answer tokens differ from those that were scored; train with the tokenizer, the --template "
            "and the --max-length of the scores"
        )
    return np.pad(keep[:same], (0, length - same))


def open_rows(dataset: Dataset, encoder: Encoder, selection: Path | None, *, end_of_turn: str) -> Rows:
    """The rows to train on: those of the selection, or all that can be read."""
    if selection is None:
        readable = [row for row in range(len(dataset)) if not isinstance(dataset[row], Skipped)]
        if not readable:
            raise DataError(f"no row of {dataset.path} can be trained on")
        return Rows(dataset, encoder, readable)
    table = read_selection_table(selection)
    if len(table) == 0:
        raise DataError(f"{selection} keeps no rows; select with a larger --keep")
    return SelectedRows(dataset, encoder, table, end_of_turn=end_of_turn)


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
