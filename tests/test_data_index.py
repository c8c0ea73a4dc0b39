"""JSON and CSV files are found out about once: where the rows begin, the hash, the fields."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visgain.data import csvtext, index, jsontext, open_dataset
from visgain.data.cache import cache_folder
from visgain.data.csvtext import CsvRows
from visgain.data.jsontext import JsonRows
from visgain.data.records import Columns, Rows
from visgain.errors import DataError

TURNS = [{"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "R\u00f6tlich \u2028 \U0001f34e."}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


_parsed: list[Path] = []
_build = jsontext.build_index


def counted_build(path: Path) -> index.RowIndex:
    _parsed.append(path)
    return _build(path)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were parsed as a whole, each time; also small ones are kept."""
    _parsed.clear()
    monkeypatch.setattr(jsontext, "build_index", counted_build)
    monkeypatch.setattr(index, "KEPT_BYTES", 0)
    return _parsed


def rows_of(n: int) -> list[dict[str, object]]:
    return [{"id": f"{row:012d}", "conversations": TURNS} for row in range(n)]


def read_all(rows: Rows) -> list[Any]:
    return [rows[row] for row in range(len(rows))]


def settle(path: Path) -> Path:
    """As if it had been written a minute ago."""
    os.utime(path, (time.time() - 60,) * 2)
    return path


def write_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return settle(path)


# ---------------------------------------------------------------- rows are what json.loads makes of the file

_VALUE = st.recursive(
    st.none() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


def small_pieces(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(index, "_PIECE", size)


@given(
    rows=st.lists(_VALUE.filter(lambda row: not isinstance(row, list)), min_size=1, max_size=6),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    piece=st.integers(3, 40),
    bom=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_rows_are_those_of_the_whole_file_wherever_its_pieces_end(
    scratch: Path, rows: list[object], indent: int | None, ascii_only: bool, piece: int, bom: bool
) -> None:
    path = scratch / "rows.json"
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path.write_text("\ufeff" * bom + text + "\r\n ", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch, piece)
        assert read_all(JsonRows(path)) == json.loads(text)
        lines = "\r\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
        path.write_text("\ufeff" * bom + lines, encoding="utf-8")
        if len(rows) > 1 and not lines.lstrip().startswith("["):
            assert read_all(JsonRows(path)) == rows


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"a": 1}, {"b" 2}]', ["Expecting ':' delimiter at line 1, column 17 (byte 16)", "mend the file there"]),
        ('[{"a": 1}\n {"b": 2}]', ["Expecting ',' delimiter at line 2, column 2 (byte 11)"]),
        ('[{"a": "\u00e9\u00e9"}, {"b": tru}]', ["at line 1, column 21 (byte 22)"]),
        ('[{"a": 1}, {"b": "x', ["Unterminated string", "copy or download the file again"]),
        ('[{"a": 1}, {"b": 2}', ["copy or download the file again"]),
        ('[{"a": 1}, {"b": 2},', ["copy or download the file again"]),
        ('[{"a": 1}, {"b": 2},]', ["line 1, column 21"]),
        ('[{"a": 1}] {"b": 2}', ["Extra data at line 1, column 12"]),
        ('[{"a": "x\ny"}]', ["control character", "line 1, column 10"]),
        ('{"a": 1}\n{"b": 2} 3\n', ["Extra data at line 2, column 10"]),
        ('{"a": 1}\n{"b": 2,\n"c": 3}\n', ["line 2, column 9", "the end is missing"]),
        ('{"a": 1}\n\n{"b": [1, 2}\n{"c": 4}', ["line 3, column 12", "mend"]),
        ('{"a": 1}\n{"b": "\\u12"}', ["line 2", "escape"]),
    ],
)
def test_what_is_wrong_is_said_with_its_place_wherever_the_pieces_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: list[str], piece: int
) -> None:
    small_pieces(monkeypatch, piece)
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        JsonRows(path)
    assert all(part in str(caught.value) for part in said), caught.value


