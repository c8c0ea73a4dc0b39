"""Rows set aside on disk come back by key and in row order, and nothing is left behind."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny_scores import patient
from visgain import spill
from visgain.errors import StorageError
from visgain.spill import Spill, window

SCHEMA = pa.schema({"row": pa.int64(), "text": pa.string(), "list": pa.list_(pa.int32()), "keep": pa.list_(pa.bool_())})


def table_of(rows: list[int]) -> pa.Table:
    lines = [{"row": row, "text": f"é{row}", "list": list(range(row % 5)), "keep": [row % 2 == 0] * 3} for row in rows]
    return pa.Table.from_pylist(lines, schema=SCHEMA)


@pytest.mark.parametrize(
    ("buffer_bytes", "buffer_rows"), [(1, 1 << 20), (200, 1 << 20), (1 << 20, 1 << 20), (1 << 20, 5)]
)
@patient
@given(st.lists(st.lists(st.tuples(st.integers(0, 40), st.integers(-3, 3)), max_size=9), max_size=6))
def test_every_key_gives_back_its_rows_in_the_order_of_adding(
    buffer_bytes: int, buffer_rows: int, added: list[list[tuple[int, int]]]
) -> None:
    expected = defaultdict(list)
    with pytest.MonkeyPatch.context() as patch, Spill(Path(tempfile.gettempdir()), SCHEMA) as held:
        patch.setattr(spill, "BUFFER_BYTES", buffer_bytes)
        patch.setattr(spill, "BUFFER_ROWS", buffer_rows)
        patch.setattr(spill, "_PIECE_ROWS", 4)
        for pairs in added:
            held.add(table_of([row for row, _ in pairs]), np.array([key for _, key in pairs], np.int64))
            for row, key in pairs:
                expected[key].append(row)
        for _ in range(2):
            assert list(held) == sorted(expected)
            for key, rows in expected.items():
                assert held.read(key).equals(table_of(rows))
                chunks = [chunk.tolist() for chunk in held.column("row", [key])]
                assert [row for chunk in chunks for row in chunk] == rows
        in_all = [row for chunk in held.column("row") for row in chunk.tolist()]
        assert in_all == [row for key in sorted(expected) for row in expected[key]]
        assert len(held.read(99)) == 0


@pytest.mark.parametrize("buffer_bytes", [1, 300, 1 << 20])
def test_rows_come_back_sorted_a_window_at_a_time(monkeypatch: pytest.MonkeyPatch, buffer_bytes: int) -> None:
    monkeypatch.setattr(spill, "BUFFER_BYTES", buffer_bytes)
    monkeypatch.setattr(spill, "WINDOW_ROWS", 10)
    rows = np.random.default_rng(0).permutation(95)[:60]
    with Spill(Path(), SCHEMA) as held:
        for some in np.array_split(rows, 7):
            held.add(table_of(some.tolist()), window(some))
        tables = list(held.in_row_order())
    assert pa.concat_tables(tables).equals(table_of(np.sort(rows).tolist()))
    assert [len(np.unique(table.column("row").to_numpy() // 10)) for table in tables] == [1] * 10


def test_rows_may_be_added_after_reading() -> None:
    with Spill(Path(), SCHEMA) as held:
        held.add(table_of([1]), 0)
        assert held.read(0).column("row").to_pylist() == [1]
        held.add(table_of([2]), 0)
        assert held.read(0).column("row").to_pylist() == [1, 2]


@pytest.mark.parametrize(("limit", "value"), [("BUFFER_ROWS", 5), ("BUFFER_BYTES", 100)])
def test_no_more_than_the_buffer_is_held_back(monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    monkeypatch.setattr(spill, limit, value)
    with Spill(Path(), SCHEMA) as held:
        for _ in range(20):
            held.add(table_of([1, 2]), 0)
            assert sum(len(rows) for rows, _ in held._waiting) < 5


def test_rows_added_after_reading_overwrite_nothing() -> None:
    with Spill(Path(), SCHEMA) as held:
        for key in range(4):
            held.add(table_of([key]), key)
        held.read(1)
        held.add(table_of([7]), 7)
        assert [held.read(key).column("row").to_pylist() for key in held] == [[0], [1], [2], [3], [7]]


def test_nothing_is_left_in_the_folder_and_the_folder_need_not_exist(tmp_path: Path) -> None:
    with Spill(tmp_path / "not" / "yet", SCHEMA) as held:
        held.add(table_of([1, 2]), 0)
        list(held)
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_storage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with Spill(Path(), SCHEMA) as held:
        monkeypatch.setattr(held, "_write", full)
        held.add(table_of([1]), 0)
        with pytest.raises(StorageError, match=r"No space left.*free some space"):
            list(held)
