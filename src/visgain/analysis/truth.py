"""Token gain against ground truth: does a high gain find the tokens that can only be known from the image?

Ground truth is a JSONL file, one line for every row that has it:

    {"row": 7, "answers": [[[4, 7], [16, 22]], []]}

where `answers[k]` lists the character spans [start, end) of the visual words of the row's k-th answer. A token is
visual if its own span shares a non-whitespace character with one of them; end-of-turn tokens never are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Float64, Integer, Real

from visgain.errors import DataError
from visgain.storage import flat_values, list_lengths

Spans = list[tuple[int, int]]
Truth = dict[int, list[Spans]]
"""Row -> one list of visual spans for each of its answers."""

_ANSWER_STRIDE = 1 << 31  # longer than any answer: lays all answers on one line of characters


def read_truth(path: Path) -> Truth:
    """Visual spans of every row that has ground truth. Raises DataError with the line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the ground truth {path}: {error}") from error
    truth: Truth = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row, answers = _parse_line(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f'{path}:{number} is not {{"row": int, "answers": [[[start, end], ...], ...]}}: {error}'
            ) from error
        if row in truth:
            raise DataError(f"{path}:{number} names row {row} a second time")
        truth[row] = answers
    return truth


def _parse_line(record: Any) -> tuple[int, list[Spans]]:
    answers = [[(_count(start), _count(end)) for start, end in spans] for spans in record["answers"]]
    return _count(record["row"]), answers


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _ANSWER_STRIDE:
        raise ValueError(f"{value!r} is not a position")
    return value


def visual_mask(
    turn: Integer[np.ndarray, " A"],
    chars: Integer[np.ndarray, "A 2"],
    spans: Sequence[Sequence[tuple[int, int]]],
    answers: Sequence[str] | None = None,
) -> Bool[np.ndarray, " A"]:
    """Which answer tokens of one row are visual.

    `turn` and `chars` are those of the score row, `spans` the row's ground truth. With `answers` (the row's texts)
    whitespace inside a visual span counts for nothing; without them spans are taken to hold none, as those of single
    words do.
    """
    return _overlaps(np.asarray(turn, dtype=np.int64), chars, _row_spans(spans, answers))


def _row_spans(
    spans: Sequence[Sequence[tuple[int, int]]], answers: Sequence[str] | None
) -> Sequence[Sequence[tuple[int, int]]]:
    if answers is None:
        return spans
    if len(answers) < len(spans):
        raise DataError(f"the ground truth has {len(spans)} answers where the dataset has {len(answers)}")
    return [_inked(part, answers[index]) for index, part in enumerate(spans)]


def _inked(spans: Sequence[tuple[int, int]], answer: str) -> Spans:
    """The spans with their whitespace cut out."""
    runs = [(start, match) for start, end in spans for match in re.finditer(r"\S+", answer[start:end])]
    return [(start + match.start(), start + match.end()) for start, match in runs]


def _overlaps(
    answer: np.ndarray,
    chars: np.ndarray,
    spans: Sequence[Sequence[tuple[int, int]]],
) -> Bool[np.ndarray, " N"]:
    """Whether each token's [start, end) overlaps a span of its answer; `answer` indexes `spans`.

    An interval that begins before the token ends either overlaps it or has ended before it begins, so the number of
    overlapping ones is a difference of two counts, for spans in any order and however they overlap each other.
    """
    flat = [(index, start, end) for index, part in enumerate(spans) for start, end in part if start < end]
    index, start, end = np.array(flat, dtype=np.int64).reshape(-1, 3).T
    base = answer.astype(np.int64) * _ANSWER_STRIDE
    token_start, token_end = base + chars[:, 0], base + chars[:, 1]
    begun = np.searchsorted(np.sort(index * _ANSWER_STRIDE + start), token_end, side="left")
    over = np.searchsorted(np.sort(index * _ANSWER_STRIDE + end), token_start, side="right")
    return np.asarray((begun > over) & (token_start < token_end))


