"""Tar files against `tarfile` itself, and against what was put into them."""

import io
import json
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image

from data_contract import DataContract, rows_of
from visgain.data import open_dataset
from visgain.data.cache import cache_folder
from visgain.data.tarindex import read_headers
from visgain.errors import DataError, ImageError
from visgain.types import Sample, Skipped


def picture(colour: tuple[int, int, int], kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(file, kind)
    return file.getvalue()


RED, BLUE = picture((255, 0, 0)), picture((0, 0, 255))


def talk(answer: str = "Red.", **fields: object) -> bytes:
    said = [{"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": answer}]
    return json.dumps({"conversations": said, **fields}).encode()


def write(path: Path, members: list[tuple[str, bytes]], **options: object) -> Path:
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def read(folder: Path, members: list[tuple[str, bytes]]) -> Sample | Skipped:
    return open_dataset(write(folder / "t.tar", members))[0]


def read_sample(folder: Path, members: list[tuple[str, bytes]]) -> Sample:
    row = read(folder, members)
    assert isinstance(row, Sample), row
    return row


def reason(folder: Path, members: list[tuple[str, bytes]]) -> str:
    row = read(folder, members)
    assert isinstance(row, Skipped), row
    return row.reason


def texts(sample: Sample | Skipped) -> list[str]:
    assert isinstance(sample, Sample), sample
    return [turn.text for turn in sample.turns]


@pytest.mark.parametrize(("name", "source"), [("./a/7", "a"), ("a/7", "a"), ("./7", "t"), ("7", "t")])
def test_a_tar_of_a_folder_has_the_sources_of_the_folder_itself(tmp_path: Path, name: str, source: str) -> None:
    assert read_sample(tmp_path, [(f"{name}.png", RED), (f"{name}.json", talk())]).source == source


def colours(sample: Sample) -> list[object]:
    return [image.open().getpixel((0, 0)) for image in sample.images]


# ---------------------------------------------------------------- the contract


def _members(last: str) -> list[tuple[str, bytes]]:
    return [
        ("a/0001.png", RED),
        ("a/0001.json", talk(id="007")),
        ("a/0002.png", BLUE),
        ("a/0003.png", BLUE),
        ("a/0003.json", talk("Blue.")),
        ("a/0004.json", talk(last)),
    ]


class TestOneTar(DataContract):
    def write(self, folder: Path) -> Path:
        return write(folder / "data.tar", _members("last"))

    def change(self, folder: Path) -> None:
        write(folder / "data.tar", _members("tsal"))


class TestSeveralTars(DataContract):
    def write(self, folder: Path) -> Path:
        write(folder / "shard-2.tar", _members("last")[:3])
        write(folder / "shard-10.tar", _members("last")[3:])
        return folder / "shard-{2,10}.tar"

    def change(self, folder: Path) -> None:
        write(folder / "shard-10.tar", _members("tsal")[3:])


# ---------------------------------------------------------------- samples


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("1.png", RED), ("1.json", talk())], ["<image>\nWhich colour?", "Red."]),
        ([("1.json", talk()), ("1.png", RED)], ["<image>\nWhich colour?", "Red."]),
        ([("1.png", RED), ("1.txt", b"A red wall.\n")], ["<image>", "A red wall."]),
        ([("1.png", RED), ("1.cls", b"7")], ["<image>", "7"]),
        ([("1.png", RED), ("1.cls", b"7"), ("1.txt", b"Red.")], ["<image>", "Red."]),
        ([("1.png", RED), ("1.json", b'{"caption": "Red.", "url": "x"}'), ("1.txt", b"Other.")], ["<image>", "Red."]),
        ([("1.png", RED), ("1.json", b'{"width": 4}'), ("1.txt", b"Red.")], ["<image>", "Red."]),
        ([("1.png", RED), ("1.json", b'{"question": "Q?", "answer": "A."}')], ["<image>\nQ?", "A."]),
        (
            [
                ("1.png", RED),
                ("1.json", b'[{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]'),
            ],
            ["<image>\nQ?", "A."],
        ),
        ([("d.v/1.PNG", RED), ("d.v/1.JSON", talk())], ["<image>\nWhich colour?", "Red."]),
    ],
)
def test_a_sample_is_its_pictures_and_texts(
    tmp_path: Path, members: list[tuple[str, bytes]], expected: list[str]
) -> None:
    sample = read_sample(tmp_path, members)
    assert texts(sample) == expected
    assert colours(sample) == [(255, 0, 0)]


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "gif"])
def test_a_picture_is_known_by_its_content_whatever_it_is_called(tmp_path: Path, kind: str) -> None:
    sample = read_sample(tmp_path, [(f"1.{kind}", picture((255, 0, 0), "GIF")), ("1.txt", b"Red.")])
    assert colours(sample) == [(255, 0, 0)]


