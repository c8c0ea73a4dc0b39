"""Selection against a naive reference in plain Python, its invariants, and what it says about bad input."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visgain import storage
from visgain.config import SelectConfig
from visgain.errors import ConfigError, DataError, StorageError
from visgain.selection import Pool, choose, kept_count, run_select, selection_report, threshold
from visgain.types import Selection, Skipped, TokenScores

Record = TokenScores | Skipped


def scored(
    row: int, gains: Sequence[float], *, source: str = "coco", widths: Sequence[int] | None = None
) -> TokenScores:
    """A multimodal row whose tokens have these gains (exactly, if they are float32); the last one ends the turn."""
    blind = np.asarray(gains, np.float32)
    return record_of(row, len(gains), widths, source=source, nll_seen=np.zeros_like(blind), nll_blind=blind)


def text_only(row: int, n_tokens: int, *, source: str = "text") -> TokenScores:
    none = np.zeros(0, np.float32)
    return record_of(row, n_tokens, None, source=source, nll_seen=none, nll_blind=none)


def record_of(row: int, n_tokens: int, widths: Sequence[int] | None, **fields: Any) -> TokenScores:
    width = np.asarray([2] * (n_tokens - 1) + [0] if widths is None else widths, np.int32)
    starts = (np.cumsum(width) - width).astype(np.int32)
    return TokenScores(
        row=row,
        id=f"id{row}",
        fingerprint=1000 + row,
        n_images=int(len(fields["nll_seen"]) > 0),
        n_image_tokens=9,
        n_prompt_tokens=20 + row,
        truncated=False,
        token_id=np.arange(row, row + n_tokens, dtype=np.int32),
        turn=np.zeros(n_tokens, np.int32),
        chars=np.stack([starts, starts + width], axis=1),
        **fields,
    )


def write_scores(folder: Path, records: Sequence[Record], n_parts: int = 2) -> Path:
    storage.claim_run(folder, {"model": "m", "template": "chat"}, {"n_parts": n_parts})
    for index in range(n_parts):
        storage.write_part(folder, index, n_parts, storage.score_table(records[index::n_parts]))
    return folder


def select(folder: Path, records: Sequence[Record], **options: Any) -> tuple[dict[str, Any], Selection]:
    if not (folder / "scores").exists():
        write_scores(folder / "scores", records)
    record = run_select(SelectConfig(scores=folder / "scores", out=folder / "out", **options))
    return record, storage.read_selection(folder / "out")


def masks(selection: Selection) -> dict[int, list[bool]]:
    return dict(zip(selection.rows.tolist(), [keep.tolist() for keep in selection.keep], strict=True))


def mixed_records() -> list[Record]:
    rng = np.random.default_rng(5)
    records: list[Record] = []
    for row in range(60):
        if row % 10 == 3:
            records.append(text_only(row, 1 + row % 4))
        elif row % 20 == 7:
            records.append(Skipped(row=row, id="x", reason=f"no image {row % 2}", source="vg", n_images=1))
        else:
            gains = rng.normal(0.2, 1.0, 1 + rng.integers(12))
            records.append(scored(row, gains, source=("coco", "gqa")[row % 2]))
    return records


# ---------------------------------------------------------------- the naive reference


def naive_tau(values: Sequence[float], percent: float) -> float:
    k = math.ceil(Fraction(str(percent)) / 100 * len(values))
    return sorted(values, reverse=True)[k - 1]


def naive(records: Sequence[Record], percent: float) -> tuple[float, dict[int, list[bool]]]:
    """The paper's rule, row by row, with Python's own numbers."""
    measured = [record for record in records if isinstance(record, TokenScores)]
    tau = naive_tau([record.mean_gain for record in measured if record.n_images], percent)
    kept = {}
    for record in measured:
        if record.n_images == 0:
            kept[record.row] = [True] * len(record.token_id)
        elif record.mean_gain >= tau:
            kept[record.row] = [float(gain) >= tau for gain in record.gain]
    return tau, kept


# Few distinct values, so that ties at tau are frequent; or any float32, so that rounding has its chance.
token_gains = st.one_of(
    st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.5, 1.5]),
    st.floats(-100, 100, width=32, allow_nan=False),
)
answers = st.lists(st.lists(token_gains, min_size=1, max_size=6), min_size=1, max_size=12)
patient = settings(deadline=None, max_examples=60)  # a busy machine is not a failure
percents = st.one_of(st.sampled_from([10, 30, 50, 70, 90, 100]), st.floats(0.01, 100))


def pool_of(gains: Sequence[Sequence[float]]) -> Pool:
    records = [scored(row, answer) for row, answer in enumerate(gains)]
    return Pool(
        gain=np.array([record.mean_gain for record in records]),
        length=np.array([len(answer) for answer in gains]),
        token_gain=np.concatenate([record.gain for record in records]),
        end_of_turn=np.zeros(sum(map(len, gains)), bool),
    )


def config(**options: Any) -> SelectConfig:
    return SelectConfig(scores=Path("scores"), out=Path("out"), **options)


# ---------------------------------------------------------------- the quantile rule


@pytest.mark.parametrize(
    ("n", "percent", "count"),
    [
        (10, 70, 7),
        (10, 70.0, 7),
        (10, 70.1, 8),
        (100, 7, 7),
        (100, 56.0, 56),
        (1000, 0.1, 1),
        (3, 0.01, 1),
        (7, 100, 7),
    ],
)
def test_the_number_kept_is_exact_in_decimals(n: int, percent: float, count: int) -> None:
    assert kept_count(n, percent) == count


@patient
@given(st.lists(token_gains, min_size=1), percents)
def test_tau_is_the_kth_largest_value(values: list[float], percent: float) -> None:
    assert threshold(np.array(values), percent) == naive_tau(values, percent)


def test_ties_at_tau_are_kept() -> None:
    values = np.array([3.0, 1.0, 1.0, 1.0, 0.0])
    tau = threshold(values, 40)
    assert tau == 1.0
    assert (values >= tau).sum() == 4


def test_values_that_cannot_be_ranked_are_refused_by_position() -> None:
    with pytest.raises(DataError, match="not finite, at 1, 3"):
        threshold(np.array([0.0, np.nan, 1.0, np.inf]), 50)
    with pytest.raises(DataError, match="nothing to rank"):
        threshold(np.zeros(0), 50)


@pytest.mark.parametrize("percent", [0, -1, 100.1, float("nan")])
def test_a_share_outside_of_0_to_100_is_refused(percent: float) -> None:
    with pytest.raises(ConfigError, match="above 0 and at most 100"):
        threshold(np.ones(3), percent)


# ---------------------------------------------------------------- the paper's rule


@patient
@given(answers, percents)
def test_sample_and_token_equals_the_naive_reference(gains: list[list[float]], percent: float) -> None:
    tau, kept = naive([scored(row, answer) for row, answer in enumerate(gains)], percent)
    choice = choose(pool_of(gains), config(keep=percent))
    assert choice.tau == choice.token_tau == tau
    expected = [kept.get(row, [False] * len(answer)) for row, answer in enumerate(gains)]
    assert choice.active.tolist() == [active for answer in expected for active in answer]
    assert choice.chosen.tolist() == [row in kept for row in range(len(gains))]


@patient
@given(answers, percents)
def test_a_kept_sample_always_keeps_a_token(gains: list[list[float]], percent: float) -> None:
    pool = pool_of(gains)
    choice = choose(pool, config(keep=percent))
    active = np.split(choice.active, np.cumsum(pool.length)[:-1])
    assert choice.chosen.any()
    assert [bool(tokens.any()) for tokens in active] == choice.chosen.tolist()


@pytest.mark.parametrize("by", ["sample+token", "sample", "token", "column:x"])
@patient
@given(gains=answers, percent=percents, more=percents)
def test_a_larger_share_keeps_a_superset(by: str, gains: list[list[float]], percent: float, more: float) -> None:
    pool = pool_of(gains)
    ranking = pool.gain[::-1].copy() if by == "column:x" else None
    few, many = (choose(pool, config(keep=keep, by=by), ranking) for keep in sorted([percent, more]))
    assert not (few.active & ~many.active).any()
    assert not (few.chosen & ~many.chosen).any()


def test_a_token_is_compared_with_tau_itself_and_not_with_its_float32() -> None:
    # The mean of the first sample lies between two float32 numbers and is rounded down to the token's gain.
    low, high = np.float32(1), np.nextafter(np.float32(1), np.float32(2))
    choice = choose(pool_of([[low, low, high], [0.0]]), config(keep=50))
    assert float(low) < choice.tau < float(high)
    assert choice.active.tolist() == [False, False, True, False]


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


@patient
@given(answers, percents, st.integers(0, 3))
def test_random_draws_equal_counts_or_everything_there_is(gains: list[list[float]], percent: float, seed: int) -> None:
    pool = pool_of(gains)
    paper = choose(pool, config(keep=percent))
    choice = choose(pool, config(keep=percent, by="random", seed=seed))
    active = np.split(choice.active, np.cumsum(pool.length)[:-1])
    assert [bool(tokens.any()) for tokens in active] == choice.chosen.tolist()
    assert choice.chosen.sum() == paper.chosen.sum()
    assert choice.tokens_wanted == paper.active.sum()
    assert choice.active.sum() == min(paper.active.sum(), pool.length[choice.chosen].sum())


def test_random_reports_how_many_tokens_the_drawn_rows_lack(tmp_path: Path) -> None:
    records = [scored(0, [1.0] * 9), *(scored(row, [0.0]) for row in range(1, 20))]
    record, selection = select(tmp_path, records, by="random", keep=5, seed=1)
    assert len(selection.rows) == 1
    assert record["random_token_difference"] == -8
    assert "differ by -8" in selection_report(record)


def test_random_does_not_cut_the_end_of_turn_tokens_that_are_always_kept() -> None:
    pool = replace(pool_of([[9.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), end_of_turn=np.array([0, 0, 1, 1, 1, 1], bool))
    choices = [choose(pool, config(keep=33, by="random", end_of_turn="keep", seed=seed)) for seed in range(20)]
    assert {int(choice.active.sum()) - (choice.tokens_wanted or 0) for choice in choices} == {0, 1}


def test_random_gives_a_row_its_token_even_where_ends_of_turn_alone_are_too_many() -> None:
    pool = pool_of([[9.0], [9.0], [0.0, 0.0, 0.0], [0.0] * 6])
    pool = replace(pool, end_of_turn=np.array([0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0], bool))
    for seed in range(30):
        choice = choose(pool, config(keep=50, by="random", end_of_turn="keep", seed=seed))
        if choice.chosen.tolist() == [False, False, True, True]:
            assert choice.active[2:5].all()
            assert choice.active[5:].sum() == 1
            return
    pytest.fail("no seed drew the rows that this test is about")


def test_random_is_fixed_by_its_seed_and_favours_nobody() -> None:
    pool = pool_of([[float(row % 5 == 0)] * 4 for row in range(20)])
    draws = np.array([choose(pool, config(by="random", keep=20, seed=seed)).active for seed in range(400)])
    again = choose(pool, config(by="random", keep=20, seed=3)).active
    assert np.array_equal(draws[3], again)
    assert len(np.unique(draws, axis=0)) > 300
    share = draws.mean(axis=0)  # a fifth for each token: 4 standard deviations are 0.08
    assert share.min() > 0.1
    assert share.max() < 0.3


def test_random_tokens_inside_the_rows_favour_nobody() -> None:
    gains = [[1.0, -1.0, -1.0, -1.0, -1.0]] * 4  # all rows are kept, with one token; half the budget goes to the rest
    pool = replace(pool_of(gains), token_gain=np.array([1.0, 1.0, -1, -1, -1] * 4, np.float32))
    draws = np.array([choose(pool, config(by="random", keep=100, seed=seed)).active for seed in range(500)])
    assert (draws.sum(axis=1) == 8).all()
    assert abs(draws.mean(axis=0) - 0.4).max() < 0.1


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
        config(by=by, keep_tokens=50)


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
        config(**options)


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
    changed = [scored(0, [0.125]), *records[1:]]
    hashes = [
        run_select(SelectConfig(scores=write_scores(tmp_path / name, rows, parts), out=tmp_path / "o"))["scores_hash"]
        for name, rows, parts in [("a", records, 1), ("b", records, 5), ("c", changed, 1)]
    ]
    assert hashes[0] == hashes[1] != hashes[2]


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


# ---------------------------------------------------------------- bad input


def test_scores_without_a_multimodal_row_are_refused(tmp_path: Path) -> None:
    records = [text_only(0, 2), Skipped(row=1, id="", reason="no image", n_images=1)]
    with pytest.raises(DataError, match="nothing to rank, none of the 2 rows"):
        select(tmp_path, records)


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
        (6, {"n_images": 1}, "row 6 has another number of nll_seen"),
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
