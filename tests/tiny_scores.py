"""Scores with given gains, on disk or not, and the paper's rule in plain Python to compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from visgain import storage
from visgain.types import Skipped, TokenScores

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
