"""Counts of a finished run and skipped.jsonl, whatever the parts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tiny_scores import mixed_records, text_only
from visgain import spill, storage
from visgain.errors import StorageError
from visgain.summary import summarise_scores
from visgain.types import Skipped, TokenScores


@pytest.mark.parametrize("n_parts", [1, 3, 70])
def test_counts_and_the_list_of_skipped_rows_equal_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_parts: int
) -> None:
    monkeypatch.setattr(spill, "WINDOW_ROWS", 7)
    monkeypatch.setattr(spill, "BUFFER_BYTES", 30)
    monkeypatch.setattr(storage, "_CHUNK_ROWS", 8)
    records = mixed_records()
    records[27] = replace(records[27], reason="no image \u00e9")
    part = np.random.default_rng(n_parts).integers(n_parts, size=len(records))
    storage.claim_run(tmp_path, {}, {"n_parts": n_parts})
    for index in range(n_parts):
        rows = [record for record, where in zip(records, part, strict=True) if where == index]
        storage.write_part(tmp_path, index, n_parts, storage.score_table(rows))

    summary = summarise_scores(tmp_path)
    skipped = [record for record in records if isinstance(record, Skipped)]
    measured = [record for record in records if isinstance(record, TokenScores)]
    gains = [record.mean_gain for record in measured if record.n_images]
    assert (summary.rows, summary.multimodal, summary.text_only, summary.skipped) == (60, len(gains), 6, len(skipped))
    assert summary.answer_tokens == sum(len(record.token_id) for record in measured)
    assert summary.mean_gain == math.fsum(gains) / len(gains)
    assert "\u00e9" in (tmp_path / "skipped.jsonl").read_text(encoding="utf-8")
    lines = (tmp_path / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    expected = [{"row": record.row, "id": record.id, "reason": record.reason} for record in skipped]
    assert [json.loads(line) for line in lines] == expected


def test_a_run_without_a_gain_has_no_mean(tmp_path: Path) -> None:
    storage.claim_run(tmp_path, {}, {"n_parts": 1})
    storage.write_part(tmp_path, 0, 1, storage.score_table([text_only(0, 3)]))
    summary = summarise_scores(tmp_path)
    assert (summary.multimodal, summary.text_only, summary.answer_tokens) == (0, 1, 3)
    assert math.isnan(summary.mean_gain)
    assert (tmp_path / "skipped.jsonl").read_text() == ""


def test_an_unfinished_run_is_not_summed_up(tmp_path: Path) -> None:
    storage.claim_run(tmp_path, {}, {"n_parts": 2})
    storage.write_part(tmp_path, 0, 2, storage.score_table([text_only(0, 3)]))
    with pytest.raises(StorageError, match="1 of 2 parts missing"):
        summarise_scores(tmp_path)
    assert not (tmp_path / "skipped.jsonl").exists()
