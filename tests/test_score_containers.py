"""Real tables and tars from file to scores, with counts that the files themselves tell."""

import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from visgain.config import ScoreConfig
from visgain.scoring.run import run_score
from visgain.storage import part_path, read_json


def rows_on_disk(folder: Path) -> list[dict[str, object]]:
    n_parts = read_json(folder / "run.json", "scores")["n_parts"]
    rows = [row for part in range(n_parts) for row in pq.read_table(part_path(folder, part, n_parts)).to_pylist()]
    return sorted(rows, key=lambda row: row["row"])


@pytest.mark.slow
def test_the_real_parquet_is_scored(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "formats" / "parquet" / "demo-dataset-images-bytes.parquet"
    table = pq.read_table(path)
    done = run_score(ScoreConfig(model="embedded", data=path, out=tmp_path / "scores", workers=0))
    assert (done.rows, done.multimodal, done.text_only, done.skipped) == (table.num_rows, table.num_rows, 0, 0)
    rows = rows_on_disk(tmp_path / "scores")
    captions = [text.removeprefix("<__dj__image> ") for text in table.column("text").to_pylist()]
    assert [row["char_end"][-1] for row in rows] == [len(caption) for caption in captions]


@pytest.mark.slow
def test_the_real_tar_is_scored_with_a_fault_in_it_and_resumed(shared_data: Path, tmp_path: Path) -> None:
    """Of the real shard 7 samples, of which one loses its text and one's picture is cut short."""
    with tarfile.open(shared_data / "formats" / "webdataset" / "cc12m-train-0000.tar") as real:
        infos = real.getmembers()[: 7 * 3]
        contents = {info.name: real.extractfile(info).read() for info in infos}  # type: ignore[union-attr]
    keys = list(dict.fromkeys(name.partition(".")[0] for name in contents))
    del contents[f"{keys[2]}.json"], contents[f"{keys[2]}.txt"]
    contents[f"{keys[4]}.jpg"] = contents[f"{keys[4]}.jpg"][:5000]
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "shard-000.tar", "w") as tar:
        for info in infos:
            if info.name in contents:
                (tmp_path / "member").write_bytes(contents[info.name])
                tar.add(tmp_path / "member", info.name)

    out = tmp_path / "scores"
    config = ScoreConfig(model="embedded", data=tmp_path / "data", out=out, workers=0, part_rows=2)
    done = run_score(config)
    assert (done.rows, done.multimodal, done.text_only, done.skipped) == (7, 5, 0, 2)
    whole = rows_on_disk(out)
    assert [row["id"] for row in whole] == keys
    captions = [json.loads(contents[f"{key}.json"])["caption"] for key in keys if f"{key}.json" in contents]
    scored = [row for row in whole if row["skip_reason"] is None]
    assert [row["char_end"][-1] for row in scored] == [
        len(text) for key, text in zip([key for key in keys if key != keys[2]], captions, strict=True) if key != keys[4]
    ]
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [(line["row"], line["id"]) for line in skipped] == [(2, keys[2]), (4, keys[4])]
    assert "has no text" in skipped[0]["reason"]
    assert f"{keys[4]}.jpg" in skipped[1]["reason"]

    n_parts = read_json(out / "run.json", "scores")["n_parts"]
    part_path(out, 1, n_parts).unlink()  # what a killed run lacks
    assert run_score(config).skipped == 2
    assert rows_on_disk(out) == whole
