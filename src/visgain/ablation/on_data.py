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
from jaxtyping import Int64, UInt64
from tqdm import tqdm

from visgain.data import Dataset
from visgain.data.placed import place_images
from visgain.errors import ConfigError, DataError, ImageError
from visgain.scramble import random_key, scrambled
from visgain.storage import (
    flat_values,
    read_json,
    scan_scores,
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

    place.json says where the dataset and its pictures are: {"data", "image_root", "rows"}. Rows with a picture that
    cannot be read are left out and counted on stderr. Raises DataError if none is left.
    """
    samples = [sample for row in rows if isinstance(sample := dataset[row], Sample) and _is_readable(sample)]
    if len(samples) < len(rows):
        print(f"visgain: {len(rows) - len(samples)} held-out rows cannot be read and are left out", file=sys.stderr)
    if not samples:
        raise DataError(f"none of the {len(rows)} rows held out of {dataset.path} can be read")
    names, root = place_images([sample.images for sample in samples], folder)
    lines = [json.dumps(_record(*each), ensure_ascii=False) + "\n" for each in zip(samples, names, strict=True)]
    write_text(folder / "data.jsonl", "".join(lines))
    write_json(folder / PLACE, {"data": str(folder / "data.jsonl"), "image_root": str(root), "rows": len(samples)})
    return folder


def _is_readable(sample: Sample) -> bool:
    try:
        for image in sample.images:
            image.open()
    except ImageError:
        return False
    return True


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


def held_out_metrics(scores: Path) -> dict[str, float]:
    """Mean NLL, seen and blind, and mean gain over all answer tokens of scored rows, in nats, and how many they are.

    Raises DataError if no row could be scored.
    """
    sums, n_tokens, n_rows = np.zeros(2), 0, 0
    for table in scan_scores(scores, ["gain", "nll_seen", "nll_blind"], description="held-out rows"):
        seen, blind = (flat_values(table.column(name)).astype(np.float64) for name in ("nll_seen", "nll_blind"))
        sums += seen.sum(), blind.sum()
        n_tokens += len(seen)
        n_rows += len(table) - table.column("gain").null_count
    if n_tokens == 0:
        raise DataError(f"{scores}: no held-out row could be scored; its skipped.jsonl says why")
    seen_mean, blind_mean = (sums / n_tokens).tolist()
    return {
        "nll_seen": seen_mean,
        "nll_blind": blind_mean,
        "gain": blind_mean - seen_mean,
        "test_rows": n_rows,
        "test_tokens": n_tokens,
    }
