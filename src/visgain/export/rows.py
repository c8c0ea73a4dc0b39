"""The kept rows of a selection, joined to their dataset: what every exporter goes through, once and in row order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int32
from tqdm import tqdm

from visgain.config import ExportConfig
from visgain.data import Dataset
from visgain.errors import DataError
from visgain.scored import open_as_scored, scored_sample
from visgain.storage import flat_values, list_lengths, read_json, scan_selection, selection_schema
from visgain.types import Sample


@dataclass(frozen=True, kw_only=True)
class KeptRow:
    """One row of the selection and the sample that was scored."""

    index: int  # among the kept rows, from 0
    row: int  # in the dataset
    sample: Sample
    token_id: Int32[np.ndarray, " A"]
    keep: Bool[np.ndarray, " A"]
    weight: Float32[np.ndarray, " A"]  # 0 where keep is false; 1 where it is true, unless the selection is soft


@dataclass(frozen=True, kw_only=True)
class Selected:
    """A selection and its dataset. Iterating gives the kept rows; memory does not grow with their number.

    Iterating raises DataError if a row is not what was scored.
    """

    config: ExportConfig
    dataset: Dataset
    record: Mapping[str, Any]  # selection.json
    n_rows: int
    n_tokens: int
    n_active: int
    soft: bool  # whether active tokens have weights other than 1

    @property
    def identity(self) -> Mapping[str, Any]:
        """What was scored, and how: model, template, data_fingerprint, end_of_turn ..."""
        return self.record.get("identity") or {}

    def __len__(self) -> int:
        return self.n_rows

    def __iter__(self) -> Iterator[KeptRow]:
        with tqdm(total=self.n_rows, desc="exporting", unit="row", delay=2, mininterval=0.5) as progress:
            index = 0
            columns = ["row", "fingerprint", "token_id", "keep", *(["weight"] if self.soft else [])]
            for table in scan_selection(self.config.selection, columns):
                for kept in self._rows(table, index):
                    yield kept
                    progress.update()
                index += len(table)

    def _rows(self, table: pa.Table, first: int) -> Iterator[KeptRow]:
        length = list_lengths(table.column("token_id"))
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(length)]).tolist()
        token_id, keep = flat_values(table.column("token_id")), flat_values(table.column("keep")).astype(bool)
        weight = flat_values(table.column("weight")) if self.soft else keep.astype(np.float32)
        heads = zip(table.column("row").to_pylist(), table.column("fingerprint").to_pylist(), strict=True)
        for k, (row, fingerprint) in enumerate(heads):
            here = slice(bounds[k], bounds[k + 1])
            yield KeptRow(
                index=first + k,
                row=row,
                sample=scored_sample(self.dataset, row, fingerprint),
                token_id=token_id[here],
                keep=keep[here],
                weight=weight[here],
            )


def open_selected(config: ExportConfig) -> Selected:
    """The selection of `config` and its dataset, opened as it was scored.

    Raises StorageError without a selection, DataError for an empty one or for another dataset than was scored.
    """
    record = read_json(config.selection / "selection.json", "selection")
    dataset = open_as_scored(config, record.get("identity") or {})
    n_rows = n_tokens = n_active = 0
    for table in scan_selection(config.selection, ["keep"]):
        keep = flat_values(table.column("keep"))
        n_rows, n_tokens, n_active = n_rows + len(table), n_tokens + len(keep), n_active + int(keep.sum())
    if n_rows == 0:
        raise DataError(f"{config.selection} keeps no rows; select with a larger --keep")
    return Selected(
        config=config,
        dataset=dataset,
        record=record,
        n_rows=n_rows,
        n_tokens=n_tokens,
        n_active=n_active,
        soft="weight" in selection_schema(config.selection).names,
    )
