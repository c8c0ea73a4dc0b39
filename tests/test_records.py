"""Files of benchmarks: read, or refused with one message, whatever is in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from visgain.errors import DataError
from visgain.evaluation import hub
from visgain.evaluation.benchmark import Benchmark, Item, Question
from visgain.evaluation.blind_faith import BlindFaith
from visgain.evaluation.chair import Chair
from visgain.evaluation.cvbench import CVBench
from visgain.evaluation.docvqa import DocVQA
from visgain.evaluation.mmbench import MMBench
from visgain.evaluation.pope import Pope
from visgain.evaluation.records import Record, read_json, read_records, unique

CHOICES = {"question": "What?", "choices": ["3", "2"], "answer": "(A)", "prompt": "What?", "task": "Count"}
OPTIONS = {"question": "What?", "hint": "", "A": "cat", "B": "dog", "answer": "A", "category": "c", "image": "aGk="}
ROWS: dict[str, tuple[Benchmark, str, dict[str, Any]]] = {
    "pope": (Pope(), "coco_pope_random.json", {"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "yes"}),
    "cvbench": (CVBench(), "test.jsonl", {"idx": 1, "type": "2D", "source": "COCO", "filename": "a.png", **CHOICES}),
    "docvqa": (DocVQA(), "val.json", {"questionId": 1, "question": "Who?", "image": "a.png", "answers": ["x"]}),
    "mmbench": (MMBench(), "mmbench.json", {"index": 1, **OPTIONS}),
    "blind_faith": (
        BlindFaith(),
        "vqa.jsonl",
        {
            "question_id": 1,
            "question": "?",
            "answers": ["a"],
            "text_type": "match",
            "additional_info": "t",
            "image": "a",
        },
    ),
}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["yes", "\ud800", "[", "['a'", "None", "(A)", "٣", "1e9", "../x", "\0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def read_or_told(read: Callable[[], list[Any]]) -> tuple[list[Any], str]:
    """What is read, or nothing and the message."""
    try:
        return read(), ""
    except DataError as error:
        return [], str(error)


@pytest.mark.parametrize("name", list(ROWS))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_row_with_anything_in_it_is_read_or_refused(tmp_path: Path, name: str, data: st.DataObject) -> None:
    benchmark, file, row = ROWS[name]
    field = data.draw(st.sampled_from(list(row)))
    path = tmp_path / file
    changed = row | {field: data.draw(VALUES)}
    path.write_text(json.dumps(changed) + "\n", encoding="utf-8")
    questions, told = read_or_told(lambda: benchmark.questions(path, None))
    assert "\n" not in told
    assert len(told) < 1000
    assert bool(questions) != bool(told)
    items = [Item(question=question, prediction="A") for question in questions]
    benchmark.score(items, next(iter(benchmark.variants)))


REPLIES = [
    *["", " \n", "\u2028\x85", "\U0001f600 \u200f", "No" * 50_000, "A" + "\u0301" * 500, "\0", "yes\tno", "'"],
    *["\U0001d40d\U0001d428", "\uff08\uff21\uff09", "-" * 3000, "bus-" * 2000, "1" * 5000, "answer is" * 1000, "<NA>"],
]  # fmt: skip


@pytest.mark.parametrize("name", [*ROWS, "chair"])
def test_odd_replies_never_make_a_wrong_number(name: str, tmp_path: Path) -> None:
    if name == "chair":
        (tmp_path / "objects.json").write_text('{"1": ["dog"]}')
        benchmark: Benchmark = Chair()
        [question] = benchmark.questions(tmp_path, None)
    else:
        benchmark, file, row = ROWS[name]
        (tmp_path / file).write_text(json.dumps(row) + "\n")
        question = benchmark.questions(tmp_path / file, None)[0]
    for variant in [one for one in benchmark.variants if one != "wordnet"]:
        for reply in REPLIES:
            scored = benchmark.score([Item(question=question, prediction=reply)], variant)
            for metric, value in scored.metrics.items():
                found = value(np.ones(1))
                assert np.isnan(found) or found >= 0
                assert np.isnan(found) or found <= 100 or metric == "length"


# ---------------------------------------------------------------- formats


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '[{"id": "1", "t": "ä\\u2028"}, {"id": "2", "t": ""}]'),
        ("a.json", '\ufeff{"id": "1", "t": "ä\u2028"}\r\n\r\n{"id": "2", "t": ""}'),
        ("a.jsonl", '{"id": "1", "t": "ä\u2028"}\n{"id": "2", "t": ""}\n'),
        ("a.json", '{"data": [{"id": "1", "t": "ä\u2028"}, {"id": "2", "t": ""}], "more": 1}'),
        ("a.tsv", "id\tt\r\n1\tä\u2028\r\n2\t\r\n"),
        ("a.csv", '\ufeffid,t\n1,"ä\u2028"\n\n2,\n'),
    ],
)
def test_rows_are_the_same_in_every_format(tmp_path: Path, name: str, text: str) -> None:
    rows = read_records(write(tmp_path / name, text), inside="data")
    assert [(row.id("id"), row.text("t")) for row in rows] == [("1", "ä\u2028"), ("2", "")]


@example(text="{")
@given(text=st.text(max_size=40) | st.text('{}[]",:\n\t 1a', max_size=30))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.tsv", "a.csv", "a.parquet"])
def test_any_bytes_are_rows_or_an_error(tmp_path: Path, name: str, text: str) -> None:
    rows, told = read_or_told(lambda: read_records(write(tmp_path / name, text)))
    assert name in told or not told
    assert all(isinstance(row, Record) for row in rows)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": ', "line 2 of .* is not valid JSON"),
        ("a.jsonl", '{"a": 1}\n[1]', r"line 2 of .* is \[1\], not a JSON object"),
        ("a.json", "[1]", "entry 1 of .* is 1, not a JSON object"),
        ("a.json", "no JSON", "neither valid JSON .* nor one JSON object a line"),
        ("a.json", "[" * 100_000, "neither valid JSON"),
        ("a.tsv", "a\ta\n1\t2\n", "more than one column called 'a'"),
        ("a.tsv", "a\tb\n1\t2\t3\n", "row 1 of .* has 3 cells; the header names 2"),
        ("a.parquet", "PAR1", "cannot read the table"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, name: str, text: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_records(write(tmp_path / name, text))


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    for read in (read_records, read_json):
        with pytest.raises(DataError, match=r"cannot read .*No such file"):
            read(tmp_path / "nothing.json")
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe4"}')
    with pytest.raises(DataError, match="cannot read"):
        read_json(tmp_path / "latin.json")


def test_a_large_cell_is_read_and_the_limit_is_left_as_it_was(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    [row] = read_records(write(tmp_path / "a.tsv", "a\tb\n" + "x" * 1_000_000 + "\ty\n"))
    assert len(row.text("a")) == 1_000_000
    assert csv.field_size_limit() == before


def test_parquet_without_pictures_and_with_plain_bytes(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1, 2], "t": ["a", None]}), tmp_path / "a.parquet")
    rows = read_records(tmp_path / "a.parquet")
    assert rows[0].id("id") == "1"
    with pytest.raises(DataError, match=r"row 2 of .*'t' is None, not a string"):
        rows[1].text("t")
    pq.write_table(pa.table({"image": pa.array([b"1", b"2"])}), tmp_path / "b.parquet")
    rows = read_records(tmp_path / "b.parquet")
    assert rows[0].image("image", tmp_path).key != rows[1].image("image", tmp_path).key


def test_a_cell_without_bytes_is_its_path_or_nothing(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": b"x", "path": "b"}, {"bytes": None, "path": "a.jpg"}, None, {"bytes": None, "path": None}]
    pq.write_table(pa.table({"image": pa.array(cells, kind), "t": ["1"] * 4}), tmp_path / "a.parquet")
    rows = read_records(tmp_path / "a.parquet")
    assert len(rows[0].image("image", tmp_path).key) == 32
    assert rows[1].image("image", tmp_path).key == "a.jpg"
    for row in rows[2:]:
        with pytest.raises(DataError, match="'image' is None, not a picture"):
            row.image("image", tmp_path)


def test_questions_have_keys_of_their_own() -> None:
    def asked(*keys: str) -> list[Question]:
        return [Question(id=key[1:], split=key[0], prompt="?") for key in keys]

    assert len(unique(asked("a1", "b1"), Path("x"))) == 2
    with pytest.raises(DataError, match="x has 2 ids more than once: a/1, b/2"):
        unique(asked("a1", "a1", "b2", "b2", "c1"), Path("x"))
    with pytest.raises(DataError, match="holds no questions"):
        unique([], Path("x"))


def test_the_hub_is_asked_by_name_and_its_failure_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[Any] = []

    def found(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        return str(tmp_path)

    def unreachable(repository: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("no network,\nno cache")

    def with_hub(download: Callable[..., str]) -> None:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    with_hub(found)
    assert hub.local_copy(tmp_path, "a/b", ["*"], "here") == tmp_path
    assert asked == []
    assert hub.local_copy(Path("a/b"), "a/b", ["*.parquet"], "here") == tmp_path
    assert asked == [("a/b", {"repo_type": "dataset", "allow_patterns": ["*.parquet"]})]
    with_hub(unreachable)
    with pytest.raises(DataError, match=r"cannot download a/b .*no network, no cache.*\(here\)"):
        hub.local_copy(Path("a/b"), "a/b", ["*"], "here")
    with pytest.raises(DataError, match=r"a/c does not exist; name a file, a folder, or a/b"):
        hub.local_copy(Path("a/c"), "a/b", ["*"], "here")
