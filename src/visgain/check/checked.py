"""What a check found out, and the same for programs."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from visgain.check.data_checks import reasons
from visgain.check.estimate import Estimate
from visgain.check.findings import Finding
from visgain.check.measure import Measured
from visgain.check.reading import Read, Reading, pieces
from visgain.check.scan import Scan
from visgain.config import CheckConfig
from visgain.vlm.load import VLM


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Everything that was found out. What a stage would have told is None if it, or one before it, failed."""

    config: CheckConfig
    scan: Scan | None
    vlm: VLM | None
    reading: Reading | None
    measured: Measured | None
    estimate: Estimate | None
    findings: list[Finding]

    @property
    def has_errors(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """The findings, and the numbers behind them, as values that JSON has."""
        return {
            "model": self.config.model,
            "data": str(self.config.data),
            "errors": self.has_errors,
            "findings": [finding.as_json() for finding in self.findings],
            "dataset": None if self.scan is None else _dataset(self.scan),
            "sample": None if self.reading is None else _sample(self.reading),
            "measured": None if self.measured is None or self.measured.failure else _measured(self.measured),
            "estimate": None if self.estimate is None else asdict(self.estimate),
        }


def _dataset(scan: Scan) -> dict[str, Any]:
    return {
        "rows": scan.n_rows,
        "looked_at": scan.n_looked_at,
        "with_pictures": sum(bool(one.images) for one in scan.rows),
        "text_only": sum(not one.images for one in scan.rows),
        "unusable": {text: len(rows) for text, rows in reasons((skip.row, skip.reason) for skip in scan.skipped)},
        "sources": dict(Counter(one.source for one in scan.rows)),
        "images_a_row": {str(n): rows for n, rows in sorted(Counter(len(one.images) for one in scan.rows).items())},
        "colliding_ids": len(scan.colliding),
        "repeated_rows": len(scan.repeated),
        "pictures": {
            "names": scan.pictures.n_names,
            "looked_at": scan.pictures.n_looked_at,
            "different": len(set(scan.pictures.content.values())),
            "unusable": len(scan.pictures.unusable),
        },
    }


def _sample(reading: Reading) -> dict[str, Any]:
    return {
        "template": reading.encoder.name,
        "max_length": reading.max_length,
        "rows": [_row(reading, read) for read in reading.rows],
    }


def _row(reading: Reading, read: Read) -> dict[str, Any]:
    """One row; `pieces` are [kind, text, tokens], kind being prompt, answer or image."""
    row: dict[str, Any] = {"row": read.sample.row, "id": read.sample.id, "source": read.sample.source}
    if read.reason or read.crash:
        row["refused"] = read.reason or read.crash
    if read.whole is None:
        return row
    is_image = reading.is_image(read.whole)
    return row | {
        "tokens": len(read.whole.input_ids),
        "image_tokens": int(is_image.sum()),
        "labels": int(read.whole.is_answer.sum()),
        "cut": len(read.whole.input_ids) > reading.max_length,
        "pieces": [list(piece) for piece in pieces(reading.tokenizer, read.whole, is_image, cut=reading.max_length)],
    }


def _measured(measured: Measured) -> dict[str, Any]:
    return {
        "rows": len(measured.scores),
        "answer_tokens": measured.n_tokens,
        "way": measured.way,
        "dtype": measured.dtype,
        "seen": float(measured.seen.mean()) if measured.n_tokens else None,
        "blind": float(measured.blind.mean()) if measured.n_tokens else None,
        "rejected_ways": dict(measured.rejected),
    }
