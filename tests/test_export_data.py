"""A selection as data alone: filtered LLaVA JSON, FineVision's ratings, and how exports name pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image

import tiny_run
from environments import commands
from visgain import storage
from visgain.cli import main
from visgain.config import ExportConfig, SelectConfig
from visgain.data import open_dataset
from visgain.data.table import TableImage
from visgain.errors import ConfigError
from visgain.export.run import run_export
from visgain.export.shims.masks import Masks
from visgain.selection import run_select
from visgain.types import Sample

GUIDES = Path(__file__).parents[1] / "docs" / "trainers"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the guides have it: data.json, its pictures, and scores/."""
    data = tiny_run.write_dataset(tmp_path)
    tiny_run.write_scores(tmp_path / "scores", data)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_commands(guide: str) -> None:
    for command in commands(GUIDES / f"{guide}.md"):
        if command[0] == "visgain":
            main(command[1:])


def selected(folder: Path) -> list[int]:
    rows: list[int] = storage.read_selection_table(folder / "selection").column("row").to_pylist()
    return rows


# ---------------------------------------------------------------- LLaVA's JSON


ODD = (
    '{"id": 7,  "image":"coco/0.png", "extra": {"b": 1.50, "a": "\\u00e9é"},\r\n'
    ' "conversations": [{"from":"human","value":"<image>\\nWhat is it?"},{"from":"gpt","value":"A red ball."}] }'
)


def write_odd(path: Path, n: int) -> list[str]:
    """Rows whose ids are numbers and texts, written in an unusual way."""
    rows = [ODD.replace('"id": 7', f'"id": {k if k % 2 else json.dumps(f"00{k}")}') for k in range(n)]
    path.write_text("[" + ",\n\n".join(rows) + "]", encoding="utf-8", newline="")
    return rows


def select_rows(folder: Path, rows: list[int], name: str = "data.json") -> ExportConfig:
    """A selection of these rows of `folder`/NAME, all tokens kept."""
    data = folder / name
    dataset = open_dataset(data)
    lines = [
        {"row": k, "id": "", "fingerprint": dataset[k].fingerprint, "token_id": [1, 2], "keep": [True, True]}
        for k in rows
    ]
    table = pa.Table.from_pylist(lines, schema=storage.SELECTION_SCHEMA)
    storage.write_selection(folder / "selection", [table], {"rule": "sample"})
    return ExportConfig(selection=folder / "selection", data=data, to="llava-json", out=folder / "export")


