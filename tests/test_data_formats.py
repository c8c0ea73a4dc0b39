"""JSON and CSV in the layouts of the usual trainers."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from data_contract import DataContract, described, rows_of
from visgain.data import FORMATS, open_dataset, reading
from visgain.data import ORDER as FORMAT_ORDER
from visgain.data.records import KEYS, LAYOUTS, ORDER, Columns
from visgain.errors import ConfigError, DataError, UnknownName
from visgain.types import Sample, Skipped

Record = dict[str, Any]


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows), encoding="utf-8")
    return path


def sample(path: Path, row: int = 0, **options: Any) -> Sample:
    found = open_dataset(path, **options)[row]
    assert isinstance(found, Sample), found
    return found


def reason(path: Path, row: int = 0, **options: Any) -> str:
    found = open_dataset(path, **options)[row]
    assert isinstance(found, Skipped), found
    return found.reason


def talk(found: Sample) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in found.turns]


def keys(found: Sample) -> list[str]:
    return [image.key for image in found.images]


# ---------------------------------------------------------------- the contract, for each way to write the same rows


class Written(DataContract):
    """Five rows: with an image, with two, without, without an answer, and one that changes."""

    name = "data.json"

    def row(self, number: int, question: str, answer: str, images: list[str]) -> Record:
        raise NotImplementedError

    def rows(self, last: str) -> list[Record]:
        said = [
            ("What is this?", "A kettle.", ["a/1.jpg"]),
            ("Do they differ?", "No.", ["a/1.jpg", "b/2.jpg"]),
            ("Sure?", "Yes.", []),
            ("And?", "", ["a/1.jpg"]),
            ("How many?", last, ["a/3.jpg"]),
        ]
        return [self.row(number, *each) for number, each in enumerate(said)]

    def write(self, folder: Path, last: str = "Two.") -> Path:
        return write(folder / self.name, self.rows(last))

    def change(self, folder: Path) -> None:
        self.write(folder, last="Three.")

    def test_its_rows_say_what_was_written(self, path: Path) -> None:
        rows = rows_of(open_dataset(path))
        assert [row.id for row in rows] == [f"{number:06d}" for number in range(5)]
        first, second, third, fourth, last = rows
        assert isinstance(first, Sample)
        assert isinstance(second, Sample)
        assert isinstance(third, Sample)
        assert isinstance(last, Sample)
        assert talk(first) == [("user", "<image>\nWhat is this?"), ("assistant", "A kettle.")]
        assert talk(second) == [("user", "<image>\n<image>\nDo they differ?"), ("assistant", "No.")]
        assert talk(third) == [("user", "Sure?"), ("assistant", "Yes.")]
        assert (keys(first), keys(second), keys(third)) == (["a/1.jpg"], ["a/1.jpg", "b/2.jpg"], [])
        assert (first.source, third.source) == ("a", "text")
        assert isinstance(fourth, Skipped)
        assert fourth.n_images == 1
        assert talk(last)[-1] == ("assistant", "Two.")


class TestLlava(Written):
    def row(self, number: int, question: str, answer: str, images: list[str]) -> Record:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": f"{number:06d}", "conversations": turns, **({"image": images} if images else {})}


class TestQwenVl(Written):
    name = "data.jsonl"

    def row(self, number: int, question: str, answer: str, images: list[str]) -> Record:
        text = "".join(f"<img>{path}</img>\n" for path in images) + question
        turns = [{"from": "user", "value": text}, {"from": "assistant", "value": answer}]
        return {"id": f"{number:06d}", "conversations": turns}


class TestMessages(Written):
    name = "data.jsonl"

    def row(self, number: int, question: str, answer: str, images: list[str]) -> Record:
        marks = "<image>\n" * len(images)
        turns = [{"role": "user", "content": marks + question}, {"role": "assistant", "content": answer}]
        return {"id": f"{number:06d}", "messages": turns, "images": images}


class TestOpenAi(Written):
    def row(self, number: int, question: str, answer: str, images: list[str]) -> Record:
        pictures = [{"type": "image_url", "image_url": {"url": path}} for path in images]
        parts = [each for picture in pictures for each in (picture, {"type": "text", "text": "\n"})]
        asked = [*parts, {"type": "text", "text": question}]
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": asked}]
        answered = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        return {"id": f"{number:06d}", "messages": [*turns, answered]}


class TestSwift(Written):
    name = "data.jsonl"

    def row(self, number: int, question: str, answer: str, images: list[str]) -> Record:
        return {"id": f"{number:06d}", "query": question, "response": answer, "images": images, "history": []}


class TestAlpaca(Written):
    """LLaMA-Factory, with names of its own in dataset_info.json."""

    def row(self, number: int, question: str, answer: str, images: list[str]) -> Record:
        return {"id": f"{number:06d}", "ask": question, "say": answer, "pics": images}

    def write(self, folder: Path, last: str = "Two.") -> Path:
        columns = {"prompt": "ask", "response": "say", "images": "pics"}
        info = {"mine": {"file_name": "data.json", "columns": columns}, "other": {"hf_hub_url": "a/b"}}
        (folder / "dataset_info.json").write_text(json.dumps(info))
        return super().write(folder, last)


class TestCsv(Written):
    name = "data.csv"

    def row(self, number: int, question: str, answer: str, images: list[str]) -> Record:
        return {"id": f"{number:06d}", "question": question, "answer": answer, "images": json.dumps(images)}

    def write(self, folder: Path, last: str = "Two.") -> Path:
        rows = self.rows(last)
        with (folder / self.name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return folder / self.name


class TestFolder(Written):
    """Two files as one dataset."""

    def row(self, number: int, question: str, answer: str, images: list[str]) -> Record:
        return TestMessages.row(self, number, question, answer, images)  # type: ignore[arg-type]

    def write(self, folder: Path, last: str = "Two.") -> Path:
        rows = self.rows(last)
        write(folder / "part-2.jsonl", rows[:2])
        write(folder / "part-10.jsonl", rows[2:])
        (folder / "notes.txt").write_text("no rows")
        return folder


# ---------------------------------------------------------------- messages


def turns(*texts: Any) -> list[Record]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def test_image_parts_stand_where_they_stand(tmp_path: Path) -> None:
    text = {"type": "text", "text": " between "}
    asked = [{"type": "image", "image": "a.jpg"}, text, {"type": "image", "path": "b.jpg"}]
    path = write(
        tmp_path / "d.json", [{"messages": turns(asked, "A", [{"type": "image_url", "image_url": "c.jpg"}], "B")}]
    )
    found = sample(path)
    assert [turn.text for turn in found.turns] == ["<image> between <image>", "A", "<image>", "B"]
    assert keys(found) == ["a.jpg", "b.jpg", "c.jpg"]


def test_image_parts_without_an_image_take_those_of_the_row(tmp_path: Path) -> None:
    asked = [
        {"type": "image", "text": None, "index": 0},
        {"type": "text", "text": "Q", "index": None},
        {"type": "image"},
    ]
    path = write(tmp_path / "d.json", [{"messages": turns(asked, "A"), "images": ["a.jpg", {"path": "b.jpg"}]}])
    assert sample(path).turns[0].text == "<image>Q<image>"
    assert keys(sample(path)) == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("mark", ["<image>", "<IMG_CONTEXT>"])
def test_marks_in_the_text_say_where_the_images_of_parts_stand(tmp_path: Path, mark: str) -> None:
    asked = [{"type": "image_url", "image_url": {"url": name}} for name in ("a.jpg", "b.jpg")]
    asked.append({"type": "text", "text": f"{mark}\nand {mark}?"})
    path = write(tmp_path / "d.json", [{"messages": turns(asked, "A")}])
    assert sample(path).turns[0].text == "<image>\nand <image>?"
    assert keys(sample(path)) == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": turns([{"type": "video", "video": "a.mp4"}], "A")}, "video not found: a.mp4, nor frames in a"),
        ({"messages": turns([{"type": "audio", "audio": "a.mp3"}], "A")}, "a part of type 'audio'"),
        ({"messages": turns([{"type": "text", "text": "Q"}, 3], "A")}, "a part that is a number"),
        ({"messages": turns([{"type": "image", "image": "a"}, "Q"], "A"), "images": ["b"]}, "are not the same"),
        ({"messages": turns([{"type": "image"}, {"type": "text", "text": "Q"}], "A")}, "no image but its text holds"),
        ({"messages": turns("Q", [{"type": "image", "image": "a"}])}, "turn 1 (assistant) holds <image>"),
        ({"messages": turns("Q", None)}, "'content' of turn 1 is null"),
        ({"messages": turns("Q", "A"), "videos": ["a.mp4"]}, "video not found: a.mp4"),
        ({"messages": turns("Q", "A"), "audios": ["a.mp3"]}, "'audios', and only pictures and frames"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
        ({"messages": [{"role": "pretrain", "content": "x"}]}, "text to pre-train on"),
        ({"messages": turns("<ImageHere> Q", "A")}, "no image but its text holds"),
    ],
)
def test_messages_that_cannot_be_read_are_skipped_with_the_reason(
    tmp_path: Path, fields: Record, expected: str
) -> None:
    assert expected in reason(write(tmp_path / "d.json", [fields]))


def test_marks_of_other_tools_are_image_marks(tmp_path: Path) -> None:
    row = {"image": ["a.jpg", "b.jpg"], "conversations": turns("1: <ImageHere>; 2: <ImageHere>.", "A", "Q", "<B>")}
    path = write(tmp_path / "d.json", [row])
    assert sample(path).turns[0].text == "1: <image>; 2: <image>."
    own = {"image": "a.jpg", "conversations": turns("See [pic].", "A")}
    assert sample(write(tmp_path / "e.json", [own]), columns="mark=[pic]").turns[0].text == "See <image>."


def test_an_absolute_path_below_the_image_root_is_read_and_any_other_refused(tmp_path: Path) -> None:
    rows = [{"messages": turns("Q", "A"), "images": [str(tmp_path / "a" / "b.jpg")]}]
    rows.append({"messages": turns("Q", "A"), "images": ["/etc/b.jpg"]})
    path = write(tmp_path / "d.json", rows)
    assert keys(sample(path)) == ["a/b.jpg"]
    (outside,) = sample(path, 1).images
    with pytest.raises(DataError, match="absolute"):
        outside.open()


# ---------------------------------------------------------------- prompts, pairs, captions


def test_an_alpaca_row_is_history_then_instruction_with_input(tmp_path: Path) -> None:
    row = {"instruction": "I", "input": "J", "output": "O", "system": "S", "history": [["a", "b"], ["c", "d"]]}
    rows = [row, {"instruction": "I", "output": "O"}, {"instruction": "I", "input": "", "output": "O", "history": None}]
    path = write(tmp_path / "d.json", rows)
    assert [text for _, text in talk(sample(path))] == ["a", "b", "c", "d", "I\nJ", "O"]
    assert [text for _, text in talk(sample(path, 1))] == [text for _, text in talk(sample(path, 2))] == ["I", "O"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"response": "A"}, "an answer but no question and no image"),
        ({"query": "Q"}, "the row has no response"),
        ({"query": 3, "response": "A"}, "'query' is a number"),
        ({"query": "Q", "response": ["A"]}, "'response' is a list"),
        ({"query": "Q", "response": "A", "history": [["a"]]}, "'history' 0 is no pair"),
        ({"query": "Q", "response": "A", "history": "a"}, "'history' 0 is no pair"),
        ({"query": "Q", "response": "A", "history": 3}, "'history' is a number"),
    ],
)
def test_prompts_that_cannot_be_read_are_skipped_with_the_reason(tmp_path: Path, row: Record, expected: str) -> None:
    path = write(tmp_path / "d.jsonl", [row, {"query": "Q", "response": "A", "history": []}])
    assert expected in reason(path)


def test_an_answer_about_an_image_needs_no_question(tmp_path: Path) -> None:
    found = sample(write(tmp_path / "d.jsonl", [{"response": "A", "images": ["a.jpg"]}]))
    assert talk(found) == [("user", "<image>"), ("assistant", "A")]


def test_pairs_are_turns(tmp_path: Path) -> None:
    rows = [
        {"conversation": [{"human": "a", "assistant": "b"}, {"human": "c", "assistant": "d"}]},
        {"conversation": [{"system": "s", "input": "a", "output": "b"}]},
        {"conversation": [{"human": "a"}]},
        {"conversation": 3},
    ]
    path = write(tmp_path / "d.jsonl", rows)
    assert [text for _, text in talk(sample(path))] == ["a", "b", "c", "d"]
    assert [text for _, text in talk(sample(path, 1))] == ["a", "b"]
    assert "no text under one of assistant" in reason(path, 2)
    assert "is a number, not a list" in reason(path, 3)


def test_captions_are_answers_to_their_image(tmp_path: Path) -> None:
    rows = [
        {"image": "a.jpg", "caption": "A dog."},
        {"image": ["a.jpg", "b.jpg"], "caption": ["Two dogs."]},
        {"image": "a.jpg", "caption": ["A dog.", "A cat."]},
        {"caption": "A dog."},
        {"image": "a.jpg", "caption": None},
    ]
    path = write(tmp_path / "d.jsonl", rows)
    assert talk(sample(path)) == [("user", "<image>"), ("assistant", "A dog.")]
    assert talk(sample(path, 1)) == [("user", "<image>\n<image>"), ("assistant", "Two dogs.")]
    assert "2 captions" in reason(path, 2)
    assert "a caption and no image" in reason(path, 3)
    assert "the caption is null" in reason(path, 4)


def test_what_may_be_a_wrong_caption_is_none_unless_the_user_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"image": "a.jpg", "caption": "A dog.", "label": "match"}])
    with pytest.raises(DataError, match=r"in no known layout .* 'caption', 'image', 'label'"):
        open_dataset(path)
    assert talk(sample(path, columns="caption=caption")) == talk(sample(path, format="captions"))


# ---------------------------------------------------------------- what the user says


def test_columns_and_tags_name_what_sniffing_cannot_know(tmp_path: Path) -> None:
    dialog = [{"who": "asker", "what": "Q <p>"}, {"who": "helper", "what": "A"}]
    path = write(tmp_path / "d.json", [{"key": 7, "dialog": dialog, "pics": "a.jpg", "set": "mine"}])
    with pytest.raises(DataError, match="'dialog', 'key', 'pics', 'set'"):
        open_dataset(path)
    said = "messages=dialog, images=pics,id=key,source=set,role=who,content=what,user=asker,assistant=helper,mark=<p>"
    found = sample(path, columns=said)
    assert (found.id, found.source, keys(found)) == ("7", "mine", ["a.jpg"])
    assert talk(found) == [("user", "Q <image>"), ("assistant", "A")]
    as_mapping = dict(part.strip().split("=") for part in said.split(","))
    assert described(sample(path, columns=as_mapping)) == described(found)


def test_an_answer_that_the_user_names_wins_over_what_else_is_there(tmp_path: Path) -> None:
    row = {"conversations": turns("Q", "A"), "topic": "P", "reply": "R", "image": "a.jpg", "caption": "C"}
    path = write(tmp_path / "d.json", [row])
    assert talk(sample(path))[-1] == ("assistant", "A")
    assert talk(sample(path, columns="prompt=topic,response=reply")) == [("user", "<image>\nP"), ("assistant", "R")]
    assert talk(sample(path, columns="caption=caption"))[-1] == ("assistant", "C")


@pytest.mark.parametrize(
    ("said", "kind", "expected"),
    [
        ("mesages=x", ConfigError, "unknown key 'mesages'; did you mean 'messages'"),
        ("messages", ConfigError, "'messages' without a name"),
        ("id=a, id=b", ConfigError, "'id' more than once"),
        ("messages=", ConfigError, "'messages' without a name"),
        ("messages=conversation", ConfigError, "no row of .* has 'conversation'; did you mean 'conversations'"),
        ("images=pictures", ConfigError, "no row of .* has 'pictures'"),
    ],
)
def test_columns_that_make_no_sense_are_one_message(
    tmp_path: Path, said: str, kind: type[Exception], expected: str
) -> None:
    path = write(tmp_path / "d.json", [{"conversations": turns("Q", "A")}])
    with pytest.raises(kind, match=expected):
        open_dataset(path, columns=said)


def test_a_format_can_be_insisted_on(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", [{"messages": turns("Q", "A"), "query": "P", "response": "R"}])
    assert talk(sample(path))[-1] == talk(sample(path, format="json"))[-1] == ("assistant", "A")
    assert talk(sample(path, format="prompts"))[-1] == ("assistant", "R")
    with pytest.raises(UnknownName, match="did you mean 'prompts'"):
        open_dataset(path, format="prompt")


def test_what_the_user_says_is_what_a_run_is_known_by() -> None:
    assert reading(None, None) == {}
    assert reading("messages=b, id=a", "json") == {"columns": {"id": "a", "messages": "b"}, "format": "json"}
    assert reading({"id": "a"}, None) == reading("id=a", None)


def test_every_format_and_layout_is_asked_in_an_order_that_is_written_down() -> None:
    assert sorted(ORDER) == LAYOUTS.names()
    assert sorted(FORMAT_ORDER) == FORMATS.names()
    assert all(name in KEYS for name in ("messages", "images", "id"))
    assert Columns.of("id=a") == Columns.of({"id": "a"})


# ---------------------------------------------------------------- what lies beside


def info(folder: Path, **entries: Any) -> None:
    (folder / "dataset_info.json").write_text(json.dumps(entries))


def test_what_dataset_info_says_is_used_and_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    dialog = [{"role": "asker", "content": "Q"}, {"role": "helper", "content": "A"}]
    path = write(tmp_path / "d.json", [{"dialog": dialog, "messages": turns("P", "B")}])
    without = open_dataset(path)
    before = without.fingerprint
    assert talk(sample(path))[0] == ("user", "P")
    tags = {"user_tag": "asker", "assistant_tag": "helper", "role_tag": "role", "content_tag": "content"}
    entry = {"file_name": "d.json", "formatting": "sharegpt", "columns": {"messages": "dialog"}, "tags": tags}
    info(tmp_path, mine=entry, same=entry)
    assert talk(sample(path))[0] == ("user", "Q")
    assert open_dataset(path).fingerprint != before
    assert talk(sample(path, columns="messages=messages"))[0] == ("user", "P")
    assert open_dataset(path, columns="messages=messages").fingerprint == before


def test_what_dataset_info_says_of_other_files_does_not_matter(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", [{"messages": turns("P", "B")}])
    before = open_dataset(path).fingerprint
    info(tmp_path, other={"file_name": "e.json", "columns": {"messages": "x"}}, features={"a": 1}, version="1")
    assert open_dataset(path).fingerprint == before


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"a": {"file_name": "d.json", "ranking": True}}, "'a' holds preferences"),
        (
            {"a": {"file_name": "d.json", "columns": {"messages": "x"}}, "b": {"file_name": "d.json"}},
            "in different ways",
        ),
        ({"a": {"file_name": "d.json", "columns": {"messages": "x"}}}, "dataset_info.json says messages=x, but no row"),
    ],
)
def test_a_dataset_info_that_does_not_fit_is_one_message(tmp_path: Path, entries: Record, expected: str) -> None:
    path = write(tmp_path / "d.json", [{"messages": turns("P", "B")}])
    info(tmp_path, **entries)
    with pytest.raises((DataError, ConfigError), match=expected):
        open_dataset(path)


# ---------------------------------------------------------------- folders


def test_files_of_different_layouts_are_no_dataset(tmp_path: Path) -> None:
    write(tmp_path / "a.json", [{"messages": turns("Q", "A")}])
    write(tmp_path / "b.jsonl", [{"query": "Q", "response": "A"}])
    with pytest.raises(DataError, match=r"a.json and b.jsonl hold rows of different layouts"):
        open_dataset(tmp_path)


def test_splits_are_not_thrown_together(tmp_path: Path) -> None:
    for split, answer in (("train", "A"), ("test", "B")):
        write(tmp_path / f"{split}.jsonl", [{"query": "Q", "response": answer}])
    with pytest.raises(DataError, match="several datasets"):
        open_dataset(tmp_path)
    assert talk(sample(Path(f"{tmp_path}:test")))[-1] == ("assistant", "B")


def test_a_pattern_names_its_files(tmp_path: Path) -> None:
    for number in (2, 10):
        write(tmp_path / f"part-{number}.jsonl", [{"query": "Q", "response": str(number)}])
    dataset = open_dataset(tmp_path / "part-*.jsonl")
    assert [row.turns[1].text for row in rows_of(dataset) if isinstance(row, Sample)] == ["2", "10"]
    assert dataset.image_root == tmp_path


def test_a_folder_without_rows_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="a folder that holds no dataset"):
        open_dataset(tmp_path)
