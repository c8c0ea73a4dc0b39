import hashlib
import json
import os
import pickle
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visgain.data import open_dataset
from visgain.errors import DataError
from visgain.types import IMAGE_MARK, Sample, Skipped, Turn

REAL = Path(__file__).parents[2] / "shared" / "data"


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


QA = [human("Which colour?"), gpt("Red.")]


def write(folder: Path, rows: object, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def read(folder: Path, row: object) -> Sample | Skipped:
    """The row, in a file that has another one, to be told by as what it is."""
    return open_dataset(write(folder, [row, {"conversations": QA}]))[0]


def read_sample(folder: Path, row: object) -> Sample:
    result = read(folder, row)
    assert isinstance(result, Sample), result
    return result


def reason(folder: Path, row: object) -> str:
    result = read(folder, row)
    assert isinstance(result, Skipped), result
    return result.reason


def texts(sample: Sample) -> list[str]:
    return [turn.text for turn in sample.turns]


# ---------------------------------------------------------------- rows that become samples


def test_a_row_becomes_a_sample_with_its_turns_and_image(tmp_path: Path) -> None:
    row = {"id": "a", "image": "coco/1.jpg", "conversations": [human("<image>\nWhat?"), gpt("A cat.")]}
    sample = read_sample(tmp_path, row)
    assert sample.turns == (Turn(role="user", text="<image>\nWhat?"), Turn(role="assistant", text="A cat."))
    assert [image.key for image in sample.images] == ["coco/1.jpg"]
    assert (sample.row, sample.id, sample.source) == (0, "a", "coco")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("000000033471", "000000033471"),
        (33, "33"),
        (1.5, "1.5"),
        (True, "true"),
        (["a", 1], '["a", 1]'),
        ("", ""),
        ("caf\u00e9", "caf\u00e9"),
        ("\ud800", "\\ud800"),
    ],
)
def test_an_id_of_any_type_survives_as_text(tmp_path: Path, value: object, text: str) -> None:
    assert read_sample(tmp_path, {"id": value, "conversations": QA}).id == text


def test_a_missing_or_null_id_is_the_row_number(tmp_path: Path) -> None:
    dataset = open_dataset(write(tmp_path, [{"conversations": QA}, {"id": None, "conversations": QA}]))
    assert [dataset[0].id, dataset[1].id] == ["0", "1"]


def test_a_missing_mark_is_put_at_the_front_of_the_first_human_turn(tmp_path: Path) -> None:
    row = {"image": ["a.jpg", "b.jpg"], "conversations": [*QA, human("Sure?"), gpt("Yes.")]}
    assert texts(read_sample(tmp_path, row)) == ["<image>\n<image>\nWhich colour?", "Red.", "Sure?", "Yes."]


def test_a_mark_in_the_middle_or_in_a_later_turn_stays_where_it_is(tmp_path: Path) -> None:
    first = "Is this <image> like the next?"
    row = {"image": ["a.jpg", "b.jpg"], "conversations": [human(first), gpt("Show it."), human("<image>"), gpt("Yes.")]}
    assert texts(read_sample(tmp_path, row)) == [first, "Show it.", "<image>", "Yes."]


@pytest.mark.parametrize("image", [None, []])
def test_a_row_without_image_is_text_only(tmp_path: Path, image: object) -> None:
    sample = read_sample(tmp_path, {"image": image, "conversations": QA})
    assert sample.images == ()
    assert sample.source == "text"
    assert texts(sample) == ["Which colour?", "Red."]


def test_turns_before_the_first_human_turn_are_dropped(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "system", "value": "Be brief."}, gpt("Hello."), *QA]}
    assert texts(read_sample(tmp_path, row)) == ["Which colour?", "Red."]


def test_a_last_human_turn_without_answer_is_dropped(tmp_path: Path) -> None:
    assert texts(read_sample(tmp_path, {"conversations": [*QA, human("And then?")]})) == ["Which colour?", "Red."]


def test_user_and_assistant_are_read_as_human_and_gpt(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]}
    assert [turn.role for turn in read_sample(tmp_path, row).turns] == ["user", "assistant"]


def test_one_empty_answer_among_others_is_kept(tmp_path: Path) -> None:
    row = {"conversations": [*QA, human("More?"), gpt("")]}
    assert read_sample(tmp_path, row).answers == ("Red.", "")


