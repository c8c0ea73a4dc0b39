"""Many files as one dataset: which, in what order; and what tells that they are the same as before."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from visgain.data import identity, open_dataset
from visgain.data.cache import cache_folder, derived
from visgain.data.parts import base_of, choose, find_parts, natural, whole
from visgain.errors import DataError


@pytest.mark.parametrize(
    ("names", "part", "chosen"),
    [
        (["b.parquet", "a.parquet"], "", ["a.parquet", "b.parquet"]),
        (["p10.tar", "p9.tar", "p1.tar"], "", ["p1.tar", "p9.tar", "p10.tar"]),
        (["cc12m-train-0001.tar", "cc12m-train-0000.tar"], "", ["cc12m-train-0000.tar", "cc12m-train-0001.tar"]),
        (["data/train-00000-of-00001.parquet"], "train", ["data/train-00000-of-00001.parquet"]),
        (["data/train-00000-of-00001-a1b2.parquet", "data/test-00000-of-00001-c3.parquet"], "test", None),
        (["default/train/0000.parquet", "default/test/0000.parquet"], "train", ["default/train/0000.parquet"]),
        (["chart/train/0.parquet", "doc/train/0.parquet"], "doc:train", ["doc/train/0.parquet"]),
        (["train.parquet", "test.parquet"], "train", ["train.parquet"]),
        (["train/x.parquet", "train-extra/x.parquet"], "train", ["train/x.parquet"]),
        (["contest.parquet", "attrain.parquet"], "", ["attrain.parquet", "contest.parquet"]),
    ],
)
def test_files_are_told_apart_by_folder_and_split(names: list[str], part: str, chosen: list[str] | None) -> None:
    assert choose(names, part, "here") == (chosen or [name for name in names if part in name])


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"],
        ["coco/x.parquet", "vqa/x.parquet"],
        ["a-00000-of-00002.parquet", "b-00000-of-00001.parquet"],
        ["my_train.parquet", "my_val.parquet"],
    ],
)
def test_several_datasets_in_one_place_are_never_mixed(names: list[str]) -> None:
    with pytest.raises(DataError, match="here holds several datasets"):
        choose(names, "", "here")


def test_numbers_in_names_count_as_numbers() -> None:
    assert sorted(["a10b2", "a9b10", "a9b9", "b", "a"], key=natural) == ["a", "a9b9", "a9b10", "a10b2", "b"]


def test_braces_and_wildcards_stand_for_files(tmp_path: Path) -> None:
    for name in ("s-08", "s-09", "s-10", "t-08"):
        (tmp_path / f"{name}.tar").touch()

    def names(pattern: str) -> list[str]:
        return [file.stem for file in find_parts(tmp_path / pattern, (".tar",))]

    assert names("s-{08..10}.tar") == ["s-08", "s-09", "s-10"]
    assert names("s-{10..08}.tar") == ["s-10", "s-09", "s-08"]
    assert names("{s,t}-08.tar") == ["s-08", "t-08"]
    assert names("?-0*.tar") == ["s-08", "s-09", "t-08"]
    assert names("x*.tar") == []
    with pytest.raises(DataError, match=r"t-09\.tar does not exist"):
        names("t-{08..09}.tar")


def test_the_folder_of_a_pattern_or_part_is_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    assert (
        base_of(Path("d"))
        == base_of(Path("d:train"))
        == base_of(Path("d/*.tar"))
        == base_of(Path("d/{0..9}"))
        == Path("d")
    )
    assert base_of(Path("*.tar")) == Path()
    assert whole(Path("d/*.tar")) == tmp_path / "d" / "*.tar"
    assert whole(Path("d:train")) == Path(f"{tmp_path}/d:train")
    assert whole(Path("*.tar")) == tmp_path / "*.tar"


# ---------------------------------------------------------------- what tells that it is the same


def write(path: Path, fill: bytes) -> Path:
    """A table with a picture column of a megabyte, uncompressed and without statistics."""
    rows = [{"image": bytes([n]) * 10_000, "caption": f"Row {n}."} for n in range(100)]
    rows[50]["image"] = fill * 10_000
    pq.write_table(pa.Table.from_pylist(rows), path, compression="none", use_dictionary=False, write_statistics=False)
    return path


def test_a_small_dataset_is_hashed_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", b"a")
    before = identity.content_hash([path])
    assert identity.content_hash([write(tmp_path / "u.parquet", b"a")]) == before
    assert identity.content_hash([write(path, b"b")]) != before
    assert identity.content_hash([path, path]) != identity.content_hash([path])


def test_of_a_large_dataset_a_hidden_change_shows_in_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(identity, "_PIECES", 4)
    path = write(tmp_path / "t.parquet", b"a")
    before, row = identity.content_hash([path]), open_dataset(path)[50].fingerprint
    write(path, b"b")
    assert identity.content_hash([path]) == before  # what the docs admit: the same length, between the pieces
    assert open_dataset(path)[50].fingerprint != row
    rows = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist([*rows, rows[0]]), path, compression="none")
    assert identity.content_hash([path]) != before


# ---------------------------------------------------------------- what is kept


def test_what_is_derived_is_made_once_for_each_state(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("one")
    made: list[str] = []

    def copy(target: Path) -> None:
        made.append(source.read_text())
        target.write_text(source.read_text())

    first = derived("copy", [source], copy)
    assert derived("copy", [source], copy) == first
    assert first.read_text() == "one"
    source.write_text("three")
    assert derived("copy", [source], copy).read_text() == "three"
    assert made == ["one", "three"]


def test_what_could_not_be_derived_leaves_nothing(tmp_path: Path) -> None:
    def fail(target: Path) -> None:
        target.write_text("half")
        raise DataError("damaged")

    before = set(cache_folder().glob("*"))
    with pytest.raises(DataError, match="damaged"):
        derived("half", [Path(__file__)], fail)
    assert {file for file in set(cache_folder().glob("*")) - before if file.suffix != ".lock"} == set()


def test_a_cache_that_cannot_be_written_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot keep an index of .*XDG_CACHE_HOME"):
        derived("x", [Path(__file__)], lambda target: None)


def test_digits_that_are_no_numbers_are_sorted_as_signs() -> None:
    assert sorted(["a10", "a9", "1²3"], key=natural) == ["1²3", "a9", "a10"]
