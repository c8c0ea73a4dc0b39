"""Conversations as a table that a trainer built on `datasets` reads: messages, and the paths of pictures.

Parquet and not JSON, because `datasets` guesses the types of JSON from its first megabytes, and then fails on the first
picture behind a long run of text-only rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from visgain.errors import ConfigError
from visgain.export.rows import Selected
from visgain.storage import atomic_path
from visgain.types import IMAGE_MARK, Sample

TABLE = "train.parquet"

_GROUP_ROWS = 1 << 10


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Rows as a parquet file, whole or not at all; memory does not grow with their number."""
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        waiting: list[Mapping[str, Any]] = []
        for row in rows:
            waiting.append(row)
            if len(waiting) == _GROUP_ROWS:
                writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
                waiting = []
        writer.write_table(pa.Table.from_pylist(waiting, schema=schema))


def messages_of(sample: Sample) -> list[dict[str, str]]:
    """The turns as role and content, text as the dataset has it."""
    return [{"role": turn.role, "content": turn.text} for turn in sample.turns]


def without_breaks(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same without the line break that LLaVA's data puts behind a picture's mark: chat templates drop it too."""
    return [
        {**message, "content": message["content"].replace(f"{IMAGE_MARK}\n", IMAGE_MARK)}
        if message["role"] == "user"
        else message
        for message in messages
    ]


def require_ends_of_turns(selected: Selected, trainer: str) -> None:
    """Raises ConfigError for scores that leave out ends of turns, where a trainer always supervises these."""
    if selected.identity.get("end_of_turn") == "ignore":
        raise ConfigError(
            f"{trainer} supervises the end of each turn, which these scores leave out; score without "
            "--end-of-turn ignore, and select with --end-of-turn drop if it is to carry no loss"
        )