def test_the_guides_commands_leave_the_kept_rows_and_their_places(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_commands("llava-json")
    rows = json.loads((folder / "export/data.json").read_text())
    assert rows == [tiny_run.records()[row] for row in selected(folder)]
    assert json.loads((folder / "export/rows.json").read_text()) == selected(folder)
    assert "carry loss all the same" not in capsys.readouterr().out


def test_rows_are_to_the_letter_as_the_dataset_has_them(tmp_path: Path) -> None:
    tiny_run.write_dataset(tmp_path)
    rows = write_odd(tmp_path / "data.json", 6)
    run_export(select_rows(tmp_path, [0, 3, 5]))
    written = (tmp_path / "export/data.json").read_bytes().decode()
    assert written == "[\n" + ",\n".join([rows[0], rows[3], rows[5]]) + "\n]\n"
    assert [row["id"] for row in json.loads(written)] == ["000", 3, 5]


def test_rows_of_several_files_are_found_in_theirs(tmp_path: Path) -> None:
    tiny_run.write_dataset(tmp_path)
    parts = tmp_path / "parts"
    parts.mkdir()
    first, second = write_odd(parts / "part-0.json", 3), write_odd(parts / "part-1.json", 4)
    for path in ("coco", "vg"):
        (parts / path).symlink_to(tmp_path / path)
    run_export(select_rows(tmp_path, [2, 3, 6], "parts"))
    written = (tmp_path / "export/data.json").read_bytes().decode()
    assert written == "[\n" + ",\n".join([first[2], second[0], second[3]]) + "\n]\n"


def test_tokens_that_carry_loss_all_the_same_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_select(SelectConfig(scores=folder / "scores", out=folder / "selection"))
    table = storage.read_selection_table(folder / "selection")
    left = sum(not keep for row in table.column("keep").to_pylist() for keep in row)
    config = ExportConfig(
        selection=folder / "selection", data=folder / "data.json", to="llava-json", out=folder / "export"
    )
    assert run_export(config).notes == (
        f"{left} answer tokens that are not selected carry loss all the same: data.json has no masks",
    )


def test_other_layouts_are_written_as_llava_has_them(tmp_path: Path) -> None:
    tiny_run.write_dataset(tmp_path)
    (tmp_path / "data.json").write_text(
        json.dumps([{"id": "é", "images": ["coco/0.png"], "query": "<image>What?", "response": "A ball."}])
    )
    done = run_export(select_rows(tmp_path, [0]))
    assert done.notes == (f"{tmp_path / 'data.json'} is not LLaVA's JSON, so its rows are written anew",)
    [row] = json.loads((tmp_path / "export/data.json").read_text())
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A ball."}]
    assert row == {"id": "é", "image": "coco/0.png", "conversations": turns}


# ---------------------------------------------------------------- FineVision


def rated(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "export/data/train-00000-of-00001.parquet").to_pylist()
    return rows


def naive_gains(folder: Path) -> dict[int, list[float]]:
    """The gain of each turn, in plain Python."""
    found = {}
    for row in storage.read_scores(folder / "scores").to_pylist():
        if row["nll_seen"]:
            gains: dict[int, list[float]] = {}
            for turn, seen, blind in zip(row["turn"], row["nll_seen"], row["nll_blind"], strict=True):
                gains.setdefault(turn, []).append(blind - seen)
            found[row["row"]] = [sum(values) / len(values) for _, values in sorted(gains.items())]
    return found


@pytest.mark.parametrize("levels", [5, 3])
def test_turns_are_rated_by_quantiles_of_their_gains(folder: Path, levels: int) -> None:
    run_commands("finevision")
    if levels != 5:
        config = ExportConfig(
            selection=folder / "selection",
            scores=folder / "scores",
            data=folder / "data.json",
            to=f"finevision:levels={levels}",
            out=folder / "export",
        )
        run_export(config)
    gains = naive_gains(folder)
    every = [gain for row in gains.values() for gain in row]
    cuts = np.quantile(every, [k / levels for k in range(1, levels)])
    assert [row["visgain_row"] for row in rated(folder)] == selected(folder)
    for row in rated(folder):
        here = gains.get(row["visgain_row"])
        if here is None:
            assert row["visual_dependency_ratings"] == [None] * len(row["texts"])
            assert row["visual_dependency_min"] is None
        else:
            ratings = [1 + sum(gain >= cut for cut in cuts) for gain in here]
            assert row["visual_dependency_ratings"] == ratings
            assert row["visual_dependency_min"] == min(ratings)
            assert row["visual_gain"] == pytest.approx(here, abs=1e-6)
        assert len(row["texts"]) == len(row["visual_dependency_ratings"])
    record = json.loads((folder / "export/ratings.json").read_text())
    assert record["thresholds"] == pytest.approx(cuts.tolist(), abs=1e-6)
    assert record["turns_rated"] == len(every)


def test_what_a_minimum_leaves_is_the_upper_part(folder: Path) -> None:
    """nanoVLM's comparison, by hand: turns below the minimum go, those without a rating stay."""
    run_commands("finevision")
    turns = [
        (gain, rating)
        for row in rated(folder)
        for gain, rating in zip(row["visual_gain"], row["visual_dependency_ratings"], strict=True)
    ]
    kept = [gain for gain, rating in turns if rating is not None and rating >= 4]
    dropped = [gain for gain, rating in turns if rating is not None and rating < 4]
    assert min(kept) > max(dropped)
    assert len(kept) / (len(kept) + len(dropped)) == pytest.approx(2 / 5, abs=0.1)


def test_the_table_says_its_features(folder: Path) -> None:
    run_commands("finevision")
    table = pq.read_table(folder / "export/data/train-00000-of-00001.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == table.column_names
    assert features["visual_dependency_ratings"] == {"feature": {"dtype": "int64", "_type": "Value"}, "_type": "List"}


def test_scores_must_be_given_and_be_those_of_the_selection(folder: Path) -> None:
    run_select(SelectConfig(scores=folder / "scores", out=folder / "selection"))
    config = ExportConfig(
        selection=folder / "selection", data=folder / "data.json", to="finevision", out=folder / "export"
    )
    with pytest.raises(ConfigError, match="needs --scores"):
        run_export(config)
    tiny_run.write_scores(folder / "others", folder / "data.json", counterfactual="mean")
    with pytest.raises(ConfigError, match="was not made from"):
        run_export(replace(config, scores=folder / "others"))


def test_one_level_rates_nothing(folder: Path) -> None:
    run_select(SelectConfig(scores=folder / "scores", out=folder / "selection"))
    config = ExportConfig(
        selection=folder / "selection", data=folder / "data.json", to="finevision:levels=1", out=folder / "export"
    )
    with pytest.raises(ConfigError, match="levels is 1; there must be at least 2"):
        run_export(config)


# ---------------------------------------------------------------- pictures


def drawn(path: Path, *, exif: int | None = None, mode: str = "RGB", **options: Any) -> Path:
    """A picture that is not square and has a dark top; `exif`: how it is to be turned."""
    pixels = np.full((24, 40, 3), 200, np.uint8)
    pixels[:8] = 20
    tags = Image.Exif()
    if exif is not None:
        tags[ExifTags.Base.Orientation] = exif
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path, exif=tags, **options)
    return path


def talk(image: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A ball."}]
    return {"id": "a", "image": image, "conversations": turns}


def exported_pictures(folder: Path, to: str, name: str = "data.json") -> list[str]:
    """What the rows of `folder`/NAME call their pictures in an export to a trainer."""
    config = replace(select_rows(folder, list(range(len(open_dataset(folder / name)))), name), to=to)
    run_export(config)
    if to == "llava":
        return [row["image"] for row in json.loads((config.out / "data.json").read_text())]
    return [row["images"][0] for row in pq.read_table(config.out / "train.parquet").to_pylist()]


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("to", ["llama-factory", "ms-swift", "llava"])
def test_pictures_that_exif_turns_are_exported_upright(tmp_path: Path, to: str, name: str) -> None:
    turned, same = drawn(tmp_path / name, exif=6), drawn(tmp_path / f"upright-{name}", exif=1)
    (tmp_path / "data.json").write_text(json.dumps([talk(turned.name), talk(same.name)]))
    first, second = exported_pictures(tmp_path, to)
    with Image.open(tmp_path / "export" / first) as picture:  # as a trainer does
        seen = np.asarray(picture.convert("RGB"))
    [row] = [open_dataset(tmp_path / "data.json")[0]]
    assert isinstance(row, Sample)
    assert np.array_equal(seen, np.asarray(row.images[0].open()))
    assert seen.shape == (40, 24, 3)
    assert second == (same.name if to == "llava" else str(same))


def test_another_picture_in_the_place_of_one_that_was_turned_is_exported_anew(tmp_path: Path) -> None:
    drawn(tmp_path / "a.jpg", exif=6)
    (tmp_path / "data.json").write_text(json.dumps([talk("a.jpg")]))
    [before] = exported_pictures(tmp_path, "llava")
    drawn(tmp_path / "a.jpg", exif=8, quality=50)
    [after] = exported_pictures(tmp_path, "llava")
    assert before != after


def write_table_of(folder: Path, *pictures: Path) -> None:
    rows = [talk({"bytes": picture.read_bytes(), "path": picture.name}) for picture in pictures]
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")


@pytest.mark.parametrize(
    ("name", "options", "copied"),
    [
        ("a.jpg", {"quality": 60}, True),
        ("a.webp", {}, True),
        ("a.png", {"mode": "L"}, True),
        ("a.jpg", {"exif": 3}, False),
        ("a.jpg", {"mode": "CMYK"}, False),
        ("a.bmp", {}, False),
    ],
)
def test_bytes_of_tables_are_copied_where_nothing_is_to_be_converted(
    tmp_path: Path, name: str, options: dict[str, Any], copied: bool
) -> None:
    picture = drawn(tmp_path / "source" / name, **options)
    write_table_of(tmp_path, picture)
    [path] = exported_pictures(tmp_path, "ms-swift", "data.parquet")
    assert (Path(path).read_bytes() == picture.read_bytes()) == copied
    assert Path(path).suffix == (picture.suffix if copied else ".png")
    [row] = [open_dataset(tmp_path / "data.parquet")[0]]
    assert isinstance(row, Sample)
    with Image.open(path) as there:
        assert np.array_equal(np.asarray(there.convert("RGB")), np.asarray(row.images[0].open()))


@pytest.mark.parametrize("name", ["a.jpg", "a.bmp"])
def test_pictures_of_tables_that_are_there_are_not_read_again(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table_of(tmp_path, drawn(tmp_path / "source" / name))
    first = exported_pictures(tmp_path, "ms-swift", "data.parquet")
    reads: list[str] = []
    monkeypatch.setattr(TableImage, "content", lambda self: reads.append(self.key))
    assert exported_pictures(tmp_path, "ms-swift", "data.parquet") == first
    assert reads == []


def test_llama_factorys_export_names_its_own_pictures_by_their_place_in_it(tmp_path: Path) -> None:
    write_table_of(tmp_path, drawn(tmp_path / "source/a.png"))
    [name] = exported_pictures(tmp_path, "llama-factory", "data.parquet")
    assert Path(name).parent == Path("images")
    assert (tmp_path / "export" / name).is_file()


def test_llama_factorys_rows_with_pictures_come_first(tmp_path: Path) -> None:
    """It takes the types of columns from the first rows, and no list of pictures for no column of pictures."""
    drawn(tmp_path / "a.png")
    without = {key: value for key, value in talk("").items() if key != "image"}
    without["conversations"] = [{"from": "human", "value": "What?"}, without["conversations"][1]]
    (tmp_path / "data.json").write_text(json.dumps([without, talk("a.png"), without, talk("a.png")]))
    run_export(replace(select_rows(tmp_path, [0, 1, 2, 3]), to="llama-factory"))
    rows = pq.read_table(tmp_path / "export/train.parquet").to_pylist()
    assert [row["visgain"].split()[-1] for row in rows] == ["1", "3", "0", "2"]
    assert [len(row["images"]) for row in rows] == [1, 1, 0, 0]
    assert Masks(tmp_path / "export/masks.safetensors").rows.tolist() == [0, 1, 2, 3]
