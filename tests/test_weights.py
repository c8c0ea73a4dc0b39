"""Soft weights: against a loop in plain Python, whatever the parts, beside every rule, and for every reader."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny_scores import Record, mixed_records, patient, scored, text_only, token_gains, write_scores
from visgain import spill, storage
from visgain.config import SelectConfig
from visgain.errors import ConfigError, UnknownName
from visgain.scored import read_masks
from visgain.selection import run_select, selection_report
from visgain.types import TokenScores
from visgain.weights import UNIT, Clamp, Hard, exact_sums, parse_weights

CAL = "clamp:low=1.0,high=5.0,window=3"


def naive_weights(gain: list[float], turn: list[int], low: float = 1.0, high: float = 5.0, window: int = 3) -> list:
    """Token by token: the mean of the clamped gains of those of its neighbours that are in the same answer."""
    weights = []
    for k in range(len(gain)):
        near = [j for j in range(k - window // 2, k + window // 2 + 1) if 0 <= j < len(gain) and turn[j] == turn[k]]
        weights.append(sum(min(max(gain[j], low), high) for j in near) / len(near))
    return weights


def turns_of(record: TokenScores, seed: int = 0) -> TokenScores:
    """The record with its tokens dealt out to a few turns, in order."""
    rng = np.random.default_rng([seed, record.row])
    return replace(record, turn=np.sort(rng.integers(3, size=len(record.token_id))).astype(np.int32))


def several_turns() -> list[Record]:
    return [turns_of(record) if isinstance(record, TokenScores) else record for record in mixed_records()]


def select(folder: Path, records: list[Record], n_parts: int = 2, **options: Any) -> tuple[dict[str, Any], list[dict]]:
    write_scores(folder / "scores", records, n_parts)
    record = run_select(SelectConfig(scores=folder / "scores", out=folder / "out", **options))
    return record, storage.read_selection_table(folder / "out").to_pylist()


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize("window", [1, 3, 5, 99])
@pytest.mark.parametrize(("low", "high"), [(1.0, 5.0), (0.1, 0.4), (2.0, 2.0)])
def test_weights_are_those_of_a_loop_over_the_tokens(tmp_path: Path, window: int, low: float, high: float) -> None:
    records = several_turns()
    spec = f"clamp:low={low},high={high},window={window}"
    _, rows = select(tmp_path, records, weights=spec, by="sample", keep=100)
    by_row = {record.row: record for record in records}
    assert len(rows) > 50
    for row in rows:
        record = by_row[row["row"]]
        if record.n_images == 0:
            assert row["weight"] == [1.0] * len(record.token_id)
            continue
        expected = naive_weights(record.gain.tolist(), record.turn.tolist(), low, high, window)
        assert np.allclose(row["weight"], expected, rtol=1e-6)


@patient
@given(st.lists(st.tuples(token_gains, st.integers(0, 2)), min_size=1, max_size=12), st.sampled_from([1, 3, 5, 7]))
def test_any_answers_weigh_what_the_loop_says(tokens: list[tuple[float, int]], window: int) -> None:
    tokens = sorted(tokens, key=lambda token: token[1])
    gain, turn = ([token[k] for token in tokens] for k in (0, 1))
    found = Clamp(window=window)(np.asarray(gain, np.float32), np.asarray(turn, np.int64))
    assert found.dtype == np.float32
    assert np.allclose(found, naive_weights(gain, turn, window=window), rtol=1e-6)


def test_the_window_ends_where_an_answer_and_where_a_row_does() -> None:
    gain = np.asarray([9, 0, 0, 9, 9, 0], np.float32)
    assert Clamp()(gain, np.asarray([0, 0, 0, 1, 2, 2])).tolist() == pytest.approx([3, 7 / 3, 1, 5, 3, 3])


def test_what_is_pooled_beside_a_dropped_token_is_its_own_gain_still(tmp_path: Path) -> None:
    records: list[Record] = [scored(0, [3.0, 0.0, 3.0]), scored(1, [0.0, 0.0, 0.0])]
    _, [row, *_] = select(tmp_path, records, weights="clamp", keep=50)
    assert row["keep"] == [True, False, True]
    assert row["weight"] == [2.0, 0.0, 2.0]


@pytest.mark.parametrize("by", ["sample+token", "sample", "token", "random", "column:n_prompt_tokens"])
@pytest.mark.parametrize("end_of_turn", ["select", "keep", "drop"])
def test_weights_change_no_mask_and_are_positive_exactly_where_it_keeps(
    tmp_path: Path, by: str, end_of_turn: str
) -> None:
    options = {"by": by, "end_of_turn": end_of_turn, "keep": 60}
    hard, plain = select(tmp_path / "hard", several_turns(), **options)
    soft, rows = select(tmp_path / "soft", several_turns(), **options, weights="clamp")
    assert [{**row, "weight": None} for row in rows] == [{**row, "weight": None} for row in plain]
    assert all([weight > 0 for weight in row["weight"]] == row["keep"] for row in rows)
    assert {**soft, "by_source": 0, "totals": 0, "weights": 0} == {**hard, "by_source": 0, "totals": 0, "weights": 0}


# ---------------------------------------------------------------- the files


def test_hard_weights_are_no_column_and_soft_ones_are_float32_beside_the_mask(tmp_path: Path) -> None:
    hard, _ = select(tmp_path / "hard", several_turns())
    soft, _ = select(tmp_path / "soft", several_turns(), weights="clamp")
    assert (hard["weights"], soft["weights"]) == ("hard", CAL)
    schemas = [pq.read_schema(tmp_path / name / "out/selection.parquet") for name in ("hard", "soft")]
    assert [schema.remove_metadata() for schema in schemas] == [storage.SELECTION_SCHEMA, storage.SOFT_SELECTION_SCHEMA]
    assert json.loads((tmp_path / "soft/out/selection.json").read_text()) == soft


@pytest.mark.parametrize("seed", range(3))
def test_which_rows_lie_in_which_part_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(spill, "WINDOW_ROWS", 7)
    monkeypatch.setattr(storage, "_CHUNK_ROWS", 8)
    rng, records, written = np.random.default_rng(seed), several_turns(), []
    for n_parts in (1, 3, 20):
        folder = tmp_path / str(n_parts)
        part = rng.integers(n_parts, size=len(records))
        storage.claim_run(folder / "scores", {"model": "m"}, {"n_parts": n_parts})
        for index in range(n_parts):
            rows = [record for record, where in zip(records, part, strict=True) if where == index]
            storage.write_part(folder / "scores", index, n_parts, storage.score_table(rows))
        run_select(SelectConfig(scores=folder / "scores", out=folder / "out", weights="clamp:low=0.1"))
        written.append([(folder / "out" / name).read_bytes() for name in ("selection.parquet", "selection.json")])
    assert written[1] == written[0]
    assert written[2] == written[0]


def test_who_reads_masks_alone_reads_the_same_from_a_selection_with_weights(tmp_path: Path) -> None:
    found = []
    for weights in ("hard", "clamp"):
        folder = tmp_path / weights
        select(folder, several_turns(), weights=weights)
        chosen = storage.read_selection(folder / "out")
        masks = read_masks(folder / "out", chosen.rows)
        tables = storage.scan_selection(folder / "out", ["row", "keep"])
        found.append([chosen.rows.tolist(), [keep.tolist() for keep in chosen.keep], str(masks), list(tables)])
    assert found[0] == found[1]


# ---------------------------------------------------------------- the counts


def test_the_record_and_the_report_say_what_active_tokens_weigh(tmp_path: Path) -> None:
    record, rows = select(tmp_path, several_turns(), weights="clamp:low=0.01", keep=80)
    by_row = {one.row: one for one in several_turns()}
    weight: dict[str, Fraction] = {name: Fraction(0) for name in record["by_source"]}
    for row in rows:
        weight[by_row[row["row"]].source] += sum(map(Fraction, row["weight"]))
    assert {name: counts["weight"] for name, counts in record["by_source"].items()} == {
        name: float(total) for name, total in weight.items()
    }
    assert record["totals"]["weight"] == float(sum(weight.values()))
    report = selection_report(record)
    assert f"{record['totals']['weight'] / record['totals']['active_tokens']:.3f}" in report
    assert "weights clamp:low=0.01,high=5.0,window=3" in report
    assert " 1.000\n" in report, "text-only rows"
    assert "weight" not in selection_report(select(tmp_path / "hard", several_turns())[0])


@patient
@given(st.lists(st.floats(0, 2.0**100, width=32, allow_nan=False), max_size=20), st.integers(0, 3))
def test_sums_of_parts_add_up_to_the_exact_sum(values: list[float], n_groups: int) -> None:
    group = np.arange(len(values)) % (n_groups + 1)
    array = np.asarray(values, np.float32)
    sums = exact_sums(array, group)
    for number in range(n_groups + 1):
        expected = sum(map(Fraction, array[group == number].tolist()), start=Fraction(0))
        assert Fraction(sums.get(number, 0), 1 << UNIT) == expected


def test_a_selection_of_text_alone_beside_pictures_weighs_one_a_token(tmp_path: Path) -> None:
    record, rows = select(tmp_path, [scored(0, [7.0]), text_only(1, 3)], weights="clamp", keep=100)
    assert [row["weight"] for row in rows] == [[5.0], [1.0, 1.0, 1.0]]
    assert record["totals"]["weight"] == 8.0


# ---------------------------------------------------------------- what is asked for


def test_specs_are_read_and_written_with_every_option() -> None:
    assert parse_weights("hard") == Hard()
    assert parse_weights("clamp") == Clamp(low=1, high=5, window=3)
    assert parse_weights("clamp:window=5, low=0.5").spec == "clamp:low=0.5,high=5.0,window=5"
    assert parse_weights(parse_weights("clamp:high=2").spec) == Clamp(high=2)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("clmp", UnknownName, "did you mean 'clamp'"),
        ("clamp:low=0", ConfigError, "0 < low <= high"),
        ("clamp:low=6", ConfigError, "0 < low <= high"),
        ("clamp:high=inf", ConfigError, "0 < low <= high"),
        ("clamp:low=nan", ConfigError, "0 < low <= high"),
        ("clamp:window=2", ConfigError, "odd number"),
        ("clamp:window=-1", ConfigError, "odd number"),
        ("hard:low=1", ConfigError, "takes no options"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_read(
    tmp_path: Path, spec: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_select(SelectConfig(scores=tmp_path / "none", out=tmp_path / "out", weights=spec))
