"""Ground truth: which tokens are visual, and how well gain finds them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visgain.analysis.truth import auroc, read_truth, roc_curve, token_truth, visual_mask
from visgain.errors import DataError
from visgain.storage import score_table
from visgain.types import Skipped, TokenScores

scored_labels = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=40)


def naive_auroc(score: list[float], label: list[bool]) -> float:
    positives = [s for s, is_positive in zip(score, label, strict=True) if is_positive]
    negatives = [s for s, is_positive in zip(score, label, strict=True) if not is_positive]
    wins = sum((p > n) + (p == n) / 2 for p in positives for n in negatives)
    return wins / (len(positives) * len(negatives)) if positives and negatives else math.nan


@given(scored_labels)
def test_auroc_equals_the_count_of_pairs(pairs):
    score, label = [float(s) for s, _ in pairs], [is_positive for _, is_positive in pairs]
    assert auroc(np.array(score), np.array(label)) == pytest.approx(naive_auroc(score, label), abs=0, nan_ok=True)


@given(scored_labels)
def test_the_roc_curve_rises_from_corner_to_corner_and_encloses_the_auroc(pairs):
    score, label = np.array([s for s, _ in pairs]), np.array([is_positive for _, is_positive in pairs])
    false_rate, true_rate = roc_curve(score, label)
    if label.all() or not label.any():
        assert math.isnan(auroc(score, label))
        return
    assert (false_rate[0], true_rate[0], false_rate[-1], true_rate[-1]) == (0, 0, 1, 1)
    assert (np.diff(false_rate) >= 0).all()
    assert (np.diff(true_rate) >= 0).all()
    area = (np.diff(false_rate) * (true_rate[1:] + true_rate[:-1]) / 2).sum()
    assert area == pytest.approx(auroc(score, label))


ANSWER = "a red  ball"


@pytest.mark.parametrize(
    ("token", "spans", "visual"),
    [
        ((1, 5), [(2, 5)], True),  # " red"
        ((0, 1), [(2, 5)], False),
        ((1, 2), [(2, 5)], False),  # the space in front of it
        ((4, 8), [(2, 5)], True),  # one shared letter is enough
        ((5, 7), [(2, 11)], False),  # shares whitespace only
        ((5, 8), [(2, 11)], True),
        ((11, 11), [(0, 11)], False),  # end of turn
        ((3, 3), [(0, 11)], False),  # an empty token in the middle
        ((7, 11), [], False),
        ((7, 11), [(9, 9)], False),  # an empty span covers nothing
        ((7, 11), [(9, 10), (0, 11)], True),  # nested spans in any order
    ],
)
def test_a_token_is_visual_if_it_shares_ink_with_a_visual_word(token, spans, visual):
    mask = visual_mask(np.array([0]), np.array([token]), [spans], [ANSWER])
    assert mask.tolist() == [visual]


def test_spans_count_for_their_own_answer_only():
    turn, chars = np.array([0, 0, 1, 1]), np.array([[0, 3], [3, 3], [0, 3], [3, 3]])
    assert visual_mask(turn, chars, [[], [(0, 3)]]).tolist() == [False, False, True, False]


interval = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(lambda pair: (min(pair), max(pair)))


@given(
    st.lists(st.tuples(st.integers(0, 2), interval), max_size=12),
    st.lists(st.lists(interval, max_size=4), min_size=3, max_size=3),
    st.text(alphabet="ab ", min_size=12, max_size=12),
)
def test_visual_mask_equals_the_check_of_every_character(tokens, spans, text):
    turn = np.array([index for index, _ in tokens], dtype=np.int32)
    chars = np.array([chars for _, chars in tokens], dtype=np.int32).reshape(-1, 2)
    ink = [{k for start, end in part for k in range(start, end) if not text[k].isspace()} for part in spans]
    expected = [bool(ink[index] & set(range(*chars))) for index, chars in tokens]
    assert visual_mask(turn, chars, spans, [text] * 3).tolist() == expected


def scores(row, turn, chars, gains):
    gain = np.array(gains, dtype=np.float32)
    return TokenScores(
        row=row,
        id=str(row),
        fingerprint=row,
        source="s",
        n_images=1 if len(gain) else 0,
        n_image_tokens=4,
        n_prompt_tokens=9,
        truncated=False,
        token_id=np.arange(len(turn), dtype=np.int32),
        turn=np.array(turn, dtype=np.int32),
        chars=np.array(chars, dtype=np.int32),
        nll_seen=np.zeros_like(gain),
        nll_blind=gain,
    )


def test_token_truth_joins_rows_and_leaves_out_those_without_scores_or_truth():
    table = score_table(
        [
            scores(0, [0, 0], [[0, 3], [3, 3]], [2.0, 0.5]),
            scores(1, [0], [[0, 3]], []),  # text-only
            Skipped(row=2, id="2", reason="no picture"),
            scores(3, [0], [[0, 3]], [9.0]),  # has no truth
            scores(5, [0, 1, 1], [[0, 3], [0, 3], [3, 8]], [-1.0, 3.0, 4.0]),
        ]
    )
    truth = {0: [[(0, 3)]], 1: [[(0, 3)]], 2: [[]], 5: [[], [(4, 8)]], 77: [[]]}
    gain, is_visual = token_truth(table, truth)
    assert gain.tolist() == [2.0, 0.5, -1.0, 3.0, 4.0]
    assert gain.dtype == np.float32
    assert is_visual.tolist() == [True, False, False, False, True]


def test_token_truth_of_no_common_row_is_empty():
    gain, is_visual = token_truth(score_table([scores(0, [0], [[0, 3]], [2.0])]), {})
    assert len(gain) == len(is_visual) == 0


def test_token_truth_with_the_texts_leaves_blanks_out():
    table = score_table([scores(0, [0, 0, 0], [[0, 3], [3, 4], [4, 8]], [2.0, 0.5, 1.0])])
    truth = {0: [[(0, 8)]]}
    assert token_truth(table, truth)[1].tolist() == [True, True, True]
    assert token_truth(table, truth, lambda _: ["red ball"])[1].tolist() == [True, False, True]
    with pytest.raises(DataError, match="1 answers"):
        token_truth(table, truth, lambda _: [])


def test_truth_with_too_few_answers_is_refused():
    table = score_table([scores(4, [0, 1], [[0, 3], [0, 3]], [2.0, 1.0])])
    with pytest.raises(DataError, match="row 4"):
        token_truth(table, {4: [[(0, 3)]]})


def test_read_truth_reads_spans(tmp_path):
    path = tmp_path / "truth.jsonl"
    lines = [{"row": 0, "answers": [[[0, 3], [5, 7]], []]}, {"row": 9, "answers": []}]
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    assert read_truth(path) == {0: [[(0, 3), (5, 7)], []], 9: []}


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"row": 1}',
        '{"row": 1, "answers": [[[1]]]}',
        '{"row": -1, "answers": []}',
        '{"row": 0, "answers": []}',
    ],
)
def test_read_truth_names_the_wrong_line(tmp_path, line):
    path = tmp_path / "truth.jsonl"
    path.write_text('{"row": 0, "answers": []}\n' + line + "\n")
    with pytest.raises(DataError, match=r"truth\.jsonl:2"):
        read_truth(path)


def test_read_truth_says_which_file_is_missing(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        read_truth(tmp_path / "nowhere.jsonl")
