"""Arms on the user's data: rows that nobody trains on, and how well each model predicts their answers.

Pictures are held out, not rows: a row is tested if all of its pictures are held out, trained on if none is, and neither
where it is both. Which pictures depends on the seed and on their names alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float64, Int64, UInt64
from tqdm import tqdm

from visgain.data import Dataset
from visgain.data.placed import place_images
from visgain.errors import ConfigError, DataError, ImageError
from visgain.scramble import random_key, scrambled
from visgain.storage import (
    read_json,
    read_scores,
    score_parts,
    score_schema,
    write_json,
    write_part,
    write_text,
)
from visgain.types import Sample


@dataclass(frozen=True, kw_only=True)
class Division:
    """The rows of a dataset: those to test on, and those that must not be trained on (tested or mixed)."""

    tested: Int64[np.ndarray, " n"]
    withheld: Int64[np.ndarray, " m"]


def divide(dataset: Dataset, wanted: int | None, seed: int) -> Division:
    """Hold out the pictures of about `wanted` rows (by default a tenth of those with pictures, at most 1,000).

    A few more rows than wanted are tested where they share the last picture. Raises ConfigError if that would be more
    than half of the rows with pictures.
    """
    rows, first, last = _tickets(dataset, seed)
    wanted = min(1000, math.ceil(len(rows) / 10)) if wanted is None else wanted
    if len(rows) == 0:
        raise DataError(f"{dataset.path} has no rows with pictures to hold out; give --eval-data")
    if wanted > len(rows) / 2:
        raise ConfigError(
            f"--test-rows is {wanted}, more than half of the {len(rows):,} rows with pictures; hold out less, or give "
            "--eval-data"
        )
    limit = np.partition(last, wanted - 1)[wanted - 1]
    return Division(tested=rows[last <= limit], withheld=rows[first <= limit])


def _tickets(
    dataset: Dataset, seed: int
) -> tuple[Int64[np.ndarray, " n"], UInt64[np.ndarray, " n"], UInt64[np.ndarray, " n"]]:
    """The rows with pictures, each with the smallest and the largest of its pictures' random numbers."""
    key = random_key(seed)
    rows, first, last = [], [], []
    for row in tqdm(range(len(dataset)), desc="dividing", unit="row", delay=2, mininterval=0.5):
        sample = dataset[row]
        if isinstance(sample, Sample) and sample.images:
            drawn = scrambled(np.array([_number(image.key) for image in sample.images], np.uint64), key)
            rows.append(row)
            first.append(drawn.min())
            last.append(drawn.max())
    return np.array(rows, np.int64), np.array(first, np.uint64), np.array(last, np.uint64)


def _number(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


# ---------------------------------------------------------------- the two sides on disk


PLACE = "place.json"


def write_tested(dataset: Dataset, rows: Sequence[int], folder: Path) -> Path:
    """Those rows as a dataset of their own in `folder`, which is returned: data.jsonl, and last place.json.

    place.json says where its pictures are, null for `folder` itself: {"image_root", "rows"}. Rows with a picture that
    cannot be read are left out and counted on stderr. Raises DataError if none is left.
    """
    samples = [sample for row in rows if isinstance(sample := dataset[row], Sample) and _unreadable(sample) is None]
    if len(samples) < len(rows):
        print(f"visgain: {len(rows) - len(samples)} held-out rows cannot be read and are left out", file=sys.stderr)
    if not samples:
        raise DataError(f"none of the {len(rows)} rows held out of {dataset.path} can be read")
    names, root = place_images([sample.images for sample in samples], folder)
    lines = [json.dumps(_record(*each), ensure_ascii=False) + "\n" for each in zip(samples, names, strict=True)]
    write_text(folder / "data.jsonl", "".join(lines))
    elsewhere = None if root == folder else str(root.resolve())
    write_json(folder / PLACE, {"image_root": elsewhere, "rows": len(samples)})
    return folder


def check_tested(dataset: Dataset) -> None:
    """Raise DataError unless some row has pictures, all of which can be read: only such rows are tested."""
    wrong: str | None = None
    for row in tqdm(range(len(dataset)), desc="looking for pictures", unit="row", delay=2, mininterval=0.5):
        sample = dataset[row]
        if isinstance(sample, Sample) and not sample.images:
            continue
        reason = _unreadable(sample) if isinstance(sample, Sample) else sample.reason
        if reason is None:
            return
        wrong = wrong or f"row {row}: {reason}"
    if wrong is None:
        raise DataError(
            f"--eval-data: {dataset.path} has no rows with pictures, and no others are tested; name another one, or "
            "leave the option out to hold out rows of --data"
        )
    raise DataError(f"--eval-data: no row of {dataset.path} with pictures can be read ({wrong}); check --image-root")


def _unreadable(sample: Sample) -> str | None:
    """What is wrong with the pictures, or None."""
    try:
        for image in sample.images:
            image.open()
    except ImageError as error:
        return str(error)
    return None


def _record(sample: Sample, images: Sequence[str]) -> dict[str, Any]:
    return {
        "id": f"{sample.row}",
        "source": sample.source,
        "images": list(images),
        "messages": [{"role": turn.role, "content": turn.text} for turn in sample.turns],
    }


def without_rows(scores: Path, withheld: Int64[np.ndarray, " m"], out: Path) -> Path:
    """The scores in `scores` without some rows, as a finished run in `out`: run.json is written last."""
    run = read_json(scores / "run.json", "scores")
    if (out / "run.json").is_file():
        return out
    paths = score_parts(scores)
    for index, path in enumerate(paths):
        table = pq.read_table(path, schema=score_schema(run))
        kept = ~np.isin(table.column("row").to_numpy(), withheld)
        write_part(out, index, len(paths), table.filter(pa.array(kept)))
    write_json(out / "run.json", {**run, "withheld": len(withheld)})
    return out


# ---------------------------------------------------------------- the measure


NEEDING = 1.0
"""Nats of gain from which on a token counts as one that needs the picture: it makes the token e times as likely."""


def held_out_metrics(scores: Path, start: Path) -> dict[str, float]:
    """How well the model of `scores` predicts the tested rows, which the starting model scored in `start`.

    Means over the answer tokens of rows that both could score, in nats: NLL seen and blind, gain, and NLL seen of the
    tokens that need the picture by the starting model's gain (absent if none does). Raises DataError if there are no
    rows.
    """
    trained, before = _nlls(scores), _nlls(start)
    rows = sorted(trained.keys() & before.keys())
    if not rows:
        raise DataError(f"{scores}: no tested row could be scored; its skipped.jsonl says why")
    seen, blind = (np.concatenate([trained[row][which] for row in rows]) for which in (0, 1))
    needing = np.concatenate([before[row][1] - before[row][0] for row in rows]) >= NEEDING
    return {
        "nll_seen": float(seen.mean()),
        "nll_blind": float(blind.mean()),
        "gain": float((blind - seen).mean()),
        **({"nll_needing": float(seen[needing].mean())} if needing.any() else {}),
        "test_rows": len(rows),
        "test_tokens": len(seen),
        "needing_tokens": int(needing.sum()),
    }


def _nlls(scores: Path) -> dict[int, Float64[np.ndarray, "2 a"]]:
    """NLL of each scored row's a tokens, seen and blind."""
    table = read_scores(scores, ["row", "nll_seen", "nll_blind"])
    columns = (table.column(name).to_pylist() for name in ("row", "nll_seen", "nll_blind"))
    return {row: np.array([seen, blind], np.float64) for row, seen, blind in zip(*columns, strict=True) if seen}