def token_truth(
    scores: pa.Table, truth: Truth, answers: Callable[[int], Sequence[str]] | None = None
) -> tuple[Float32[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """Gain and visualness of every scored multimodal token whose row has ground truth, in row order.

    `scores` needs the columns row, turn, char_start, char_end, nll_seen and nll_blind. `answers` gives the texts of a
    row, as in `visual_mask`; without it a token of nothing but a blank inside a span of several words is visual.
    Raises DataError if a row has more answers than its ground truth.
    """
    known = np.fromiter(truth, dtype=np.int64, count=len(truth))
    scored = list_lengths(scores.column("nll_seen")) > 0
    table = scores.filter(pa.array(scored & np.isin(scores.column("row").to_numpy(), known)))
    rows = table.column("row").to_numpy()
    lengths = list_lengths(table.column("turn"))
    turn = flat_values(table.column("turn")).astype(np.int64)
    n_answers = np.array([len(truth[row]) for row in rows.tolist()], dtype=np.int64)
    _require_answers(rows, lengths, turn, n_answers)

    first_answer = np.cumsum(n_answers) - n_answers
    spans = [part for row in rows.tolist() for part in _row_spans(truth[row], answers(row) if answers else None)]
    chars = np.stack([flat_values(table.column("char_start")), flat_values(table.column("char_end"))], axis=1)
    visual = _overlaps(np.repeat(first_answer, lengths) + turn, chars, spans)
    gain = flat_values(table.column("nll_blind")) - flat_values(table.column("nll_seen"))
    return gain.astype(np.float32), visual


def _require_answers(rows: np.ndarray, lengths: np.ndarray, turn: np.ndarray, n_answers: np.ndarray) -> None:
    beyond = np.flatnonzero(turn >= np.repeat(n_answers, lengths))
    if len(beyond):
        row = np.repeat(rows, lengths)[beyond[0]]
        raise DataError(
            f"the ground truth of row {row} has fewer answers than its scores (answer {turn[beyond[0]] + 1} is "
            "missing); it belongs to another dataset"
        )


def auroc(score: Real[np.ndarray, " N"], label: Bool[np.ndarray, " N"]) -> float:
    """Chance that a random positive scores above a random negative, ties counting half. nan without both kinds.

    Exact: pairs are counted in integers, so it equals the O(N^2) count.
    """
    positives, negatives = _counts_by_score(score, label)
    n_positive, n_negative = int(positives.sum()), int(negatives.sum())
    if n_positive == 0 or n_negative == 0:
        return float("nan")
    below = np.cumsum(negatives) - negatives
    half_wins = int((positives * (2 * below + negatives)).sum())
    return half_wins / (2 * n_positive * n_negative)


def roc_curve(
    score: Real[np.ndarray, " N"], label: Bool[np.ndarray, " N"]
) -> tuple[Float64[np.ndarray, " K"], Float64[np.ndarray, " K"]]:
    """False and true positive rates from (0, 0) to (1, 1), one point for each distinct score as the threshold falls.

    Straight lines between the points enclose exactly the area `auroc`. nan where one kind is absent.
    """
    positives, negatives = _counts_by_score(score, label)
    return _rates(negatives[::-1]), _rates(positives[::-1])


def _counts_by_score(score: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of positives and of negatives at each distinct score, ascending: int64 each."""
    label = np.asarray(label, dtype=bool)
    values, group = np.unique(np.asarray(score), return_inverse=True)
    total = np.bincount(group, minlength=len(values)).astype(np.int64)
    positives = np.bincount(group[label], minlength=len(values)).astype(np.int64)
    return positives, total - positives


def _rates(counts: np.ndarray) -> np.ndarray:
    total = counts.sum()
    cumulative = np.concatenate([[0], np.cumsum(counts)])
    return cumulative / total if total else np.full(len(cumulative), np.nan)


__all__: Sequence[str] = ("Truth", "auroc", "read_truth", "roc_curve", "token_truth", "visual_mask")
