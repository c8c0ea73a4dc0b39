"""The files on disk: whole or not at all, in row order, and with an error that says what to do."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from visgain import storage
from visgain.errors import StorageError
from visgain.storage import SCORE_SCHEMA, SELECTION_SCHEMA
from visgain.types import Skipped, TokenScores


def scored(row: int, n_tokens: int, *, n_images: int = 1) -> TokenScores:
    rng = np.random.default_rng(row)
    starts = 3 * np.arange(n_tokens, dtype=np.int32)
    return TokenScores(
        row=row,
        id=f"id-{row % 3}",  # ids repeat
        fingerprint=row - 2**62,
        source="coco" if n_images else "text",
        n_images=n_images,
        n_image_tokens=9 * n_images,
        n_prompt_tokens=20,
        truncated=row % 2 == 0,
        token_id=rng.integers(0, 100, n_tokens, dtype=np.int32),
        turn=np.zeros(n_tokens, np.int32),
        chars=np.stack([starts, starts + 3], axis=1),
        nll_seen=rng.random(n_tokens * n_images, dtype=np.float32),
        nll_blind=rng.random(n_tokens * n_images, dtype=np.float32),
    )


def records(n: int) -> list[TokenScores | Skipped]:
    made: list[TokenScores | Skipped] = []
    for row in range(n):
        if row % 5 == 3:
            made.append(
                Skipped(row=row, id=str(row), reason="no image \u00e9", source="coco", fingerprint=7, n_images=1)
            )
        else:
            made.append(scored(row, 1 + row % 4, n_images=int(row % 5 != 4)))
    return made


def write_run(folder: Path, rows: list[TokenScores | Skipped], n_parts: int) -> None:
    storage.claim_run(folder, {"model": "m"}, {"n_parts": n_parts})
    for index in range(n_parts):
        storage.write_part(folder, index, n_parts, storage.score_table(rows[index::n_parts]))


# ---------------------------------------------------------------- atomic files


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with storage.atomic_path(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def write_half(path: Path) -> None:
    with storage.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError


def test_a_failure_leaves_neither_the_file_nor_its_temporary(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        write_half(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_file_as_it_was(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "file", 1)
    with pytest.raises(RuntimeError):
        write_half(tmp_path / "file")
    assert storage.read_json(tmp_path / "file", "number") == 1


def test_a_full_disk_asks_for_space_and_says_how_to_go_on(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match=r"No space left.*free some space.*resume"),
        storage.atomic_path(tmp_path / "f"),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_storage_error_about_the_out_option(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot write .*run\.json.*check --out"):
        storage.claim_run(tmp_path / "file", {}, {})


def test_json_without_a_number_is_refused_rather_than_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(tmp_path / "file", float("nan"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("content", "message"), [(None, "holds no scores"), ("{", "cannot read scores from")])
def test_json_that_is_missing_or_damaged_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(StorageError, match=message):
        storage.read_json(tmp_path / "run.json", "scores")


# ---------------------------------------------------------------- run.json


def test_the_same_run_resumes_and_keeps_its_first_record(tmp_path: Path) -> None:
    assert not storage.claim_run(tmp_path, {"model": "m", "sizes": (1, 2)}, {"started": 1})
    assert storage.claim_run(tmp_path, {"model": "m", "sizes": (1, 2)}, {"started": 2})
    assert storage.read_json(tmp_path / "run.json", "run")["started"] == 1


def test_another_run_is_refused_with_exactly_the_keys_that_differ(tmp_path: Path) -> None:
    before = {"model": "m", "data": {"path": "a", "rows": 3}, "seed": 0}
    storage.claim_run(tmp_path, before, {})
    with pytest.raises(StorageError) as caught:
        storage.claim_run(tmp_path, {"model": "m", "data": {"path": "a", "rows": 4}, "dtype": "float32"}, {})
    assert str(caught.value).splitlines()[1:] == [
        "  data.rows: 3 there, 4 now",
        "  dtype: None there, 'float32' now",
        "  seed: 0 there, None now",
    ]


def test_parts_without_a_run_are_not_taken_over(tmp_path: Path) -> None:
    storage.write_part(tmp_path, 0, 1, storage.score_table([scored(0, 2)]))
    with pytest.raises(StorageError, match=r"no run\.json"):
        storage.claim_run(tmp_path, {}, {})


# ---------------------------------------------------------------- scores


def test_a_score_table_gives_back_what_went_in(tmp_path: Path) -> None:
    rows = records(10)
    write_run(tmp_path, rows, 1)
    for record, read in zip(rows, storage.read_scores(tmp_path).to_pylist(), strict=True):
        shared = ["row", "id", "fingerprint", "source", "n_images"]
        assert [read[name] for name in shared] == [getattr(record, name) for name in shared]
        if isinstance(record, Skipped):
            assert read["skip_reason"] == record.reason
            assert read["gain"] is None
            assert read["token_id"] == read["char_end"] == read["nll_seen"] == read["nll_blind"] == []
            continue
        assert read["skip_reason"] is None
        assert read["gain"] == (record.mean_gain if record.n_images else None)
        assert read["truncated"] == record.truncated
        assert [read["char_start"], read["char_end"]] == record.chars.T.tolist()
        for name in ("token_id", "turn", "nll_seen", "nll_blind"):
            assert read[name] == getattr(record, name).tolist()


@pytest.mark.parametrize("n_parts", [1, 2, 7])
@pytest.mark.parametrize("chunk_rows", [1, 4, 1 << 13])
def test_scores_are_read_in_row_order_whatever_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_parts: int, chunk_rows: int
) -> None:
    monkeypatch.setattr(storage, "_CHUNK_ROWS", chunk_rows)
    rows = records(23)
    write_run(tmp_path, rows, n_parts)
    table = storage.read_scores(tmp_path)
    table.validate(full=True)
    assert table.schema.equals(SCORE_SCHEMA)
    assert table.to_pylist() == storage.score_table(rows).to_pylist()


def test_only_the_columns_that_were_asked_for_are_read_in_that_order(tmp_path: Path) -> None:
    rows = records(9)
    write_run(tmp_path, rows, 3)
    table = storage.read_scores(tmp_path, ["nll_seen", "id"])
    assert table.column_names == ["nll_seen", "id"]
    assert table.to_pylist() == storage.score_table(rows).select(["nll_seen", "id"]).to_pylist()


@pytest.mark.parametrize(("n_parts", "chunk_rows"), [(1, 4), (1, 100), (3, 4), (9, 4), (30, 5)])
def test_a_scan_gives_every_row_once_in_the_order_of_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_parts: int, chunk_rows: int
) -> None:
    monkeypatch.setattr(storage, "_CHUNK_ROWS", chunk_rows)
    rows = records(23)
    write_run(tmp_path, rows, n_parts)
    tables = list(storage.scan_scores(tmp_path, ["nll_seen", "id", "row"], description="reading"))
    expected = [row for index in range(n_parts) for row in storage.score_table(rows[index::n_parts]).to_pylist()]
    found = [row for table in tables for row in table.to_pylist()]
    assert found == [{name: row[name] for name in ("nll_seen", "id", "row")} for row in expected]
    largest_part = -(-23 // n_parts)
    assert all(0 < len(table) < chunk_rows + min(chunk_rows, largest_part) for table in tables)


def test_long_answers_make_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_BATCH_BYTES", 500)
    write_run(tmp_path, [scored(row, 40 if row < 10 else 1) for row in range(20)], 20)
    tables = storage.scan_scores(tmp_path, ["row", "nll_seen", "nll_blind"], description="reading")
    assert [len(table) for table in tables] == [2, 2, 2, 2, 2, 10]


def test_a_scan_that_is_given_up_leaves_no_thread_waiting(tmp_path: Path) -> None:
    write_run(tmp_path, records(23), 20)
    before = threading.active_count()
    scan = storage.scan_scores(tmp_path, ["row"], description="reading")
    next(scan)
    scan.close()
    assert threading.active_count() == before


def test_a_scan_names_what_is_wrong_with_a_part(tmp_path: Path) -> None:
    write_run(tmp_path, records(9), 3)
    with pytest.raises(StorageError, match=r"part-00000.*not a score part of this version"):
        list(storage.scan_scores(tmp_path, ["row", "tau"], description="reading"))
    storage.part_path(tmp_path, 2, 3).write_bytes(b"PAR1")
    with pytest.raises(StorageError, match=r"part-00002.*delete it and run `visgain score` again"):
        list(storage.scan_scores(tmp_path, ["row"], description="reading"))
    storage.part_path(tmp_path, 2, 3).unlink()
    with pytest.raises(StorageError, match="1 of 3 parts missing"):
        list(storage.scan_scores(tmp_path, ["row"], description="reading"))


def test_a_large_part_can_be_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_CHUNK_ROWS", 4)
    storage.write_part(tmp_path, 0, 1, storage.score_table(records(10)))
    with pq.ParquetFile(storage.part_path(tmp_path, 0, 1)) as file:
        assert [file.read_row_group(k).num_rows for k in range(file.num_row_groups)] == [4, 4, 2]


def test_more_than_99999_parts_can_be_found(tmp_path: Path) -> None:
    storage.part_path(tmp_path, 123_456, 200_000).touch()
    assert storage.finished_parts(tmp_path, 200_000) == {123_456}


def test_an_unfinished_run_is_refused_unless_asked_for(tmp_path: Path) -> None:
    write_run(tmp_path, records(9), 3)
    storage.part_path(tmp_path, 1, 3).unlink()
    with pytest.raises(StorageError, match="1 of 3 parts missing; run `visgain score` again"):
        storage.read_scores(tmp_path)
    assert storage.read_scores(tmp_path, ["row"], partial=True).column("row").to_pylist() == [0, 2, 3, 5, 6, 8]


def test_a_run_without_any_part_is_refused_even_in_part(tmp_path: Path) -> None:
    storage.claim_run(tmp_path, {}, {"n_parts": 2})
    with pytest.raises(StorageError, match="2 of 2 parts missing"):
        storage.read_scores(tmp_path, partial=True)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    storage.claim_run(tmp_path, {}, {"steps": 2})
    with pytest.raises(StorageError, match="not the record of a score run"):
        storage.read_scores(tmp_path)


def test_parts_of_another_count_are_refused(tmp_path: Path) -> None:
    storage.write_part(tmp_path, 0, 2, storage.score_table([scored(0, 2)]))
    assert storage.finished_parts(tmp_path, 2) == {0}
    with pytest.raises(StorageError, match=r"part-00000-of-00002\.parquet is not one of the 3 parts"):
        storage.finished_parts(tmp_path, 3)


def test_a_temporary_part_of_a_killed_run_is_not_a_finished_part(tmp_path: Path) -> None:
    storage.part_path(tmp_path, 0, 2).with_suffix(".parquet.tmp-1").touch()
    assert storage.finished_parts(tmp_path, 2) == set()


@pytest.mark.parametrize("keep_bytes", [0, 100, -20])
def test_a_damaged_part_is_named_with_the_way_out(tmp_path: Path, keep_bytes: int) -> None:
    write_run(tmp_path, records(9), 3)
    part = storage.part_path(tmp_path, 1, 3)
    part.write_bytes(part.read_bytes()[:keep_bytes])
    with pytest.raises(
        StorageError, match=r"cannot read .*part-00001-of-00003.*delete it and run `visgain score` again"
    ):
        storage.read_scores(tmp_path)


def test_a_part_of_another_version_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, records(9), 3)
    pq.write_table(pa.table({"row": [1]}), storage.part_path(tmp_path, 1, 3))
    with pytest.raises(StorageError, match=r"part-00001.*not a score part of this version"):
        storage.read_scores(tmp_path)


@pytest.mark.parametrize("chunk_rows", [1, 2, 100])
def test_a_list_column_is_its_values_and_lengths(monkeypatch: pytest.MonkeyPatch, chunk_rows: int) -> None:
    monkeypatch.setattr(storage, "_CHUNK_ROWS", chunk_rows)
    column = storage.list_column(np.array([True, False, False, True]), np.array([0, 3, 0, 1, 0]))
    assert column.to_pylist() == [[], [True, False, False], [], [True], []]
    assert storage.list_lengths(column).tolist() == [0, 3, 0, 1, 0]
    assert storage.flat_values(column).tolist() == [True, False, False, True]


def test_a_list_column_without_rows_has_a_type() -> None:
    assert storage.list_column(np.zeros(0, np.int32), np.zeros(0, np.int64)).type == pa.list_(pa.int32())


# ---------------------------------------------------------------- selections


def selection_table(rows: list[int]) -> pa.Table:
    masks = [[True] * row + [False] for row in rows]
    return pa.table(
        {
            "row": rows,
            "id": [str(row) for row in rows],
            "fingerprint": rows,
            "token_id": pa.array([[1] * len(mask) for mask in masks], pa.list_(pa.int32())),
            "keep": pa.array(masks, pa.list_(pa.bool_())),
        }
    )


def test_a_selection_gives_back_what_went_in(tmp_path: Path) -> None:
    tables = [selection_table([1]), selection_table([4])]
    storage.write_selection(tmp_path, tables, {"tau": 0.1, "token_tau": None, "keep_percent": 70.0})
    selection = storage.read_selection(tmp_path)
    assert (selection.tau, selection.keep_percent) == (0.1, 70.0)
    assert np.isnan(selection.token_tau)
    assert selection.rows.tolist() == [1, 4]
    assert [mask.tolist() for mask in selection.keep] == [[True, False], [True] * 4 + [False]]
    assert all(mask.dtype == bool for mask in selection.keep)


def test_a_selection_says_which_rows_it_was_chosen_from_or_nothing(tmp_path: Path) -> None:
    blocks = [np.arange(3), np.array([7, 9])]
    record = {"tau": 0.1, "token_tau": 0.1, "keep_percent": 70.0}
    storage.write_selection(tmp_path, [selection_table([1])], record, candidates=blocks)
    assert storage.read_candidates(tmp_path).tolist() == [0, 1, 2, 7, 9]
    storage.write_selection(tmp_path, [selection_table([1])], record)
    with pytest.raises(StorageError, match="run `visgain select` again"):
        storage.read_candidates(tmp_path)


@pytest.mark.parametrize("tables", [[], [SELECTION_SCHEMA.empty_table()]])
def test_a_selection_may_be_empty(tmp_path: Path, tables: list[pa.Table]) -> None:
    storage.write_selection(tmp_path, tables, {"tau": None, "token_tau": None, "keep_percent": 1})
    selection = storage.read_selection(tmp_path)
    assert len(selection.rows) == len(selection.keep) == 0


def test_a_failed_second_selection_leaves_no_record_that_describes_another_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"tau": 0.1, "token_tau": 0.1, "keep_percent": 70.0}
    storage.write_selection(tmp_path, [selection_table([1])], record)

    def full(path: Path, value: object) -> None:
        raise StorageError("full")

    monkeypatch.setattr(storage, "write_json", full)
    with pytest.raises(StorageError, match="full"):
        storage.write_selection(tmp_path, [selection_table([2])], record)
    with pytest.raises(StorageError, match="holds no selection"):
        storage.read_selection(tmp_path)


def test_a_damaged_selection_is_named_with_the_way_out(tmp_path: Path) -> None:
    storage.write_selection(tmp_path, [selection_table([1])], {"tau": 0.1, "token_tau": 0.1, "keep_percent": 70.0})
    (tmp_path / "selection.parquet").write_bytes(b"PAR1")
    with pytest.raises(StorageError, match="run `visgain select` again"):
        storage.read_selection(tmp_path)