def test_several_pictures_stand_in_the_order_of_the_record_or_else_of_the_tar(tmp_path: Path) -> None:
    members = [("1.0.png", RED), ("1.1.png", BLUE)]
    said = [("1.json", talk("Two.", image=["x/1.1.png", "1.0.png"]))]
    assert colours(read_sample(tmp_path, [*members, *said])) == [(0, 0, 255), (255, 0, 0)]
    foreign = [("1.json", talk("Two.", image=["coco/7.jpg", "coco/8.jpg"]))]
    assert colours(read_sample(tmp_path, [*members, *foreign])) == [(255, 0, 0), (0, 0, 255)]
    assert colours(read_sample(tmp_path, [*members, ("1.json", talk("Two."))])) == [(255, 0, 0), (0, 0, 255)]


def test_the_key_is_the_id_unless_the_record_has_one(tmp_path: Path) -> None:
    members = [("0007.png", RED), ("0007.txt", b"x"), ("0008.png", RED), ("0008.json", talk(id=8))]
    assert [row.id for row in rows_of(open_dataset(write(tmp_path / "t.tar", members)))] == ["0007", "8"]


def test_members_of_one_name_in_two_places_are_two_rows_with_their_own_pictures(tmp_path: Path) -> None:
    members = [
        ("1.png", RED),
        ("1.txt", b"Red."),
        ("2.png", RED),
        ("2.txt", b"Red."),
        ("1.png", BLUE),
        ("1.txt", b"Blue."),
    ]
    rows = rows_of(open_dataset(write(tmp_path / "t.tar", members)))
    assert [(row.id, texts(row)[1]) for row in rows] == [("1", "Red."), ("2", "Red."), ("1", "Blue.")]
    assert [colours(row) for row in rows] == [[(255, 0, 0)], [(255, 0, 0)], [(0, 0, 255)]]
    assert len({row.images[0].key for row in rows}) == 3
    hints = [row.images[0].hint() for row in rows]
    assert hints[0] == hints[1] != hints[2]


def test_tars_of_one_name_in_two_folders_have_pictures_of_their_own(tmp_path: Path) -> None:
    """Rows of equal keys are taken to be about the same picture, which is then opened once."""
    for folder, colour in (("a", (255, 0, 0)), ("b", (0, 255, 0))):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "000.tar", [("0.png", picture(colour)), ("0.json", talk())])
    dataset = open_dataset(tmp_path / "*" / "000.tar")
    samples = [sample for row in range(len(dataset)) if isinstance(sample := dataset[row], Sample)]
    assert [sample.images[0].open().getpixel((0, 0)) for sample in samples] == [(255, 0, 0), (0, 255, 0)]
    assert [sample.images[0].key for sample in samples] == ["0.png at 512 in a/000.tar", "0.png at 512 in b/000.tar"]
    alone = open_dataset(tmp_path / "a" / "000.tar")[0]
    assert isinstance(alone, Sample)
    assert alone.images[0].key == "0.png at 512 in 000.tar"


def test_text_without_a_picture_is_a_text_only_row(tmp_path: Path) -> None:
    sample = read_sample(tmp_path, [("1.json", talk())])
    assert (sample.images, sample.source, texts(sample)) == ((), "text", ["Which colour?", "Red."])


