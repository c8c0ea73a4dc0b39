"""What every benchmark shares: the form of a result row, and the file that it goes to."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"


def machine() -> str:
    """A short name for the computer, e.g. `cpu-2c-x86_64`."""
    return f"cpu-{os.cpu_count()}c-{platform.machine()}"


def commit() -> str:
    """Short hash of the checked-out commit, with `-dirty` if tracked files differ from it; `unknown` outside git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def result_row(
    *,
    benchmark: str,
    case: str,
    metric: str,
    ours: float,
    baseline: float,
    baseline_name: str,
    ratio: float | None = None,
) -> dict[str, Any]:
    """One measurement. `ratio` above 1 means that ours is better; where it is left out, less is better."""
    return {
        "benchmark": benchmark,
        "case": case,
        "metric": metric,
        "ours": ours,
        "baseline": baseline,
        "baseline_name": baseline_name,
        "ratio": baseline / ours if ratio is None else ratio,
    }


def write_results(benchmark: str, rows: Iterable[Mapping[str, Any]], where: str | None = None) -> Path:
    """Replace results/<benchmark>-<machine>.json and return its path; `where` is the machine's name if not a CPU's."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    where = where or machine()
    path = RESULTS / f"{benchmark}-{where}.json"
    told = [{**row, "machine": where, "commit": commit()} for row in rows]
    path.write_text(json.dumps(told, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path
