"""`visgain export`: one selection, one dataset, one trainer."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from visgain import __version__
from visgain.config import ExportConfig
from visgain.errors import StorageError
from visgain.export import EXPORTERS, Exporter
from visgain.export.pictures import FOLDER
from visgain.export.rows import Selected, open_selected
from visgain.registry import spec_of
from visgain.storage import file_hash, read_json, storage_errors, write_json

RECORD = "export.json"
"""What the folder is; `complete` becomes true when everything else is written."""


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    rows: int
    tokens: int
    active_tokens: int
    notes: Sequence[str]  # for the user: what to do with the files


def run_export(config: ExportConfig) -> ExportSummary:
    """Write the selection for one trainer to `config.out`. A former export there is replaced.

    Raises UnknownName or ConfigError for --to, DataError or StorageError for what cannot be read or written.
    """
    exporter: Exporter = EXPORTERS.make(config.to)
    selected = open_selected(config)
    _claim(config, selected.dataset.fingerprint)
    record = _record(config, exporter, selected)
    write_json(config.out / RECORD, {**record, "complete": False})
    notes = exporter.export(selected, config.out)
    write_json(config.out / RECORD, {**record, "complete": True})
    return ExportSummary(
        rows=selected.n_rows, tokens=selected.n_tokens, active_tokens=selected.n_active, notes=tuple(notes)
    )


def _claim(config: ExportConfig, data_fingerprint: str) -> None:
    """Raises StorageError for a folder with somebody else's files: names like data.json could be theirs."""
    with storage_errors(config.out):
        config.out.mkdir(parents=True, exist_ok=True)
        ours = (config.out / RECORD).exists() or not any(config.out.iterdir())
    if not ours:
        raise StorageError(f"{config.out} holds files that are not of an export; use another --out")
    if (config.out / RECORD).exists():
        before = read_json(config.out / RECORD, "export")
        if before.get("data_fingerprint") != data_fingerprint:  # pictures of other data may have the same names
            shutil.rmtree(config.out / FOLDER, ignore_errors=True)


def _record(config: ExportConfig, exporter: Exporter, selected: Selected) -> dict[str, Any]:
    return {
        "to": spec_of(config.to.partition(":")[0], exporter),
        "visgain": __version__,
        "selection": file_hash(config.selection / "selection.parquet"),
        "data": str(config.data.absolute()),
        "image_root": str(selected.dataset.image_root.absolute()),
        "data_fingerprint": selected.dataset.fingerprint,
        "identity": selected.identity,
        "weights": selected.record.get("weights", "soft" if selected.soft else "hard"),
        "rows": selected.n_rows,
        "tokens": selected.n_tokens,
        "active_tokens": selected.n_active,
    }
