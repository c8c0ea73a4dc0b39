"""What a finished run of `visgain score` holds, in counts, and skipped.jsonl, derived from its parts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from visgain.quantile import exact_sum
from visgain.spill import Spill, window
from visgain.storage import atomic_path, list_lengths, scan_scores


@dataclass(frozen=True, kw_only=True)
class ScoreSummary:
    rows: int
    multimodal: int  # scored with an image
    text_only: int
    skipped: int
    answer_tokens: int  # of scored and text-only rows
    mean_gain: float  # nats, over the multimodal rows; nan without any


_COLUMNS = ("row", "id", "skip_reason", "gain", "token_id")
_SPILLED = pa.schema({"row": pa.int64(), "id": pa.string(), "skip_reason": pa.string()})
_GAINS = pa.schema({"gain": pa.float64()})


def summarise_scores(folder: Path) -> ScoreSummary:
    """Count over all parts of a finished run, and write skipped.jsonl (row, id, reason; in row order), its last file.

    Memory does not grow with the run. Raises StorageError if the run is unfinished or damaged, or cannot be written to.
    """
    rows = n_tokens = n_skipped = 0
    with Spill(folder, _SPILLED) as skipped, Spill(folder, _GAINS) as gains:
        for table in scan_scores(folder, _COLUMNS, description="summing up"):
            rows += len(table)
            n_tokens += int(list_lengths(table.column("token_id")).sum())
            gains.add(table.select(["gain"]).filter(pc.is_valid(table.column("gain"))), 0)
            left_out = table.select(_SPILLED.names).filter(pc.is_valid(table.column("skip_reason")))
            skipped.add(left_out, window(left_out.column("row").to_numpy()))
            n_skipped += len(left_out)
        _write_skipped(folder / "skipped.jsonl", skipped.in_row_order())
        n_gains = sum(map(len, gains.column("gain")))
        return ScoreSummary(
            rows=rows,
            multimodal=n_gains,
            text_only=rows - n_gains - n_skipped,
            skipped=n_skipped,
            answer_tokens=n_tokens,
            mean_gain=exact_sum(gains.column("gain")) / n_gains if n_gains else float("nan"),
        )


def _write_skipped(path: Path, tables: Iterable[pa.Table]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for table in tables:
            file.writelines(_lines(table))


def _lines(skipped: pa.Table) -> Iterator[str]:
    for row in skipped.to_pylist():
        record = {"row": row["row"], "id": row["id"], "reason": row["skip_reason"]}
        yield json.dumps(record, ensure_ascii=False) + "\n"
