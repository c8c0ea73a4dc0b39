"""Ratings of a dataset's own table, to select by."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from visgain import storage
from visgain.config import SelectConfig
from visgain.data import open_dataset
from visgain.data.numbers import dataset_files, read_numbers
from visgain.errors import DataError
from visgain.selection import run_select
from visgain.types import Sample, TokenScores

SCHEMA = pa.schema(
    [
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("texts", pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string())]))),
        ("source", pa.string()),
        ("relevance_ratings", pa.list_(pa.int64())),
        ("relevance_min", pa.int64()),
        ("formatting_ratings", pa.list_(pa.float64())),
    ]
)


def row_of(number: int) -> dict[str, Any]:
    """A row of FineVision with made-up ratings."""
    file = io.BytesIO()
    Image.new("RGB", (2, 2), (number, 0, 0)).save(file, "PNG")
    ratings = [number % 5 + 1, (number * 3) % 5 + 1]
    return {
        "images": [{"bytes": file.getvalue(), "path": None}],
        "texts": [{"user": f"Q{turn}?", "assistant": f"A{number}."} for turn in range(2)],
        "source": "chart",
        "relevance_ratings": ratings,
        "relevance_min": min(ratings),
        "formatting_ratings": [None, float(number)] if number % 2 else [float(number)],
    }


ROWS = [row_of(number) for number in range(12)]


@pytest.fixture
def finevision(tmp_path: Path) -> Path:
    """Two shards of FineVision."""
    folder = tmp_path / "chart"
    folder.mkdir()
    for number, rows in enumerate((ROWS[:5], ROWS[5:])):
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / f"train-{number:05d}-of-00002.parquet")
    return folder


def scores_of(dataset_path: Path, folder: Path) -> Path:
    """Scores of every row, as a run leaves them."""
    dataset = open_dataset(dataset_path)
    records = []
    for number in range(len(dataset)):
        sample = dataset[number]
        assert isinstance(sample, Sample)
        one = np.zeros(1, np.int32)
        records.append(
            TokenScores(
                row=number,
                id=sample.id,
                fingerprint=sample.fingerprint,
                source=sample.source,
                n_images=1,
                n_image_tokens=1,
                n_prompt_tokens=1,
                truncated=False,
                token_id=one,
                turn=one,
                chars=np.zeros((1, 2), np.int32),
                nll_seen=np.ones(1, np.float32),
                nll_blind=np.ones(1, np.float32),
            )
        )
    storage.claim_run(folder, {"data_fingerprint": dataset.fingerprint}, {"n_parts": 1})
    storage.write_part(folder, 0, 1, storage.score_table(records))
    return folder


def test_finevision_reads_as_pairs_with_its_source(finevision: Path) -> None:
    dataset = open_dataset(finevision)
    sample = dataset[7]
    assert isinstance(sample, Sample)
    assert [turn.text for turn in sample.turns] == ["<image>\nQ0?", "A7.", "Q1?", "A7."]
    assert sample.source == "chart"
    assert sample.images[0].open().getpixel((0, 0)) == (7, 0, 0)


@pytest.mark.parametrize("name", ["relevance_ratings", "relevance_min", "formatting_ratings"])
def test_ratings_are_read_as_numbers_or_means(finevision: Path, name: str) -> None:
    blocks = list(read_numbers(dataset_files(finevision), name))
    assert np.concatenate([row for row, _ in blocks]).tolist() == list(range(12))
    values = np.concatenate([values for _, values in blocks]).tolist()
    given = [row[name] if isinstance(row[name], list) else [row[name]] for row in ROWS]
    counted = [[value for value in each if value is not None] for each in given]
    assert values == [sum(each) / len(each) for each in counted]


def test_selection_by_a_rating_keeps_the_best_rated_rows(finevision: Path, tmp_path: Path) -> None:
    scores = scores_of(finevision, tmp_path / "scores")
    by = "column:relevance_ratings"
    run_select(SelectConfig(scores=scores, out=tmp_path / "out", by=by, table=finevision, keep=50))
    kept = storage.read_selection(tmp_path / "out").rows.tolist()
    means = [sum(row["relevance_ratings"]) / 2 for row in ROWS]
    tau = sorted(means, reverse=True)[5]
    assert kept == [number for number, mean in enumerate(means) if mean >= tau]


def test_a_table_without_row_numbers_that_was_not_scored_is_refused(finevision: Path, tmp_path: Path) -> None:
    scores = scores_of(finevision, tmp_path / "scores")
    other = tmp_path / "other.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS[::-1], SCHEMA), other)
    with pytest.raises(DataError, match=r"other\.parquet has no column 'row', and is not the dataset as it was scored"):
        run_select(SelectConfig(scores=scores, out=tmp_path / "out", by="column:relevance_min", table=other))


def test_a_column_that_is_no_rating_is_refused(finevision: Path, tmp_path: Path) -> None:
    scores = scores_of(finevision, tmp_path / "scores")
    for name, message in (("source", "neither numbers nor lists"), ("relevance_mim", "did you mean 'relevance_min'")):
        with pytest.raises(DataError, match=message):
            run_select(SelectConfig(scores=scores, out=tmp_path / "out", by=f"column:{name}", table=finevision))


def test_a_row_without_a_rating_is_told(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist([{**ROWS[0], "relevance_ratings": []}, ROWS[1]], SCHEMA), path)
    scores = scores_of(path, tmp_path / "scores")
    with pytest.raises(DataError, match="no finite value for row 0"):
        run_select(SelectConfig(scores=scores, out=tmp_path / "out", by="column:relevance_ratings", table=path))