def test_columns_name_members_too(tmp_path: Path) -> None:
    members = [("1.left.png", RED), ("1.right.png", BLUE), ("1.what.txt", b"Blue.")]
    path = write(tmp_path / "t.tar", members)
    row = open_dataset(path, columns="images=right.png,caption=what.txt")[0]
    assert texts(row) == ["<image>", "Blue."]
    assert colours(row) == [(0, 0, 255)]


@pytest.mark.parametrize("how", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read(tmp_path: Path, how: int) -> None:
    key = "/".join(["folder" * 5] * 4) if how == tarfile.USTAR_FORMAT else "f\u00f6lder" * 40
    path = write(tmp_path / "t.tar", [(f"{key}/1.png", RED), (f"{key}/1.txt", b"Red.")], format=how)
    (row,) = rows_of(open_dataset(path))
    assert row.id == f"{key}/1"
    assert colours(row) == [(255, 0, 0)]


# ---------------------------------------------------------------- samples that cannot be used


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("1.png", RED)], "the tar has no text (json, txt ...) beside 1.png"),
        ([("1.txt", b"A caption.")], "no image"),
        ([("1.json", talk(image="1.png"))], "the sample names the image 1.png, and the tar has no picture beside 1"),
        ([("1.png", RED), ("1.json", talk(image=["a", "b"]))], "names 2 images, and the tar has 1 pictures"),
        ([("1.png", RED), ("1.json", b"{")], "the member 1.json is not valid JSON"),
        ([("1.png", RED), ("1.json", b"3")], "the member 1.json holds no JSON object"),
        ([("1.png", RED), ("1.txt", b"\xff\xfe")], "the member 1.txt is not UTF-8 text (byte 0)"),
        ([("1.png", RED), ("1.txt", b"")], "every answer is empty"),
        ([("1.png", RED), ("1.png", BLUE), ("1.txt", b"x")], "the tar has more than one member 1.png"),
        ([("../1.png", RED), ("../1.txt", b"x")], "absolute or leads out of the tar"),
        ([("/1.png", RED), ("/1.txt", b"x")], "absolute or leads out of the tar"),
        ([("1.png", RED), ("1.mp4", b"film"), ("1.txt", b"x")], "has a member 1.mp4, and only pictures are read"),
    ],
)
def test_a_sample_that_cannot_be_used_says_why(tmp_path: Path, members: list[tuple[str, bytes]], expected: str) -> None:
    sound = [("0.png", RED), ("0.txt", b"Sound.")]
    rows = rows_of(open_dataset(write(tmp_path / "t.tar", [*sound, *members])))
    assert texts(rows[0]) == ["<image>", "Sound."]
    assert isinstance(rows[1], Skipped)
    assert expected in rows[1].reason
    assert len(rows) == 2


def test_links_are_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    (tmp_path / "secret.png").write_bytes(RED)
    with tarfile.open(path, "w") as tar:
        for name, content in (("0.png", RED), ("0.txt", b"x")):
            sound = tarfile.TarInfo(name)
            sound.size = len(content)
            tar.addfile(sound, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.png")
            info.type, info.linkname = kind, str(tmp_path / "secret.png")
            tar.addfile(info)
            text = tarfile.TarInfo(f"{kind.decode()}.txt")
            text.size = 1
            tar.addfile(text, io.BytesIO(b"x"))
    rows = rows_of(open_dataset(path))[1:]
    assert len(rows) == 2
    assert all(isinstance(row, Skipped) and "is a link" in row.reason for row in rows)


def test_a_damaged_picture_is_told_when_it_is_opened(tmp_path: Path) -> None:
    sample = read_sample(tmp_path, [("1.png", picture((1, 2, 3))[:-30]), ("1.txt", b"x")])
    with pytest.raises(ImageError, match=r"1\.png"):
        sample.images[0].open()


# ---------------------------------------------------------------- damaged archives


SOUND = [("1.png", RED), ("1.txt", b"x"), ("2.png", BLUE), ("2.txt", b"y")]


def test_an_archive_cut_short_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.tar", SOUND).read_bytes()
    end = 8 * 512
    assert not any(whole[end:])
    for length in [100, 512, 700, 1024, 1500, *range(1536, end + 1, 512), end + 100]:
        path = tmp_path / f"{length}.tar"
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=f"{length}.tar is (cut short|damaged) .*copy or download it again"):
            list(read_headers(path))