@pytest.mark.parametrize(
    ("fields", "source"),
    [
        ({"image": "coco/train2017/x.jpg"}, "coco"),
        ({"image": "./vg/../coco/x.jpg"}, "coco"),
        ({"image": ["gqa/1.jpg", "coco/2.jpg"]}, "gqa"),
        ({"image": "x.jpg"}, "data"),
        ({"image": "/abs/x.jpg"}, "data"),
        ({"image": "../x.jpg"}, "data"),
        ({"image": ""}, "data"),
        ({"image": "coco/x.jpg", "source": "mine"}, "mine"),
        ({"image": "coco/x.jpg", "data_source": "theirs"}, "theirs"),
        ({"image": "coco/x.jpg", "source": 3}, "coco"),
        ({"source": "alpaca"}, "alpaca"),
        ({}, "text"),
    ],
)
def test_the_source_is_said_by_the_row_or_its_image_folder_or_the_file(
    tmp_path: Path, fields: dict[str, object], source: str
) -> None:
    assert read_sample(tmp_path, {**fields, "conversations": QA}).source == source


# ---------------------------------------------------------------- rows that are skipped


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (5, "the row is a number, not an object"),
        (None, "the row is null, not an object"),
        ([], "the row is a list, not an object"),
        ({}, "the row has no conversations"),
        ({"conversations": QA, "video": "a.mp4"}, "video not found: a.mp4, nor frames in a"),
        ({"conversations": None}, "the row has no conversations"),
        ({"conversations": []}, "the row has no conversations"),
        ({"conversations": "hi"}, "conversations is a string, not a list"),
        ({"conversations": ["hi"]}, "turn 0 is a string, not an object"),
        ({"conversations": [{"value": "hi"}]}, "'from' of turn 0 is null, not a role"),
        ({"conversations": [{"from": {}, "value": "hi"}]}, "'from' of turn 0 is an object, not a role"),
        ({"conversations": [human("Q"), {"from": "robot", "value": "A"}]}, "turn 1 has the unknown role 'robot'"),
        ({"conversations": [human("Q"), {"from": "gpt"}]}, "'value' of turn 1 is null, not a string"),
        ({"conversations": [human("Q"), gpt("\ud83d")]}, "turn 1 holds half a surrogate pair"),
        ({"conversations": [gpt("A")]}, "no user turn"),
        ({"conversations": [human("Q")]}, "no answer"),
        ({"conversations": [gpt("A"), human("Q")]}, "no answer"),
        ({"conversations": [human("Q"), gpt(" \n")]}, "every answer is empty"),
        ({"conversations": [human("Q"), human("Q"), gpt("A")]}, "do not alternate: user after user"),
        ({"conversations": [*QA, human("Q"), human("Q")]}, "do not alternate: user after user"),
        ({"conversations": [*QA, gpt("A")]}, "do not alternate: assistant after assistant"),
        ({"conversations": [*QA, {"from": "system", "value": "S"}]}, "do not alternate: system after assistant"),
        ({"conversations": [human("<image>"), gpt("A")]}, "has no image but its text holds <image> 1 times"),
        (
            {"image": ["a", "b"], "conversations": [human("<image><image><image>"), gpt("A")]},
            "has 2 images but its text holds <image> 3 times",
        ),
        (
            {"image": ["a", "b"], "conversations": [human("<image>"), gpt("A")]},
            "has 2 images but its text holds <image> 1 times",
        ),
        ({"image": "a", "conversations": [human("Q"), gpt("<image>")]}, "turn 1 (assistant) holds <image>"),
        ({"image": "a", "conversations": [gpt("<image>"), *QA]}, "turn 0 (assistant) holds <image>"),
        (
            {"image": "a", "conversations": [*QA, human("<image> and this?")]},
            "the last user turn holds an image and has no answer",
        ),
        ({"image": 3, "conversations": QA}, "'image' holds a number, not a path"),
        ({"image": ["a", None], "conversations": QA}, "'image' holds null, not a path"),
        ({"image": {"name": "a"}, "conversations": QA}, "'image' holds an object, not a path"),
    ],
)
def test_a_row_that_cannot_be_scored_is_skipped_with_the_reason(tmp_path: Path, row: object, expected: str) -> None:
    assert expected in reason(tmp_path, row)


def test_a_skipped_row_keeps_its_identity_and_its_neighbours_stay(tmp_path: Path) -> None:
    bad = {"id": 7, "image": ["coco/1.jpg", "coco/2.jpg"], "conversations": [human("<image>"), gpt("A")]}
    dataset = open_dataset(write(tmp_path, [{"id": 6, "conversations": QA}, bad, {"id": 8, "conversations": QA}]))
    assert [dataset[row].id for row in range(3)] == ["6", "7", "8"]
    skipped = dataset[1]
    assert isinstance(skipped, Skipped)
    assert (skipped.row, skipped.source, skipped.n_images) == (1, "coco", 2)
    assert -(2**63) <= skipped.fingerprint < 2**63
    changed = read(tmp_path, {**bad, "id": 9})
    assert isinstance(changed, Skipped)
    assert changed.fingerprint not in (0, skipped.fingerprint)


