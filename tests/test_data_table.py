"""Tables against the rows that they were written from."""

import hashlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_contract import DataContract, described, rows_of
from visgain.data import blocks, open_dataset
from visgain.data.cache import cache_folder
from visgain.errors import ConfigError, DataError, ImageError
from visgain.types import Sample, Skipped

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PARTS = pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())]))
TALK = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
PAIR = [{"user": "What?", "assistant": "A cat."}]


def png(colour: tuple[int, int, int], size: tuple[int, int] = (3, 2)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


RED, BLUE = png((255, 0, 0)), png((0, 0, 255))


def write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, **options)
    return path


def read(folder: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None, **how: Any) -> Sample | Skipped:
    return open_dataset(write(folder / "t.parquet", rows, schema), **how)[0]


def colours(sample: Sample | Skipped) -> list[tuple[int, int, int]]:
    assert isinstance(sample, Sample), sample
    return [image.open().getpixel((0, 0)) for image in sample.images]


def said(sample: Sample | Skipped) -> list[str]:
    assert isinstance(sample, Sample), sample
    return [turn.text for turn in sample.turns]


# ---------------------------------------------------------------- the contract, for each kind of file


def _rows(last: str) -> list[dict[str, Any]]:
    bad = [{"role": "user", "content": "What?"}]
    return [
        {"id": "007", "messages": TALK, "images": [{"bytes": RED, "path": "a.png"}]},
        {"id": "8", "messages": bad, "images": [{"bytes": RED, "path": None}]},
        {"id": None, "messages": TALK, "images": [{"bytes": BLUE, "path": None}, {"bytes": RED, "path": None}]},
        {"id": "8", "messages": [{**TALK[0]}, {**TALK[1], "content": last}], "images": []},
    ]


SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("images", pa.list_(PICTURE)),
    ]
)


class TestParquetFile(DataContract):
    def write(self, folder: Path) -> Path:
        return write(folder / "data.parquet", _rows("last"), SCHEMA, row_group_size=2)

    def change(self, folder: Path) -> None:
        write(folder / "data.parquet", _rows("tsal"), SCHEMA, row_group_size=2)


class TestFolderOfShards(DataContract):
    def write(self, folder: Path) -> Path:
        for number, row in enumerate(_rows("last")):
            write(folder / f"part-{number * 5}.parquet", [row], SCHEMA)
        return folder

    def change(self, folder: Path) -> None:
        write(folder / "part-15.parquet", _rows("tsal")[3:], SCHEMA)


class TestSavedToDisk(DataContract):
    def write(self, folder: Path) -> Path:
        save_to_disk(folder / "saved", [_rows("last")[:3], _rows("last")[3:]], SCHEMA)
        return folder / "saved"

    def change(self, folder: Path) -> None:
        save_to_disk(folder / "saved", [_rows("last")[:3], _rows("tsal")[3:]], SCHEMA)


class TestArrowFile(DataContract):
    def write(self, folder: Path) -> Path:
        table = pa.Table.from_pylist(_rows("last"), schema=SCHEMA)
        with pa.ipc.new_file(folder / "data.arrow", SCHEMA) as writer:
            writer.write_table(table, max_chunksize=3)
        return folder / "data.arrow"

    def change(self, folder: Path) -> None:
        table = pa.Table.from_pylist(_rows("tsal"), schema=SCHEMA)
        with pa.ipc.new_file(folder / "data.arrow", SCHEMA) as writer:
            writer.write_table(table, max_chunksize=3)


class TestUnpacked(TestParquetFile):
    """Row groups above the limits."""

    @pytest.fixture(autouse=True)
    def _low_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(blocks, "MAX_GROUP_ROWS", 1)


