"""Export to anything that reads LLaVA's JSON: the kept rows and nothing else, for whoever selects by row alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from visgain.data import Dataset
from visgain.data.jsontext import JoinedRows, JsonRows
from visgain.data.llava import LLAVA
from visgain.data.records import RecordDataset, find_layout
from visgain.export.llava import DATA, llava_record
from visgain.export.rows import KeptRow, Selected
from visgain.storage import atomic_path

ROWS = "rows.json"
"""Beside the data: the place in the dataset of each of its rows."""


@dataclass(frozen=True)
class LlavaJson:
    """`--to llava-json`."""

    def export(self, selected: Selected, out: Path) -> Sequence[str]:
        written = _as_written(selected.dataset)

        def text(kept: KeptRow) -> str:
            return written(kept.row) if written else json.dumps(llava_record(kept, out), ensure_ascii=False)

        numbers: list[int] = []
        with atomic_path(out / DATA) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            for kept in selected:
                file.write(f"{',' if numbers else '['}\n{text(kept)}")
                numbers.append(kept.row)
            file.write("\n]\n")
        with atomic_path(out / ROWS) as temporary:
            temporary.write_text(json.dumps(numbers) + "\n")
        return list(_notes(selected, is_copy=written is not None))


def _as_written(dataset: Dataset) -> Callable[[int], str] | None:
    """What gives a row as the dataset has it, to the letter; None where that is not LLaVA's JSON."""
    if not isinstance(dataset, RecordDataset) or not isinstance(dataset.rows, JsonRows | JoinedRows):
        return None
    layout = find_layout(dataset.rows.fields, dataset.columns, dataset.path)
    return dataset.rows.text if layout is LLAVA and not dataset.columns else None


def _notes(selected: Selected, *, is_copy: bool) -> Sequence[str]:
    notes = []
    if left := selected.n_tokens - selected.n_active:
        notes.append(f"{left:,} answer tokens that are not selected carry loss all the same: {DATA} has no masks")
    if not is_copy:
        notes.append(f"{selected.config.data} is not LLaVA's JSON, so its rows are written anew")
    return notes
