"""All rows of a run without their tokens, beside what a selection left of them: a window of rows at a time.

Scores and selection may hold their rows in any order. Both are set aside by windows of rows and joined window by
window, so memory grows neither with the rows nor with the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float64, Int32, Int64

from visgain.errors import DataError, StorageError
from visgain.rules import sum_by_row
from visgain.scored import UNNAMED
from visgain.spill import Spill, window
from visgain.storage import flat_values, list_lengths, read_json, scan_scores, scan_selection


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some rows of the dataset, in row order."""

    row: Int64[np.ndarray, " R"]
    fingerprint: Int64[np.ndarray, " R"]
    source: Int32[np.ndarray, " R"]  # index into Overview.sources
    reason: np.ndarray  # str objects [R]; "" where the row was not skipped
    gain: Float64[np.ndarray, " R"]  # nats; nan for text-only and skipped rows
    n_tokens: Int64[np.ndarray, " R"]  # answer tokens
    truncated: Bool[np.ndarray, " R"]
    active: Int64[np.ndarray, " R"]  # tokens that keep their loss; 0 where the row was not kept, or without a selection

    @property
    def scored(self) -> Bool[np.ndarray, " R"]:
        return np.asarray(~np.isnan(self.gain))

    @property
    def skipped(self) -> Bool[np.ndarray, " R"]:
        return np.asarray(self.reason != "", dtype=bool)

    @property
    def text_only(self) -> Bool[np.ndarray, " R"]:
        return np.asarray(~self.scored & ~self.skipped)


@dataclass(frozen=True, kw_only=True)
class Overview:
    """A finished run, and what a selection left of it if there is one. Can be read as often as wanted."""

    sources: tuple[str, ...]
    gains: Spill  # gain in nats and n_tokens of the scored rows, in row order under the index of their source
    record: Mapping[str, Any] | None  # selection.json
    selection: Path | None
    spilled_rows: Spill  # by window
    spilled_kept: Spill  # by window; empty without a selection

    def windows(self, first: int | None = None) -> Iterator[Rows]:
        """All rows in row order, some ten thousand at a time; from the window `first` on if it is given.

        Raises DataError if the selection was not made from these scores.
        """
        for key in sorted({*self.spilled_rows, *self.spilled_kept}):
            if first is None or key >= first:
                yield self._window(key)

    def _window(self, key: int) -> Rows:
        table = self.spilled_rows.read(key).sort_by("row")
        column = {name: table.column(name).to_numpy() for name in ("row", "fingerprint", "source", "gain")}
        n_tokens = table.column("n_tokens").to_numpy().astype(np.int64)
        kept = self.spilled_kept.read(key)
        return Rows(
            **column,
            reason=_objects(table.column("reason")),
            n_tokens=n_tokens,
            truncated=table.column("truncated").to_numpy().astype(bool),
            active=self._active(kept, column["row"], column["fingerprint"], n_tokens),
        )

    def _active(
        self,
        kept: pa.Table,
        row: Int64[np.ndarray, " R"],
        fingerprint: Int64[np.ndarray, " R"],
        n_tokens: Int64[np.ndarray, " R"],
    ) -> Int64[np.ndarray, " R"]:
        """The active tokens of each row. Raises DataError if a kept row is not one of these."""
        selected = kept.column("row").to_numpy()
        place = np.searchsorted(row, selected)
        there = place < len(row)
        place = place[there]
        there[there] = (
            (row[place] == selected[there])
            & (fingerprint[place] == kept.column("fingerprint").to_numpy()[there])
            & (n_tokens[place] == kept.column("n_tokens").to_numpy()[there])
        )
        if not there.all():
            first = selected[~there].min()
            raise DataError(
                f"the selection in {self.selection} was not made from these scores (row {first}); select again"
            )
        active = np.zeros(len(row), np.int64)
        active[place] = kept.column("active").to_numpy()
        return active

    def scored_at(self, places: Int64[np.ndarray, " k"]) -> Int64[np.ndarray, " k"]:
        """The rows at the given places, ascending, among the scored rows in row order."""
        found, before = [np.zeros(0, np.int64)], 0
        for rows in self.windows():
            scored = rows.row[rows.scored]
            found.append(scored[places[(places >= before) & (places < before + len(scored))] - before])
            before += len(scored)
        return np.concatenate(found)

    def scored_after(self, row: int) -> Iterator[int]:
        """Every scored row, from the one that follows `row` to the last and from the first to `row`."""
        for rows in self.windows(first=int(window(np.array([row]))[0])):
            yield from rows.row[rows.scored & (rows.row > row)].tolist()
        for rows in self.windows():
            yield from rows.row[rows.scored & (rows.row <= row)].tolist()