def test_a_row_larger_than_a_piece_of_the_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch, 100)
    rows = [{"a": "x" * size} for size in (5, 5000, 50, 20_000)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    assert read_all(JsonRows(path)) == rows
    write_lines(path, list(rows))
    assert read_all(JsonRows(path)) == rows


def test_lines_that_are_lists_of_turns_are_rows(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    path = write_lines(tmp_path / "talks.jsonl", [talk, talk, talk])
    assert read_all(JsonRows(path)) == [{"messages": talk}] * 3
    assert len(open_dataset(path)) == 3


def test_where_text_is_not_utf8_is_said_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch, 5)
    path = tmp_path / "bad.json"
    path.write_bytes(b'[{"a": "\xc3\xa9\xe2\x82"}]')  # the euro sign lacks its last byte
    with pytest.raises(DataError, match=r"not UTF-8 text \(byte 10\)"):
        JsonRows(path)


# ---------------------------------------------------------------- the index is kept


def test_the_second_opening_parses_nothing_and_maps_the_index(tmp_path: Path, parsed: list[Path]) -> None:
    path = write_lines(tmp_path / "data.jsonl", list(rows_of(50)))
    first, second = JsonRows(path), JsonRows(path)
    assert parsed == [path]
    assert read_all(first) == read_all(second) == rows_of(50)
    assert first.fingerprint == second.fingerprint == hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    assert first.fields == second.fields == {"id", "conversations"}
    assert isinstance(second._file.index.starts, np.memmap)


def test_the_index_belongs_to_the_file_as_it_is(tmp_path: Path, parsed: list[Path]) -> None:
    path = write_lines(tmp_path / "data.jsonl", list(rows_of(3)))
    JsonRows(path)
    write_lines(path, list(rows_of(4)))
    assert len(JsonRows(path)) == 4
    rows = list(rows_of(4))
    rows[0]["id"] = "x" * 12  # of the same length, at another time
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    os.utime(path, (time.time() - 30,) * 2)
    assert JsonRows(path)[0]["id"] == "x" * 12
    assert len(parsed) == 3


def test_a_file_that_was_just_written_is_not_trusted_to_stay(tmp_path: Path, parsed: list[Path]) -> None:
    path = write_lines(tmp_path / "data.jsonl", list(rows_of(3)))
    os.utime(path)
    JsonRows(path)
    assert not cache_folder().exists()


def kept_files() -> list[Path]:
    return [path for path in cache_folder().iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize("harm", ["cut", "empty", "flipped", "garbage"])
def test_a_damaged_index_is_made_again(tmp_path: Path, parsed: list[Path], harm: str) -> None:
    path = write_lines(tmp_path / "data.jsonl", list(rows_of(40)))
    JsonRows(path)
    (kept,) = kept_files()
    content = bytearray(kept.read_bytes())
    content[140] ^= 8
    damaged = {"cut": content[:100], "empty": b"", "flipped": content, "garbage": b"no numpy file" * 40}[harm]
    kept.write_bytes(damaged)
    assert read_all(JsonRows(path)) == rows_of(40)
    assert read_all(JsonRows(path)) == rows_of(40)
    assert len(parsed) == 2


def test_without_a_cache_the_index_is_in_memory(
    tmp_path: Path, parsed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = write_lines(tmp_path / "data.jsonl", list(rows_of(5)))
    assert read_all(JsonRows(path)) == rows_of(5)
    assert parsed == [path]
    assert read_all(pickle.loads(pickle.dumps(JsonRows(path)))) == rows_of(5)


def test_a_malformed_file_leaves_nothing_behind(tmp_path: Path, parsed: list[Path]) -> None:
    path = settle(write_lines(tmp_path / "data.jsonl", [{"a": 1}, "x"]))
    path.write_text(path.read_text() + "\n{")
    settle(path)
    for _ in range(2):
        with pytest.raises(DataError, match="line 3, column 2"):
            JsonRows(path)
    assert kept_files() == []


def test_a_malformed_file_is_parsed_once(tmp_path: Path, parsed: list[Path]) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 1}\n{"a"')
    with pytest.raises(DataError, match="line 2"):
        JsonRows(settle(path))
    assert parsed == [path]


def test_a_file_that_is_replaced_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "data.jsonl", list(rows_of(3)))

    def replaced_meanwhile(path: Path) -> index.RowIndex:
        other = write_lines(tmp_path / "other.jsonl", list(rows_of(5)))
        other.replace(path)
        return _build(path)

    monkeypatch.setattr(jsontext, "build_index", replaced_meanwhile)
    with pytest.raises(DataError, match="changed while it was read"):
        JsonRows(path)


def test_small_files_are_not_kept(tmp_path: Path) -> None:
    JsonRows(write_lines(tmp_path / "data.jsonl", list(rows_of(5))))
    assert not cache_folder().exists()


def test_a_pickled_dataset_carries_no_rows_and_finds_them_again(tmp_path: Path, parsed: list[Path]) -> None:
    path = write_lines(tmp_path / "data.jsonl", list(rows_of(2000)))
    dataset = open_dataset(path)
    content = pickle.dumps(open_dataset(path))
    assert len(content) < 2000
    copy = pickle.loads(content)
    assert [copy[row] for row in (0, 7, 1999)] == [dataset[row] for row in (0, 7, 1999)]
    assert copy.fingerprint == dataset.fingerprint
    assert len(parsed) == 1


def test_a_file_that_changes_under_an_open_dataset_is_an_error_and_no_other_row(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", list(rows_of(20)))
    rows, content = JsonRows(path), pickle.dumps(JsonRows(path))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="changed since it was opened"):
        rows[19]
    with pytest.raises(DataError, match="changed since it was opened"):
        pickle.loads(content)


def test_processes_that_open_a_file_at_once_all_get_it(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", list(rows_of(20_000)))
    assert path.stat().st_size > index.KEPT_BYTES
    code = "import sys, pathlib, visgain; print(visgain.open_dataset(pathlib.Path(sys.argv[1])).fingerprint)"
    started = [
        subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True, env=os.environ.copy())
        for _ in range(3)
    ]
    said = {process.communicate()[0].strip() for process in started}
    assert said == {hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()}
    assert len(kept_files()) == 1


# ---------------------------------------------------------------- CSV

_CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


@given(
    rows=st.lists(st.tuples(_CELL, _CELL), min_size=1, max_size=6),
    delimiter=st.sampled_from(",\t;"),
    line_end=st.sampled_from(["\n", "\r\n"]),
    piece=st.integers(3, 30),
    bom=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_cells_are_the_texts_that_were_written(
    scratch: Path, rows: list[tuple[str, str]], delimiter: str, line_end: str, piece: int, bom: bool
) -> None:
    path = scratch / "rows.csv"

    def cell(text: str) -> str:
        quoted = text.replace('"', '""')
        return f'"{quoted}"'

    lines = [f"prompt{delimiter}response", *(delimiter.join(map(cell, row)) for row in rows)]
    path.write_bytes(("\ufeff" * bom + line_end.join(lines)).encode())
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch, piece)
        read = CsvRows(path, Columns())
        assert [(row["prompt"] or "", row["response"] or "") for row in read_all(read)] == rows


def test_cells_are_not_numbers_and_lists_are_lists(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('id,query,response,images\n000033471,1.50,"[3]","[""a.jpg"", ""b.jpg""]"\n2,q,a,\n')
    dataset = open_dataset(path)
    first, second = dataset[0], dataset[1]
    assert (first.id, [image.key for image in first.images]) == ("000033471", ["a.jpg", "b.jpg"])  # type: ignore[union-attr]
    assert [turn.text for turn in first.turns] == ["<image>\n<image>\n1.50", "[3]"]  # type: ignore[union-attr]
    assert (second.id, second.source) == ("2", "text")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("query,response\na,b\nc\n", "line 3 of .* has 1 cells, its header 2"),
        ("query,response\na,b\nc,d,e\n", "line 3 of .* has 3 cells, its header 2"),
        ("query,response\n", "there is only a header"),
        ("query,query\na,b\n", "the name 'query' more than once"),
        ('query,response\na,b\n"c,d\n', "not valid CSV: unexpected end of data in the row from line 3 on"),
        ('query,response\na,"b"c\n', "not valid CSV"),
    ],
)
def test_a_malformed_table_is_one_error_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "data.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        open_dataset(path)


def test_a_table_is_indexed_once_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "KEPT_BYTES", 0)
    path = tmp_path / "data.tsv"
    path.write_text("query\tresponse\n" + "".join(f"q{row}\ta{row}\n" for row in range(9)))
    settle(path)
    first = open_dataset(path)
    monkeypatch.setattr(csvtext, "build_index", lambda path: pytest.fail("it is there"))
    second = open_dataset(path)
    assert [first[row] for row in range(9)] == [second[row] for row in range(9)]
    assert first.fingerprint == second.fingerprint
