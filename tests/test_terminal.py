"""`visgain show`: one row in the terminal."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from tiny_run import EVIL, records, write_dataset, write_scores
from visgain.config import ShowConfig
from visgain.errors import DataError
from visgain.report.terminal import TABLE_ROWS, printable, shade, show, token_table
from visgain.scored import RowTokens

TEXT_ONLY, EVIL_ROW, TWO_IMAGES, SKIPPED = 8, 9, 10, 11


@pytest.fixture
def run(tmp_path):
    write_scores(tmp_path / "scores", write_dataset(tmp_path / "data"))
    return tmp_path


def shown(run, row, **console):
    out = io.StringIO()
    show(row, ShowConfig(scores=run / "scores"), Console(file=out, width=120, **console))
    return out.getvalue()


def test_a_row_shows_its_turns_and_tokens(run):
    text = shown(run, 0)
    assert "row 0" in text
    assert "coco" in text
    assert "What is it?" in text
    assert "A red ball on the grass." in text
    assert "nats" in text
    lines = text.splitlines()
    for token in ("A", "red", "ball", ".", "⏎ end of turn"):
        assert any(line.startswith(token + " ") for line in lines)


def test_without_colours_nothing_is_escaped_and_with_colours_tokens_are(run, monkeypatch):
    assert "\x1b" not in shown(run, 0)
    coloured = shown(run, 0, force_terminal=True, color_system="truecolor")
    assert "\x1b[38;2;" in coloured
    assert "and beyond" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "48;2;" not in shown(run, 0, force_terminal=True, color_system="truecolor")


def test_texts_are_not_markup(run):
    assert EVIL in shown(run, EVIL_ROW)
    text = shown(run, TWO_IMAGES)
    assert "[bold]them[/bold]" in text
    assert "[image 1]" in text
    assert "2 images" in text


def test_a_row_of_several_images_says_what_each_gains(tmp_path):
    write_scores(tmp_path / "scores", write_dataset(tmp_path / "data"), per_image=True)
    assert "gain per image  image 1 +0.100 · image 2 +0.200 nats" in shown(tmp_path, TWO_IMAGES)
    for row in (0, TEXT_ONLY, SKIPPED):
        assert "gain per image" not in shown(tmp_path, row)


def test_control_characters_cannot_reach_the_terminal():
    assert printable("a\x1b[31mb\r\nc\td\u202ee\u3000f") == "a�[31mb�\nc\td�e\u3000f"


def test_a_skipped_row_prints_its_reason(run):
    assert "image coco/gone.png does not exist" in shown(run, SKIPPED)


def test_a_text_only_row_says_that_it_has_no_scores(run):
    text = shown(run, TEXT_ONLY)
    assert "no scores" in text
    assert "Paris." in text


@pytest.mark.parametrize("row", [-1, 12, 10**30])
def test_an_unknown_row_is_refused_with_the_range(run, row):
    with pytest.raises(DataError, match="rows 0 to 11"):
        shown(run, row)


def test_a_row_of_an_unfinished_run(run):
    (run / "scores" / "part-00000-of-00002.parquet").unlink()
    assert "row 7" in shown(run, 7)
    with pytest.raises(DataError, match="unfinished"):
        shown(run, 0)


def test_a_changed_or_missing_dataset_is_refused(run):
    rows = records()
    rows[0]["conversations"][1]["value"] = "Another answer."
    (run / "data" / "data.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"changed since it was scored \(row 0\)"):
        shown(run, 0)
    (run / "data" / "data.json").unlink()
    with pytest.raises(DataError, match="--data"):
        shown(run, 0)


def test_a_long_answer_lists_its_ends(run):
    n = 50
    tokens = RowTokens(
        row=0,
        fingerprint=0,
        truncated=False,
        turn=np.zeros(n, dtype=np.int32),
        chars=np.stack([np.arange(n), np.arange(1, n + 1)], axis=1).astype(np.int32),
        seen=np.zeros(n, dtype=np.float32),
        blind=np.linspace(-1, 1, n, dtype=np.float32),
    )
    assert token_table(["x" * n], tokens).row_count == 2 * TABLE_ROWS + 1


def test_colours_grow_with_the_gain():
    assert len({str(shade(share)) for share in (-1, -0.6, -0.4, -0.1, 0.1, 0.4, 0.6, 1)}) == 8