# ---------------------------------------------------------------- hostile rows

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
_TEXT = st.one_of(
    st.lists(st.sampled_from(["<image>", "why", "\n", "", "\ud800", "\0"]), max_size=4).map("".join), _JSON
)
_TURN = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "user", "assistant", "system", "bot"]) | _JSON, "value": _TEXT}
)
_PATH = st.sampled_from(["a.jpg", "coco/b.jpg", "", "/", ".", "..", "\0", "http://x/y", "\udc80/c"]) | _JSON
_ROW = _JSON | st.fixed_dictionaries(
    {"conversations": st.lists(_TURN, max_size=5) | _JSON},
    optional={"id": _JSON, "image": st.lists(_PATH, max_size=3) | _PATH, "source": _JSON},
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@given(rows=st.lists(_ROW, min_size=1, max_size=5))
@settings(max_examples=150, deadline=None)
def test_whatever_json_holds_each_row_is_a_sample_or_skipped(scratch: Path, rows: list[object]) -> None:
    dataset = open_dataset(write(scratch, [*rows, {"conversations": QA}]))
    assert len(dataset) == len(rows) + 1
    for row in range(len(rows)):
        result = dataset[row]
        assert result.row == row
        result.id.encode()
        result.source.encode()
        if isinstance(result, Skipped):
            assert result.reason.isprintable()
            result.reason.encode()
        else:
            check_invariants(result)


def check_invariants(sample: Sample) -> None:
    roles = [turn.role for turn in sample.turns]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert roles
    marks = [(turn.role, turn.text.count(IMAGE_MARK)) for turn in sample.turns]
    assert sum(count for role, count in marks if role == "user") == len(sample.images)
    assert all(count == 0 for role, count in marks if role == "assistant")
    assert any(answer.strip() for answer in sample.answers)
    for turn in sample.turns:
        turn.text.encode()
    assert isinstance(sample.fingerprint, int)


# ---------------------------------------------------------------- files


def test_json_and_jsonl_give_the_same_rows_whatever_the_name(tmp_path: Path) -> None:
    rows = [{"id": index, "conversations": QA} for index in range(3)]
    lines = tmp_path / "lines.json"
    lines.write_text("\n\n".join(json.dumps(row) for row in rows) + "\r\n", encoding="utf-8")
    whole = write(tmp_path, rows, name="whole.jsonl")
    first, second = open_dataset(lines), open_dataset(whole)
    assert [first[row] for row in range(len(first))] == [second[row] for row in range(len(second))]
    assert len(first) == 3


def test_a_line_separator_inside_of_a_string_does_not_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    row = {"conversations": [human("a\u2028b\x85c"), gpt("d")]}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    sample = open_dataset(path)[0]
    assert isinstance(sample, Sample)
    assert sample.turns[0].text == "a\u2028b\x85c"


def test_a_byte_order_mark_and_leading_blanks_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(b"\xef\xbb\xbf \n" + json.dumps([{"conversations": QA}]).encode())
    assert len(open_dataset(path)) == 1


def test_one_row_is_a_dataset_when_the_name_says_lines(tmp_path: Path) -> None:
    assert len(open_dataset(write(tmp_path, {"conversations": QA}, name="data.jsonl"))) == 1


def test_duplicate_keys_and_nan_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(f'[{{"id": 1, "id": NaN, "conversations": {json.dumps(QA)}}}]')
    assert open_dataset(path)[0].id == "NaN"


DEEP = "[" * 100_000
MALFORMED = {
    "cut in a row": ('[{"id": 1}, {"id": ', ["byte 19", "line 1, column 20", "copy or download the file again"]),
    "cut in a string": ('[{"id": "abc', ["byte 8", "copy or download the file again"]),
    "cut after a row": ('[{"id": 1}\n', ["copy or download the file again"]),
    "wrong in the middle": ('[{"id": 1},\n {id: 2}]', ["line 2, column 3", "mend the file there"]),
    "empty list": ("[]", ["holds no rows"]),
    "empty file": ("", ["holds no rows"]),
    "blank file": (" \n ", ["holds no rows"]),
    "one object": ('{"id": 1,\n "conversations": []}', ["one JSON object, not a list of rows"]),
    "one object in one line": ('{"id": 1}', ["one JSON object, not a list of rows"]),
    "bad line": ('{"id": 1}\n{"id": 2}\n\n{"id": \n{"id": 5}', ["line 4, column 8 (byte 28)", "data.json"]),
    "bad first line": ('{"id": \n{"id": 5}', ["line 1, column 8", "data.json"]),
    "no JSON": ("id,image\n1,a.jpg\n", ["no known data format (", "json"]),
    "a top level that is no list": ('"text"', ["no known data format"]),
    "deep nesting": (DEEP, ["nested too deeply"]),
    "deep nesting in a line": ('{"a": ' + DEEP, ["line 1", "nested too deeply"]),
    "endless number": ("[" + "1" * 5000 + "]", ["not valid JSON", "digits"]),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_one_error_that_says_where_and_what_to_do(tmp_path: Path, case: str) -> None:
    text, expected = MALFORMED[case]
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        open_dataset(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    for part in expected:
        assert part in str(caught.value)


@given(cut=st.integers(min_value=1, max_value=200))
@settings(deadline=None)
def test_a_file_cut_anywhere_is_never_read_as_a_shorter_dataset(scratch: Path, cut: int) -> None:
    path = write(scratch, [{"id": "caf\u00e9", "image": "a.jpg", "conversations": QA}] * 3, name="cut.json")
    whole = path.read_bytes()
    path.write_bytes(whole[: max(1, len(whole) - cut)])
    with pytest.raises(DataError):
        open_dataset(path)


def test_text_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(json.dumps([{"id": "caf\u00e9"}], ensure_ascii=False).encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        open_dataset(path)
    path.write_bytes(json.dumps([{"id": 1}]).encode("utf-16"))
    with pytest.raises(DataError, match="UTF-8"):
        open_dataset(path)


def test_what_is_not_a_dataset_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; check --data"):
        open_dataset(tmp_path / "missing.json")
    with pytest.raises(DataError, match="is a folder that holds no dataset"):
        open_dataset(tmp_path, tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data.json")
    with pytest.raises(DataError, match="not a regular file"):
        open_dataset(tmp_path / "data.json")


def test_the_image_folder_must_exist_and_defaults_to_the_folder_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, [{"image": "a.jpg", "conversations": QA}])
    assert open_dataset(path).image_root == tmp_path
    with pytest.raises(DataError, match="check --image-root"):
        open_dataset(path, tmp_path / "missing")
    with pytest.raises(DataError, match="check --image-root"):
        open_dataset(path, path)


def test_limits_of_the_dataset_reach_its_images(tmp_path: Path) -> None:
    path = write(tmp_path, [{"image": "a.jpg", "conversations": QA}])
    (image,) = read_images(open_dataset(path, max_pixels=5, follow_links=True)[0])
    assert (image.root, image.max_pixels, image.follow_links) == (tmp_path, 5, True)  # type: ignore[attr-defined]


def read_images(result: Sample | Skipped) -> tuple[object, ...]:
    assert isinstance(result, Sample)
    return result.images


def test_the_fingerprint_is_the_hash_of_the_bytes(tmp_path: Path) -> None:
    path = write(tmp_path, [{"conversations": QA}])
    expected = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    assert open_dataset(path).fingerprint == expected
    assert open_dataset(write(tmp_path, [{"conversations": QA}], name="copy.json")).fingerprint == expected
    path.write_text(path.read_text() + " ")
    assert open_dataset(path).fingerprint != expected


def test_a_dataset_survives_pickling(tmp_path: Path) -> None:
    dataset = open_dataset(write(tmp_path, [{"image": "a.jpg", "conversations": QA}]))
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[0] == dataset[0]
    assert copy.fingerprint == dataset.fingerprint


def test_a_row_outside_of_the_dataset_is_an_index_error(tmp_path: Path) -> None:
    dataset = open_dataset(write(tmp_path, [{"conversations": QA}]))
    for row in (-1, 1):
        with pytest.raises(IndexError):
            dataset[row]


# ---------------------------------------------------------------- real files


def real(name: str) -> Path:
    path = REAL / name
    if not path.exists():
        pytest.skip(f"real data {name} is not on this machine")
    return path


def test_every_row_of_the_real_mixture_is_read() -> None:
    dataset = open_dataset(real("mix.json"))
    rows = [dataset[row] for row in range(len(dataset))]
    assert len(rows) == 4720
    samples = [row for row in rows if isinstance(row, Sample)]
    assert len(samples) == len(rows)
    for sample in samples:
        check_invariants(sample)
    sources = Counter(sample.source for sample in samples)
    assert sources["text"] == 300 == sum(not sample.images for sample in samples)
    assert sources["daquar"] == 1157
    assert max(len(sample.images) for sample in samples) > 1


@pytest.mark.parametrize(
    "name",
    [
        "formats/llava_instruct_100/llava_instruct_100.json",
        "formats/scienceqa_llava/llava_test_CQM-A.json",
        "formats/lmms_finetune/single_image.json",
        "formats/lmms_finetune/single_image_has_text_only.json",
        "formats/lmms_finetune/multi_images.json",
        "formats/qwen_vl_finetune/demo/single_images.json",
        "flickr8k/llava_align.json",
        "coco/llava_captions.json",
        "mantis_chat/llava.json",
    ],
)
def test_real_llava_files_are_read_without_a_skipped_row(name: str) -> None:
    dataset = open_dataset(real(name))
    for row in range(len(dataset)):
        result = dataset[row]
        assert isinstance(result, Sample), result
        check_invariants(result)