def test_damage_in_the_middle_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tar", SOUND)
    content = bytearray(path.read_bytes())
    content[4 * 512 : 4 * 512 + 20] = b"x" * 20
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged after 2 members \(byte 2048\)"):
        open_dataset(path)


def test_archives_joined_with_cat_are_refused(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.tar", SOUND[:2]), write(tmp_path / "b.tar", SOUND[2:])
    (tmp_path / "both.tar").write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(DataError, match=r"goes on behind its end after 2 members .*give them as several files"):
        open_dataset(tmp_path / "both.tar")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_archive_is_refused(tmp_path: Path, kind: str) -> None:
    with tarfile.open(tmp_path / f"t.tar.{kind}", f"w:{kind}") as tar:
        tar.addfile(tarfile.TarInfo("1.png"))
    (tmp_path / f"t.tar.{kind}").rename(tmp_path / "t.tar")
    with pytest.raises(DataError, match="is compressed"):
        open_dataset(tmp_path / "t.tar")


def test_an_archive_of_which_nothing_can_be_used_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the first 2 samples .* the tar has no text .* beside 1\.png"):
        open_dataset(write(tmp_path / "t.tar", [("1.png", RED), ("2.png", BLUE)]))


def test_an_archive_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        open_dataset(write(tmp_path / "t.tar", [("README", b"x"), (".hidden.png", RED)]))


def test_a_shard_that_is_missing_from_a_range_is_told(tmp_path: Path) -> None:
    write(tmp_path / "s-00.tar", SOUND)
    write(tmp_path / "s-02.tar", SOUND)
    with pytest.raises(DataError, match=r"s-01\.tar does not exist"):
        open_dataset(tmp_path / "s-{00..02}.tar")


# ---------------------------------------------------------------- the index


def test_the_index_is_made_once_and_again_when_a_shard_changes(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tar", SOUND)
    before = set(cache_folder().glob("tar-*"))
    assert len(open_dataset(path)) == 2
    made = set(cache_folder().glob("tar-*")) - before
    (index,) = [file for file in made if file.suffix != ".lock"]
    written = index.stat().st_mtime_ns
    assert len(open_dataset(path)) == 2
    assert index.stat().st_mtime_ns == written
    write(path, [*SOUND, ("3.png", RED), ("3.txt", b"z")])
    assert len(open_dataset(path)) == 3


def test_reading_the_headers_takes_the_memory_of_one(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tar", [(f"{n:05d}.txt", b"x") for n in range(4000)])
    tracemalloc.start()
    assert sum(1 for _ in read_headers(path)) == 4000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400_000  # a TarInfo takes about 1 kB


# ---------------------------------------------------------------- real data


@pytest.mark.parametrize("name", ["formats/webdataset/cc12m-train-0000.tar", "easy_vqa"])
def test_real_shards_read_as_tarfile_reads_them(shared_data: Path, name: str) -> None:
    path = shared_data / name
    (shard,) = [path] if path.is_file() else path.glob("*.tar")
    dataset = open_dataset(path)
    with tarfile.open(shard) as tar:
        contents = {info.name: tar.extractfile(info).read() for info in tar.getmembers()}  # type: ignore[union-attr]
    records = {key[:-5]: json.loads(value) for key, value in contents.items() if key.endswith(".json")}
    assert len(dataset) == len(records)
    for row, (key, record) in list(enumerate(records.items()))[:: max(1, len(records) // 40)]:
        sample = dataset[row]
        assert isinstance(sample, Sample), sample
        assert sample.id == record.get("id", key)
        (image,) = sample.images
        original = next(contents[f"{key}.{kind}"] for kind in ("jpg", "png") if f"{key}.{kind}" in contents)
        assert image.open().tobytes() == Image.open(io.BytesIO(original)).convert("RGB").tobytes()
        if "conversations" in record:
            assert texts(sample) == [turn["value"] for turn in record["conversations"]]
        else:
            assert texts(sample) == ["<image>", record["caption"]]
