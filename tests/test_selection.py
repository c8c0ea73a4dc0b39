"""Selection from files to files: against a naive reference, whatever the parts, and what it says about bad input."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given

from tiny_scores import (
    Record,
    answers,
    mixed_records,
    naive,
    patient,
    percents,
    scored,
    text_only,
    write_scores,
)
from visgain import columns, spill, storage
from visgain.config import SelectConfig
from visgain.errors import ConfigError, DataError, StorageError
from visgain.selection import run_select, selection_report
from visgain.types import Selection, Skipped, TokenScores


def select(folder: Path, records: Sequence[Record], **options: Any) -> tuple[dict[str, Any], Selection]:
    if not (folder / "scores").exists():
        write_scores(folder / "scores", records)
    record = run_select(SelectConfig(scores=folder / "scores", out=folder / "out", **options))
    return record, storage.read_selection(folder / "out")


def masks(selection: Selection) -> dict[int, list[bool]]:
    return dict(zip(selection.rows.tolist(), [keep.tolist() for keep in selection.keep], strict=True))


# ---------------------------------------------------------------- the paper's rule


@pytest.mark.parametrize("percent", [12.5, 30, 50, 70, 100])
@pytest.mark.parametrize("n_parts", [1, 7])
def test_files_hold_the_naive_selection_with_text_only_rows_whole(tmp_path: Path, percent: float, n_parts: int) -> None:
    records = mixed_records()
    write_scores(tmp_path / "scores", records, n_parts)
    record, selection = select(tmp_path, records, keep=percent)
    tau, kept = naive(records, percent)
    assert record["tau"] == record["token_tau"] == selection.tau == selection.token_tau == tau
    assert masks(selection) == kept
    by_row = {item.row: item for item in records}
    for row in storage.read_selection_table(tmp_path / "out").to_pylist():
        assert (row["id"], row["fingerprint"]) == (by_row[row["row"]].id, by_row[row["row"]].fingerprint)
        assert row["token_id"] == by_row[row["row"]].token_id.tolist()


@patient
@given(answers, percents)
def test_any_scores_written_and_read_back_give_the_naive_selection(gains: list[list[float]], percent: float) -> None:
    records = [scored(row, answer) for row, answer in enumerate(gains)]
    with tempfile.TemporaryDirectory() as folder:
        _, selection = select(Path(folder), records, keep=percent)
    assert masks(selection) == naive(records, percent)[1]


# ---------------------------------------------------------------- parts


EVERY_RULE: list[dict[str, Any]] = [
    {},
    {"by": "sample"},
    {"by": "token", "keep": 40},
    {"by": "random", "seed": 3},
    {"by": "random", "end_of_turn": "keep"},
    {"by": "column:n_prompt_tokens"},
    {"by": "column:worth", "table": Path("worth.csv")},
    {"keep_tokens": 25},
    {"by": "token", "keep_tokens": 60, "end_of_turn": "keep"},
    {"end_of_turn": "drop", "keep": 10},
]


def scatter(folder: Path, records: Sequence[Record], n_parts: int, rng: np.random.Generator) -> Path:
    """Scores with any rows in any part, which is sorted by row."""
    part = rng.integers(n_parts, size=len(records))
    storage.claim_run(folder, {"model": "m"}, {"n_parts": n_parts})
    for index in range(n_parts):
        rows = [record for record, where in zip(records, part, strict=True) if where == index]
        storage.write_part(folder, index, n_parts, storage.score_table(rows))
    return folder


@pytest.mark.parametrize("options", EVERY_RULE, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_which_rows_lie_in_which_part_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], seed: int
) -> None:
    monkeypatch.setattr(spill, "WINDOW_ROWS", 7)
    monkeypatch.setattr(storage, "_CHUNK_ROWS", 8)
    monkeypatch.setattr(columns, "_BLOCK_BYTES", 40)
    rng = np.random.default_rng(seed)
    records = mixed_records()
    if "table" in options:
        worth = rng.permutation(len(records)).tolist()
        options = {**options, "table": write_table(tmp_path / "worth.csv", worth, [w * 7 % 31 / 4 for w in worth])}
    written = []
    for n_parts, buffer in ((1, 1 << 20), (2, 1), (9, 500), (80, 1 << 14)):
        monkeypatch.setattr(spill, "BUFFER_BYTES", buffer)
        scores = scatter(tmp_path / f"scores-{n_parts}", records, n_parts, rng)
        run_select(SelectConfig(scores=scores, out=tmp_path / "out", **options))
        names = ["candidates.parquet", "selection.json", "selection.parquet"]
        written.append([(tmp_path / "out" / name).read_bytes() for name in names])
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert all(other == written[0] for other in written)
    rows = storage.read_selection(tmp_path / "out").rows
    assert 0 < len(rows) < len(records)
    assert (np.diff(rows) > 0).all()


def test_a_row_that_lies_in_two_parts_is_refused(tmp_path: Path) -> None:
    storage.claim_run(tmp_path / "scores", {}, {"n_parts": 2})
    for index, rows in enumerate([(0, 2), (1, 2)]):
        table = storage.score_table([scored(row, [1.0]) for row in rows])
        storage.write_part(tmp_path / "scores", index, 2, table)
    with pytest.raises(StorageError, match="row 2 occurs more than once"):
        select(tmp_path, [])


# ---------------------------------------------------------------- the other rules


def test_everything_is_kept_by_sample_at_100_percent(tmp_path: Path) -> None:
    record, selection = select(tmp_path, mixed_records(), by="sample", keep=100)
    measured = [item for item in mixed_records() if isinstance(item, TokenScores)]
    assert masks(selection) == {item.row: [True] * len(item.token_id) for item in measured}
    assert record["percent_saved"] == 0
    assert record["token_tau"] is None


def test_by_sample_keeps_the_papers_samples_whole(tmp_path: Path) -> None:
    record, selection = select(tmp_path, mixed_records(), by="sample")
    tau, kept = naive(mixed_records(), 70)
    assert record["tau"] == tau
    assert masks(selection) == {row: [True] * len(keep) for row, keep in kept.items()}


def test_by_token_takes_the_samples_tau_to_the_tokens_of_all_samples(tmp_path: Path) -> None:
    records = [scored(0, [2.0, 0.0]), scored(1, [0.0, -2.0, 1.5]), scored(2, [0.0, -1.0]), text_only(3, 2)]
    record, selection = select(tmp_path, records, by="token", keep=30)
    assert record["tau"] == record["token_tau"] == 1.0
    assert masks(selection) == {0: [True, False], 1: [False, False, True], 3: [True, True]}
    assert record["totals"]["rows_emptied"] == 1


@pytest.mark.parametrize("end_of_turn", ["select", "drop", "keep"])
@pytest.mark.parametrize("keep", [20, 70, 100])
def test_random_has_as_many_rows_and_tokens_as_the_papers_rule(tmp_path: Path, end_of_turn: str, keep: float) -> None:
    paper, _ = select(tmp_path, mixed_records(), keep=keep, end_of_turn=end_of_turn)
    for seed in range(5):
        record, selection = select(
            tmp_path, mixed_records(), by="random", keep=keep, end_of_turn=end_of_turn, seed=seed
        )
        assert (record["tau"], record["token_tau"]) == (None, None)
        assert record["totals"]["rows_kept"] == paper["totals"]["rows_kept"]
        assert record["totals"]["active_tokens"] == paper["totals"]["active_tokens"]
        assert record["random_token_difference"] == 0
        assert all(keep.any() for keep in selection.keep)


def test_random_reports_how_many_tokens_the_drawn_rows_lack(tmp_path: Path) -> None:
    records = [scored(0, [1.0] * 9), *(scored(row, [0.0]) for row in range(1, 20))]
    record, selection = select(tmp_path, records, by="random", keep=5, seed=1)
    assert len(selection.rows) == 1
    assert record["random_token_difference"] == -8
    assert "differ by -8" in selection_report(record)


# ---------------------------------------------------------------- a column of numbers


def test_a_column_of_the_scores_ranks_the_multimodal_rows(tmp_path: Path) -> None:
    records = [scored(row, [0.0, 0.0]) for row in range(10)] + [text_only(99, 2)]
    record, selection = select(tmp_path, records, by="column:n_prompt_tokens", keep=30)
    assert selection.rows.tolist() == [7, 8, 9, 99]  # text-only row 99 has the largest number and is not ranked
    assert all(keep.all() for keep in selection.keep)
    assert (record["tau"], record["token_tau"], record["column_tau"]) == (None, None, 27.0)


def test_the_gain_as_a_column_is_the_sample_rule(tmp_path: Path) -> None:
    _, by_column = select(tmp_path, mixed_records(), by="column:gain")
    _, by_sample = select(tmp_path, mixed_records(), by="sample")
    assert masks(by_column) == masks(by_sample)


def write_table(path: Path, rows: list[Any], values: list[Any]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"extra": rows, "row": rows, "worth": values}), path)
    elif path.suffix == ".csv":
        lines = [f"{row},{'' if value is None else value}" for row, value in zip(rows, values, strict=True)]
        path.write_text("\n".join(["row,worth", *lines]))
    else:
        lines = [json.dumps({"row": row, "worth": value}) for row, value in zip(rows, values, strict=True)]
        path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize("kind", [int, float])
def test_a_column_of_a_file_is_joined_by_row(tmp_path: Path, suffix: str, kind: type) -> None:
    records = [scored(0, [5.0]), scored(1, [0.0]), scored(2, [0.0]), text_only(3, 2)]
    table = write_table(tmp_path / f"t{suffix}", [2, 7, 0, 1], [kind(5), kind(9), kind(1), kind(3)])
    record, selection = select(tmp_path, records, by="column:worth", table=table, keep=60)
    assert selection.rows.tolist() == [1, 2, 3]
    assert record["column_tau"] == 3.0
    assert record["table"] == str(table)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize(
    ("rows", "values", "message"),
    [
        ([0, 1], [1.0, 2.0], "no line for 1 of 3 rows: row 2"),
        ([0, 1, 1, 2], [1.0, 2.0, 2.0, 3.0], "more than one line for row 1"),
        ([0, 1, 2], ["a", "b", "c"], "holds string, not numbers"),
        ([0, 1, 2], [1.0, None, 3.0], "no finite value for row 1"),
        (["0", "x", "2"], [1.0, 2.0, 3.0], "'row' must hold row numbers"),
        ([0.5, 1.0, 2.0], [1.0, 2.0, 3.0], "'row' must hold row numbers"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    tmp_path: Path, suffix: str, rows: list[Any], values: list[Any], message: str
) -> None:
    table = write_table(tmp_path / f"t{suffix}", rows, values)
    with pytest.raises(DataError, match=message):
        select(tmp_path, [scored(row, [0.0]) for row in range(3)], by="column:worth", table=table)


def test_a_table_with_a_line_without_row_is_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.parquet", [0, None, 2], [1.0, 2.0, 3.0])
    with pytest.raises(DataError, match="'row' must hold row numbers"):
        select(tmp_path, [scored(0, [0.0])], by="column:worth", table=table)


def test_a_table_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    records = [scored(0, [0.0])]
    good = write_table(tmp_path / "t.csv", [0], [1])
    with pytest.raises(DataError, match="cannot be read"):
        select(tmp_path, records, by="column:worth", table=tmp_path / "absent.parquet")
    with pytest.raises(DataError, match="no column 'wort': did you mean 'worth'"):
        select(tmp_path, records, by="column:wort", table=good)
    with pytest.raises(ConfigError, match=r"must end in one of \.parquet, \.csv, \.jsonl"):
        select(tmp_path, records, by="column:worth", table=tmp_path / "t.xlsx")


@pytest.mark.parametrize("name", ["gian", "source", "token_id", "worth"])
def test_a_column_that_the_scores_do_not_hold_is_a_config_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"hold no such column of numbers.*--table"):
        select(tmp_path, [scored(0, [0.0])], by=f"column:{name}")


# ---------------------------------------------------------------- options


def test_keep_tokens_has_a_quantile_of_its_own_inside_the_kept_samples(tmp_path: Path) -> None:
    records = [scored(0, [1.0, 3.0]), scored(1, [2.0, 1.5, 0.25]), scored(2, [0.0, 0.5]), text_only(3, 2)]
    record, selection = select(tmp_path, records, keep=60, keep_tokens=40)
    assert (record["tau"], record["token_tau"]) == (1.25, 2.0)  # two of the five tokens of rows 0 and 1
    assert masks(selection) == {0: [False, True], 1: [True, False, False], 3: [True, True]}


def test_a_row_that_keep_tokens_leaves_without_tokens_is_left_out_and_counted(tmp_path: Path) -> None:
    record, selection = select(tmp_path, [scored(0, [1.0, 1.0]), scored(1, [5.0, 4.0])], keep=100, keep_tokens=50)
    assert selection.rows.tolist() == [1]
    assert record["totals"]["rows_emptied"] == 1
    assert "1 rows left out because none" in selection_report(record)


def test_keep_tokens_by_token_ranks_the_tokens_of_all_samples(tmp_path: Path) -> None:
    records = [scored(0, [9.0, 1.0]), scored(1, [0.0, 2.0])]
    record, selection = select(tmp_path, records, by="token", keep=50, keep_tokens=50)
    assert (record["tau"], record["token_tau"], record["keep_tokens_percent"]) == (None, 2.0, 50)
    assert masks(selection) == {0: [True, False], 1: [False, True]}


@pytest.mark.parametrize("by", ["sample", "random", "column:gain"])
def test_keep_tokens_without_a_token_threshold_says_what_to_do(by: str) -> None:
    with pytest.raises(ConfigError, match=r"use --by sample\+token"):
        SelectConfig(scores=Path("s"), out=Path("o"), by=by, keep_tokens=50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": Path("t.csv")}, "use --by column:NAME"),
        ({"seed": -1}, "must not be negative"),
        ({"keep": 0}, "above 0"),
        ({"by": "column:"}, "must be one of"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SelectConfig(scores=Path("s"), out=Path("o"), **options)


def end_of_turn_records() -> list[Record]:
    # Row 1 has two turns; row 2 nothing but an end of turn; row 4 is text-only.
    return [
        scored(0, [2.0, 0.0]),
        scored(1, [0.0, 3.0, 3.0, 0.0], widths=[3, 0, 2, 0]),
        scored(2, [1.0], widths=[0]),
        scored(3, [-1.0, -1.0]),
        text_only(4, 2),
    ]


@pytest.mark.parametrize(
    ("end_of_turn", "expected", "emptied"),
    [
        ("select", {0: [1, 0], 1: [0, 1, 1, 0], 2: [1], 4: [1, 1]}, 0),
        ("keep", {0: [1, 1], 1: [0, 1, 1, 1], 2: [1], 4: [1, 1]}, 0),
        ("drop", {0: [1, 0], 1: [0, 0, 1, 0], 4: [1, 0]}, 1),
    ],
)
def test_end_of_turn_tokens_follow_the_option_but_always_count_in_tau(
    tmp_path: Path, end_of_turn: str, expected: dict[int, list[int]], emptied: int
) -> None:
    record, selection = select(tmp_path, end_of_turn_records(), keep=75, end_of_turn=end_of_turn)
    assert record["tau"] == 1.0
    assert masks(selection) == {row: [bool(keep) for keep in mask] for row, mask in expected.items()}
    assert record["totals"]["rows_emptied"] == emptied
    assert record["end_of_turn"] == end_of_turn


def test_keeping_ends_of_turn_does_not_bring_back_a_row_without_another_token(tmp_path: Path) -> None:
    records = [scored(0, [3.0, 0.0]), scored(1, [0.0, 0.0])]
    _, selection = select(tmp_path, records, by="token", keep=50, end_of_turn="keep")
    assert masks(selection) == {0: [True, True]}


def test_skipped_rows_are_counted_by_source_and_reason(tmp_path: Path) -> None:
    record, selection = select(tmp_path, mixed_records())
    assert record["skipped_reasons"] == {"no image 1": 3}
    assert record["by_source"]["vg"] == {
        "rows_total": 3,
        "rows_kept": 0,
        "rows_emptied": 0,
        "text_only": 0,
        "skipped": 3,
        "tokens_total": 0,
        "active_tokens": 0,
    }
    assert not {7, 27, 47} & set(selection.rows.tolist())


def test_rare_reasons_are_summed_up(tmp_path: Path) -> None:
    skipped = [Skipped(row=row, id="", reason=f"no file {max(row, 3)}", n_images=1) for row in range(1, 31)]
    record, _ = select(tmp_path, [scored(0, [1.0]), *skipped])
    assert len(record["skipped_reasons"]) == 21
    assert next(iter(record["skipped_reasons"].items())) == ("no file 3", 3)
    assert record["skipped_reasons"]["8 other reasons"] == 8


def test_skipped_rows_can_be_an_error_that_names_the_first(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"3 rows could not be scored \(row 7: no image 1; .*--skipped drop"):
        select(tmp_path, mixed_records(), skipped="error")
    assert not (tmp_path / "out").exists()


def test_skipped_as_error_does_not_mind_scores_without_skipped_rows(tmp_path: Path) -> None:
    assert select(tmp_path, [scored(0, [1.0])], skipped="error")[0]["totals"]["skipped"] == 0


# ---------------------------------------------------------------- the record


def test_the_record_counts_rows_and_tokens_by_source_and_in_all(tmp_path: Path) -> None:
    records = [
        scored(0, [2.0, 0.0], source="b"),
        scored(1, [0.0, 1.0, 0.5], source="a"),
        scored(2, [-1.0], source="b"),
        text_only(3, 4, source="b"),
    ]
    record, selection = select(tmp_path, records, keep=50, seed=4)
    assert list(record["by_source"]) == ["a", "b"]
    assert [list(counts.values()) for counts in record["by_source"].values()] == [
        [1, 1, 0, 0, 0, 3, 2],
        [3, 2, 0, 1, 0, 7, 5],
    ]
    assert list(record["totals"].values()) == [4, 3, 0, 1, 0, 10, 7]
    assert record["percent_saved"] == pytest.approx(30)
    assert record["totals"]["active_tokens"] == sum(keep.sum() for keep in selection.keep)
    assert record["identity"] == {"model": "m", "template": "chat"}
    assert (record["rule"], record["keep_percent"], record["seed"]) == ("sample+token", 50, 4)
    assert "k = ceil(percent / 100 * n)" in record["quantile"]


@pytest.mark.parametrize("by", ["sample+token", "sample", "token", "random", "column:gain"])
def test_the_record_is_what_lies_on_disk(tmp_path: Path, by: str) -> None:
    record, selection = select(tmp_path, mixed_records(), by=by)
    assert storage.read_json(tmp_path / "out" / "selection.json", "selection") == record
    assert selection.keep_percent == 70
    assert np.isnan(selection.tau) == (record["tau"] is None)


def test_the_hash_of_the_scores_depends_on_the_scores_and_not_on_their_parts(tmp_path: Path) -> None:
    records = mixed_records()
    runs = {"scores": records, "in parts": records}
    one, two = scored(0, [0.5, 1.0]), scored(1, [0.25, 1.25])
    runs["another token"] = [replace(one, nll_blind=np.array([0.5, 1.25], np.float32)), two]
    runs["another order of tokens"] = [replace(one, nll_blind=one.nll_blind[::-1].copy()), two]
    runs["both conditions shifted"] = [replace(one, nll_blind=one.nll_blind + 1, nll_seen=one.nll_seen + 1), two]
    runs["rows exchanged"] = [replace(one, nll_blind=two.nll_blind), replace(two, nll_blind=one.nll_blind)]
    runs["another text"] = [replace(one, fingerprint=5), two]
    runs["another row"] = [one, replace(two, row=2)]
    runs["one and two"] = [one, two]
    runs["one row less"] = [one]
    runs["text-only row more"] = [one, two, text_only(2, 3)]
    runs["another text in it"] = [one, two, replace(text_only(2, 3), fingerprint=5)]
    hashes = {
        name: run_select(
            SelectConfig(scores=write_scores(tmp_path / name, rows, 5 if name == "in parts" else 1), out=tmp_path)
        )["scores_hash"]
        for name, rows in runs.items()
    }
    assert hashes.pop("in parts") == hashes["scores"]
    assert len(set(hashes.values())) == len(hashes)


def test_the_report_is_an_aligned_table_with_tau(tmp_path: Path) -> None:
    record, _ = select(tmp_path, mixed_records())
    lines = selection_report(record).splitlines()
    assert lines[0].split() == ["source", "rows", "kept", "%", "tokens", "active", "%"]
    assert [line.split()[0] for line in lines[1:6]] == ["coco", "gqa", "text", "vg", "total"]
    assert len({len(line) for line in lines[:6]}) == 1
    totals = record["totals"]
    assert lines[5].split()[1:3] == [str(totals["rows_total"]), str(totals["rows_kept"])]
    assert lines[5].split()[6] == f"{100 - record['percent_saved']:.1f}"
    assert f"tau {record['tau']:.6g} nats" in lines[7]
    assert "3 rows left out because they could not be scored:" in lines
    assert "  3 x no image 1" in lines


# ---------------------------------------------------------------- what was chosen from


@pytest.mark.parametrize("options", EVERY_RULE, ids=str)
def test_the_rows_that_were_chosen_from_are_those_that_were_not_skipped(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    records = mixed_records()
    if "table" in options:
        options = {**options, "table": write_table(tmp_path / "worth.csv", range(len(records)), range(len(records)))}
    gone = max(record.row for record in records) // 2
    left = [record for record in records if record.row != gone]
    _, selection = select(tmp_path, left, **options)
    candidates = storage.read_candidates(tmp_path / "out").tolist()
    assert candidates == sorted(record.row for record in left if not isinstance(record, Skipped))
    assert set(selection.rows.tolist()) < set(candidates)


@pytest.mark.parametrize("options", [{}, {"weights": "clamp"}, {"keep_tokens": 20.0}, {"by": "sample"}], ids=str)
def test_scores_of_text_alone_may_be_kept_whole(tmp_path: Path, options: dict[str, Any]) -> None:
    records = [text_only(0, 2), text_only(3, 4)]
    config = SelectConfig(scores=write_scores(tmp_path / "scores", records), out=tmp_path / "out", **options)
    record = run_select(config, text_alone=True)
    assert masks(storage.read_selection(tmp_path / "out")) == {0: [True] * 2, 3: [True] * 4}
    assert record["tau"] is None
    assert record["totals"]["text_only"] == 2
    assert storage.read_candidates(tmp_path / "out").tolist() == [0, 3]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("text_alone", [False, True])
def test_scores_without_a_multimodal_row_are_refused(tmp_path: Path, text_alone: bool) -> None:
    records = [text_only(0, 2), Skipped(row=1, id="", reason="no image", n_images=1)]
    config = SelectConfig(scores=write_scores(tmp_path / "scores", records), out=tmp_path / "out")
    with pytest.raises(DataError, match=r"nothing to rank, none of the 2 rows .* has an image; row 1: no image"):
        run_select(config, text_alone=text_alone)


def broken(tmp_path: Path, row: int, values: dict[str, Any]) -> Path:
    """Scores of six multimodal rows and a text-only one, with some values of one row replaced."""
    records = [*(scored(n, [1.0, float(n)]) for n in range(6)), text_only(6, 2)]
    rows = storage.score_table(records).to_pylist()
    rows[row].update(values)
    storage.claim_run(tmp_path / "scores", {}, {"n_parts": 1})
    storage.write_part(tmp_path / "scores", 0, 1, pa.Table.from_pylist(rows, schema=storage.SCORE_SCHEMA))
    return tmp_path


@pytest.mark.parametrize(
    ("row", "values", "message"),
    [
        (2, {"gain": float("nan")}, "row 2 has a gain that is not finite"),
        (2, {"gain": None}, "row 2 has a gain that is not finite"),
        (2, {"gain": float("inf")}, "row 2 has a gain that is not finite"),
        (2, {"gain": -1.5}, "row 2 has a gain that is not the mean"),
        (2, {"nll_seen": [0.0, float("nan")]}, "row 2 has a gain that is not the mean"),
        (2, {"nll_seen": [0.0, math.inf], "nll_blind": [0.0, math.inf]}, "row 2 has a gain that is not the mean"),
        (2, {"nll_seen": [0.0]}, "row 2 has another number of nll_seen"),
        (2, {"nll_blind": []}, "row 2 has another number of nll_blind"),
        (2, {"token_id": [1, 2, 3]}, "row 2 has another number of char_start"),
        (2, {"char_end": [1]}, "row 2 has another number of char_end"),
        (2, {"n_images": 0}, "row 2 has another number of nll_seen .*none are due without an image"),
        (6, {"n_images": 1}, "row 6 has a gain that is not finite"),
        (6, {"n_images": 1, "gain": 1.0}, "row 6 has another number of nll_seen"),
        (3, {"row": -1}, "row -1 is no row of the dataset"),
        (2, {"token_id": [], "char_start": [], "char_end": [], "nll_seen": [], "nll_blind": []}, "row 2 is multimodal"),
        (2, {"row": 1}, "row 1 occurs more than once"),
    ],
)
def test_damaged_scores_are_refused_by_row(tmp_path: Path, row: int, values: dict[str, Any], message: str) -> None:
    with pytest.raises(StorageError, match=message):
        select(broken(tmp_path, row, values), [], end_of_turn="keep")
    assert not (tmp_path / "out").exists()


def test_many_damaged_rows_are_named_by_the_first_few_and_their_number(tmp_path: Path) -> None:
    table = storage.score_table([scored(row, [1.0]) for row in range(8)])
    bad = table.set_column(9, storage.SCORE_SCHEMA.field("gain"), pa.array([math.nan] * 8))
    storage.claim_run(tmp_path / "scores", {}, {"n_parts": 1})
    storage.write_part(tmp_path / "scores", 0, 1, bad)
    with pytest.raises(StorageError, match=r"row 0, 1, 2, 3, 4 \(and 3 more\) has a gain"):
        select(tmp_path, [])