_ROWS = pa.schema(
    {
        "row": pa.int64(),
        "fingerprint": pa.int64(),
        "source": pa.int32(),
        "reason": pa.string(),
        "gain": pa.float64(),
        "n_tokens": pa.int32(),
        "truncated": pa.bool_(),
    }
)
_KEPT = pa.schema({"row": pa.int64(), "fingerprint": pa.int64(), "n_tokens": pa.int32(), "active": pa.int32()})
_GAINS = pa.schema({"gain": pa.float64(), "n_tokens": pa.int32()})


@contextmanager
def open_overview(scores: Path, selection: Path | None, scratch: Path) -> Iterator[Overview]:
    """Read every row of a finished run and of the selection once. `scratch`: a folder on a disk for temporary data.

    Raises StorageError if a gain is not a number, DataError if the selection was not made from these scores.
    """
    record = None if selection is None else read_json(selection / "selection.json", "selection")
    with Spill(scratch, _ROWS) as rows, Spill(scratch, _KEPT) as kept, Spill(scratch, _GAINS) as gains:
        sources = _spill_rows(scores, rows)
        if selection is not None:
            _spill_kept(selection, kept)
        overview = Overview(
            sources=sources, gains=gains, record=record, selection=selection, spilled_rows=rows, spilled_kept=kept
        )
        for some in overview.windows():
            table = pa.table([some.gain[some.scored], some.n_tokens[some.scored]], schema=_GAINS)
            gains.add(table, some.source[some.scored].astype(np.int64))
        yield overview


def _spill_rows(scores: Path, spill: Spill) -> tuple[str, ...]:
    """Set all rows aside by window; returns the sources that their numbers stand for."""
    sources: dict[str, int] = {}
    columns = ["row", "fingerprint", "source", "skip_reason", "gain", "truncated", "token_id"]
    for table in scan_scores(scores, columns, description="reading rows"):
        row, gain = table.column("row").to_numpy(), table.column("gain")
        finite = pc.fill_null(pc.is_finite(gain), True).to_numpy()
        if not finite.all():
            first = row[~finite].min()
            raise StorageError(
                f"{scores}: the gain of row {first} is not a finite number; score again with --dtype float32"
            )
        values = {
            **{name: table.column(name) for name in ("row", "fingerprint", "truncated")},
            "source": _numbered(table.column("source"), sources),
            "reason": pc.fill_null(table.column("skip_reason"), ""),
            "gain": pc.fill_null(gain, float("nan")),
            "n_tokens": list_lengths(table.column("token_id")).astype(np.int32),
        }
        spill.add(pa.table([values[name] for name in _ROWS.names], schema=_ROWS), window(row))
    return tuple(sources)


def _numbered(column: pa.ChunkedArray, sources: dict[str, int]) -> Int32[np.ndarray, " n"]:
    """The number of each row's source; new sources are given the next ones."""
    encoded = pc.dictionary_encode(column.combine_chunks())
    numbers = [sources.setdefault(name or UNNAMED, len(sources)) for name in encoded.dictionary.to_pylist()]
    return np.asarray(np.array(numbers, np.int32)[encoded.indices.to_numpy()])


def _spill_kept(selection: Path, spill: Spill) -> None:
    for table in scan_selection(selection, ["row", "fingerprint", "keep"]):
        length = list_lengths(table.column("keep"))
        active = sum_by_row(flat_values(table.column("keep")).astype(bool), length)
        row = table.column("row").to_numpy()
        columns = [row, table.column("fingerprint"), length.astype(np.int32), active.astype(np.int32)]
        spill.add(pa.table(columns, schema=_KEPT), window(row))


def _objects(texts: pa.ChunkedArray) -> np.ndarray:
    """Texts as str objects; equal texts share one object."""
    encoded = pc.dictionary_encode(texts.combine_chunks())
    return np.asarray(np.array(encoded.dictionary.to_pylist(), dtype=object)[encoded.indices.to_numpy()])