def save_to_disk(folder: Path, shards: list[list[dict[str, Any]]], schema: pa.Schema) -> None:
    """What `datasets.Dataset.save_to_disk` leaves: Arrow streams, and state.json with their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        with pa.ipc.new_stream(folder / name, schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema), max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("images", pa.list_(PICTURE), [{"bytes": RED, "path": None}]),
        ("images", pa.large_list(PICTURE), [{"bytes": RED, "path": "x.png"}]),
        ("images", pa.list_(pa.binary()), [RED]),
        ("images", pa.list_(pa.large_binary()), [RED]),
        ("image", PICTURE, {"bytes": RED, "path": None}),
        ("image", pa.binary(), RED),
        ("image", pa.binary(len(RED)), RED),
        ("image", pa.string(), "red.png"),
        ("images", pa.list_(pa.string()), ["red.png"]),
        ("image", PICTURE, {"bytes": None, "path": "red.png"}),
        ("image", pa.struct([("bytes", pa.binary())]), {"bytes": RED}),
        ("jpg", pa.binary(), RED),
        ("photo", PICTURE, {"bytes": RED, "path": None}),
        ("image_bytes", pa.list_(pa.binary()), [RED]),
    ],
)
def test_pictures_are_read_in_every_form(tmp_path: Path, name: str, kind: pa.DataType, value: Any) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    schema = pa.schema([(name, kind), ("question", pa.string()), ("answer", pa.string())])
    rows = [{name: value, "question": "What?", "answer": "Red."}, {name: None, "question": "What?", "answer": "Text."}]
    dataset = open_dataset(write(tmp_path / "t.parquet", rows, schema))
    assert said(dataset[0]) == ["<image>\nWhat?", "Red."]
    assert colours(dataset[0]) == [(255, 0, 0)]
    assert said(dataset[1]) == ["What?", "Text."]
    assert dataset[1].source == "text"


def test_pictures_inside_of_messages_are_read_in_their_place(tmp_path: Path) -> None:
    parts = pa.list_(pa.struct([("type", pa.string()), ("text", pa.string()), ("image", PICTURE)]))
    schema = pa.schema([("messages", pa.list_(pa.struct([("role", pa.string()), ("content", parts)])))])
    content = [
        {"type": "text", "text": "Is "},
        {"type": "image", "image": {"bytes": BLUE, "path": None}},
        {"type": "text", "text": " like "},
        {"type": "image", "image": {"bytes": RED, "path": None}},
        {"type": "text", "text": "?"},
    ]
    answer = [{"type": "text", "text": "No."}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}
    sample = read(tmp_path, [row], schema)
    assert said(sample) == ["Is <image> like <image>?", "No."]
    assert colours(sample) == [(0, 0, 255), (255, 0, 0)]


def test_parts_that_only_mark_the_place_take_the_pictures_of_their_column(tmp_path: Path) -> None:
    schema = pa.schema(
        [("messages", pa.list_(pa.struct([("role", pa.string()), ("content", PARTS)]))), ("images", pa.list_(PICTURE))]
    )
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "image", "text": None}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
        ],
        "images": [{"bytes": RED, "path": None}],
    }
    sample = read(tmp_path, [row], schema)
    assert said(sample) == ["Look: <image>", "Red."]
    assert colours(sample) == [(255, 0, 0)]


def test_a_picture_is_known_by_its_bytes(tmp_path: Path) -> None:
    rows = [{"image": data, "caption": str(n)} for n, data in enumerate([RED, BLUE, RED])]
    dataset = open_dataset(write(tmp_path / "t.parquet", rows))
    keys = [dataset[row].images[0].key for row in range(3)]
    assert keys == [hashlib.blake2b(data, digest_size=16).hexdigest() for data in (RED, BLUE, RED)]
    assert dataset[0].images[0].hint() is None


def test_a_picture_travels_as_its_place(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (300, 300, 3), np.uint8)).save(file, "PNG")
    dataset = open_dataset(write(tmp_path / "t.parquet", [{"image": file.getvalue(), "caption": "Noise."}]))
    packed = pickle.dumps(dataset[0])
    assert len(packed) < 1000 < len(file.getvalue())
    assert pickle.loads(packed).images[0].open().tobytes() == Image.open(file).tobytes()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png((9, 9, 9), (30, 30))[:-30], "cannot read image image"),
        (b"no picture", "image image is empty, damaged or not one of"),
        (b"", "image image is empty, damaged or not one of"),
        (png((0, 0, 0), (40, 40)), "image image has 40 x 40 pixels; --max-pixels is 1000"),
    ],
)
def test_bytes_are_decoded_under_the_same_limits_as_files(tmp_path: Path, data: bytes, reason: str) -> None:
    sample = read(tmp_path, [{"image": data, "caption": "x"}], max_pixels=1000)
    assert isinstance(sample, Sample)
    with pytest.raises(ImageError, match=reason):
        sample.images[0].open()


def test_paths_in_tables_stay_inside_of_the_image_root(tmp_path: Path) -> None:
    sample = read(tmp_path, [{"image": "../secret.png", "caption": "x"}])
    assert isinstance(sample, Sample)
    with pytest.raises(ImageError, match="leads out of --image-root"):
        sample.images[0].open()


def test_a_list_with_a_hole_is_skipped_and_not_closed_up(tmp_path: Path) -> None:
    schema = pa.schema([("images", pa.list_(PICTURE)), ("question", pa.string()), ("answer", pa.string())])
    row = {"images": [{"bytes": RED, "path": None}, None], "question": "What?", "answer": "Red."}
    skipped = read(tmp_path, [row], schema)
    assert isinstance(skipped, Skipped)
    assert "null" in skipped.reason


def test_several_columns_of_pictures_are_asked_about(tmp_path: Path) -> None:
    rows = [{"left": RED, "right": BLUE, "caption": "x"}]
    path = write(tmp_path / "t.parquet", rows)
    with pytest.raises(ConfigError, match=r"pictures in left, right; say in which, e.g. --columns images=left"):
        open_dataset(path)
    assert colours(open_dataset(path, columns="images=right")[0]) == [(0, 0, 255)]


def test_a_film_is_refused(tmp_path: Path) -> None:
    skipped = read(tmp_path, [{"video": b"....", "messages": TALK}])
    assert isinstance(skipped, Skipped)
    assert "video" in skipped.reason


# ---------------------------------------------------------------- conversations


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": TALK},
        {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]},
        {"messages": json.dumps(TALK)},
        {"conversations": {"from": ["human", "gpt"], "value": ["What?", "A cat."]}},
        {"texts": PAIR},
        {"texts": {"user": ["What?"], "assistant": ["A cat."]}},
        {"question": "What?", "answer": "A cat."},
        {"prompt": "What?", "response": "A cat."},
        {"prompt": "What?", "completion": "A cat."},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"messages": TALK, "embedding": [0.5, 0.5], "mask": b"not a picture"},
    ],
)
def test_conversations_are_read_in_every_form(tmp_path: Path, fields: dict[str, Any]) -> None:
    sample = read(tmp_path, [{"images": [RED], **fields}])
    assert said(sample) == ["<image>\nWhat?", "A cat."]
    assert colours(sample) == [(255, 0, 0)]


def test_values_of_mixed_types_are_read_as_the_json_that_they_are(tmp_path: Path) -> None:
    """Content that is a list of parts in one turn and a text in the next: `datasets` writes both as JSON."""
    contents = [[{"type": "image"}, {"type": "text", "text": "What?"}], "A cat."]
    types = pa.list_(pa.struct([("role", pa.string()), ("content", pa.json_())]))
    roles = pa.array(["user", "assistant"])
    texts = pa.ExtensionArray.from_storage(pa.json_(), pa.array([json.dumps(each) for each in contents]))
    turns = pa.StructArray.from_arrays([roles, texts], fields=list(types.value_type))
    messages = pa.ListArray.from_arrays(pa.array([0, 2], pa.int32()), turns)
    pq.write_table(pa.table({"messages": messages, "images": [[RED]]}), tmp_path / "t.parquet")
    sample = open_dataset(tmp_path / "t.parquet")[0]
    assert said(sample) == ["<image>What?", "A cat."]
    assert colours(sample) == [(255, 0, 0)]


@pytest.mark.parametrize("inner", [{"width": 2}, {"caption": "Red.", "width": 2}])
def test_a_webdataset_that_the_hub_made_a_table_of_is_read(tmp_path: Path, inner: dict[str, Any]) -> None:
    row = {"jpg": {"bytes": RED, "path": "7.jpg"}, "json": inner, "txt": "Red.", "__key__": "7", "__url__": "hf://x"}
    sample = read(tmp_path, [row])
    assert said(sample) == ["<image>", "Red."]
    assert sample.id == "7"
    assert colours(sample) == [(255, 0, 0)]


def test_columns_of_numbers_and_spare_bytes_are_not_read(tmp_path: Path) -> None:
    row = {"id": 5, "image": RED, "caption": "x", "score": 0.5, "embedding": [0.1], "thumbnail": BLUE, "width": 3}
    dataset = open_dataset(write(tmp_path / "t.parquet", [row]))
    assert sorted(dataset.rows[0]) == ["caption", "id", "image"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (pa.scalar("000033"), "000033"),
        (pa.scalar(33, pa.int32()), "33"),
        (pa.scalar(2**63 + 5, pa.uint64()), "9223372036854775813"),
        (pa.scalar(b"00ff"), "00ff"),
        (pa.scalar(None, pa.string()), "0"),
    ],
)
def test_an_id_of_any_type_survives_as_text(tmp_path: Path, value: pa.Scalar, text: str) -> None:
    table = pa.table({"id": pa.array([value.as_py()], value.type), "question": ["What?"], "answer": ["This."]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert open_dataset(tmp_path / "t.parquet")[0].id == text


def test_categories_are_text(tmp_path: Path) -> None:
    table = pa.table({"source": pa.array(["a", "b"]).dictionary_encode(), "question": ["Q", "R"], "answer": ["x", "y"]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert [row.source for row in rows_of(open_dataset(tmp_path / "t.parquet"))] == ["a", "b"]


# ---------------------------------------------------------------- many files


def qa(*answers: str) -> list[dict[str, Any]]:
    return [{"question": "What?", "answer": answer} for answer in answers]


def answers(path: Path) -> list[str]:
    return [said(row)[1] for row in rows_of(open_dataset(path))]


def test_shards_are_one_dataset_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        write(tmp_path / f"part-{number}.parquet", qa(f"{number}a", f"{number}b"))
    write(tmp_path / ".hidden.parquet", qa("hidden"))
    expected = ["1a", "1b", "2a", "2b", "10a", "10b"]
    assert answers(tmp_path) == expected
    assert answers(tmp_path / "part-{1..10}.parquet".replace("1..10", "1,2,10")) == expected
    assert answers(tmp_path / "part-*.parquet") == expected


def test_a_folder_of_several_datasets_asks_for_one(tmp_path: Path) -> None:
    for split, number in (("train", 0), ("train", 1), ("test", 0)):
        write(tmp_path / "data" / f"{split}-{number:05d}-of-00002.parquet", qa(f"{split}{number}"))
    with pytest.raises(
        DataError, match=r"several datasets: test \(1 files\), train \(2 files\); name one, e.g. --data"
    ):
        open_dataset(tmp_path)
    assert answers(Path(f"{tmp_path}:train")) == ["train0", "train1"]
    with pytest.raises(DataError, match="holds no 'validation'; it holds test"):
        open_dataset(Path(f"{tmp_path}:validation"))


def test_subsets_are_told_apart_by_their_folder(tmp_path: Path) -> None:
    for subset in ("chart", "doc"):
        write(tmp_path / subset / "train-00000-of-00001.parquet", qa(subset))
    assert answers(Path(f"{tmp_path}:doc")) == ["doc"]
    assert answers(Path(f"{tmp_path}:chart/train")) == ["chart"]
    with pytest.raises(DataError, match="chart/train"):
        open_dataset(Path(f"{tmp_path}:train"))


def test_files_of_different_layouts_are_not_one_dataset(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [{"texts": PAIR, "images": [{"bytes": RED, "path": None}]}])
    write(tmp_path / "b.parquet", [{"caption": "A cat.", "image": {"bytes": RED, "path": None}}])
    with pytest.raises(DataError, match=r"a\.parquet and b\.parquet hold rows of different layouts"):
        open_dataset(tmp_path)
    assert said(open_dataset(tmp_path / "b.parquet")[0]) == ["<image>", "A cat."]


def test_shards_may_lack_a_column(tmp_path: Path) -> None:
    write(tmp_path / "a-0.parquet", [{"question": "Q", "answer": "with", "image": RED}])
    write(tmp_path / "a-1.parquet", [{"question": "Q", "answer": "without"}])
    dataset = open_dataset(tmp_path)
    assert [len(row.images) for row in rows_of(dataset)] == [1, 0]


def test_a_saved_dict_of_splits_asks_for_one(tmp_path: Path) -> None:
    schema = pa.schema([("question", pa.string()), ("answer", pa.string())])
    for split in ("train", "test"):
        save_to_disk(tmp_path / split, [qa(split)], schema)
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert answers(tmp_path / "train") == answers(Path(f"{tmp_path}:train")) == ["train"]
    with pytest.raises(DataError, match="several datasets: test"):
        open_dataset(tmp_path)
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    assert answers(tmp_path) == ["train"]


def test_a_saved_dataset_that_lacks_a_file_is_refused(tmp_path: Path) -> None:
    save_to_disk(tmp_path, [qa("a"), qa("b")], pa.schema([("question", pa.string()), ("answer", pa.string())]))
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"is not complete: .*data-00001-of-00002.arrow"):
        open_dataset(tmp_path)


# ---------------------------------------------------------------- damage and size


def test_a_table_cut_short_is_one_message(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", qa("a"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"cannot read the table .*t\.parquet: .*; copy or download it again"):
        open_dataset(path)


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    schema = pa.schema([("question", pa.string()), ("answer", pa.string())])
    with pytest.raises(DataError, match="holds no rows"):
        open_dataset(write(tmp_path / "t.parquet", [], schema))


def test_a_table_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", qa("a", "b"), row_group_size=1)
    dataset = open_dataset(path)
    assert said(dataset[0])[1] == "a"
    write(path, qa("c", "longer"), row_group_size=1)
    with pytest.raises(DataError, match="was changed while it was being read"):
        dataset[1]


def test_large_row_groups_are_unpacked_once_and_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": str(n), "image": RED if n % 3 else BLUE, "caption": f"Picture {n}."} for n in range(50)]
    path = write(tmp_path / "t.parquet", rows)
    packed = [described(row) for row in rows_of(open_dataset(path))]
    monkeypatch.setattr(blocks, "MAX_GROUP_BYTES", 100)
    unpacked = open_dataset(path)
    (file,) = unpacked.rows._tables
    assert file.path.is_relative_to(cache_folder())
    assert [described(row) for row in rows_of(unpacked)] == packed
    before = file.path.stat().st_mtime_ns
    assert [described(row) for row in rows_of(open_dataset(path))] == packed
    assert file.path.stat().st_mtime_ns == before


def test_reading_a_row_decodes_its_row_group_and_no_other(tmp_path: Path) -> None:
    rows = [{"image": RED, "caption": f"Picture {n}."} for n in range(100)]
    dataset = open_dataset(write(tmp_path / "t.parquet", rows, row_group_size=10))
    before = blocks._group.cache_info().misses
    for row in (41, 44, 49, 40):
        assert said(dataset[row])[1] == f"Picture {row}."
        dataset[row].images[0].open()
    assert blocks._group.cache_info().misses == before + 1


# ---------------------------------------------------------------- real data


def test_the_real_parquet_reads(shared_data: Path) -> None:
    path = shared_data / "formats" / "parquet" / "demo-dataset-images-bytes.parquet"
    table = pq.read_table(path).to_pylist()
    rows = rows_of(open_dataset(path))
    assert len(rows) == len(table) == 3
    for row, original in zip(rows, table, strict=True):
        assert said(row) == ["<image>", original["text"].removeprefix("<__dj__image> ")]
        (image,) = row.images
        with Image.open(io.BytesIO(original["image_bytes"][0])) as expected:
            assert image.open().tobytes() == expected.convert("RGB").tobytes()
