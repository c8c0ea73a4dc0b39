"""visgain: how much does each answer token of a vision-language dataset need the image?

The names in `__all__` are the public ones. They are imported when first asked for, so `import visgain` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visgain.config import ExportConfig, ReportConfig, ScoreConfig, SelectConfig, TrainConfig
    from visgain.counterfactuals import parse_counterfactual
    from visgain.data import open_dataset
    from visgain.errors import VisgainError
    from visgain.export.run import run_export
    from visgain.report.html import write_report
    from visgain.scoring.run import run_score
    from visgain.selection import run_select
    from visgain.storage import read_scores, read_selection
    from visgain.training.run import run_train
    from visgain.types import Encoded, Sample, Selection, Skipped, TokenScores, Turn
    from visgain.vlm.load import load_vlm
    from visgain.vlm.template import make_encoder

__version__ = "0.1.0"

__all__ = [
    "Encoded",
    "ExportConfig",
    "ReportConfig",
    "Sample",
    "ScoreConfig",
    "SelectConfig",
    "Selection",
    "Skipped",
    "TokenScores",
    "TrainConfig",
    "Turn",
    "VisgainError",
    "load_vlm",
    "make_encoder",
    "open_dataset",
    "parse_counterfactual",
    "read_scores",
    "read_selection",
    "run_export",
    "run_score",
    "run_select",
    "run_train",
    "write_report",
]

_HOMES = {
    "visgain.config": ("ExportConfig", "ReportConfig", "ScoreConfig", "SelectConfig", "TrainConfig"),
    "visgain.counterfactuals": ("parse_counterfactual",),
    "visgain.data": ("open_dataset",),
    "visgain.errors": ("VisgainError",),
    "visgain.export.run": ("run_export",),
    "visgain.report.html": ("write_report",),
    "visgain.scoring.run": ("run_score",),
    "visgain.selection": ("run_select",),
    "visgain.storage": ("read_scores", "read_selection"),
    "visgain.training.run": ("run_train",),
    "visgain.types": ("Encoded", "Sample", "Selection", "Skipped", "TokenScores", "Turn"),
    "visgain.vlm.load": ("load_vlm",),
    "visgain.vlm.template": ("make_encoder",),
}


if not TYPE_CHECKING:  # else a type checker would accept any name

    def __getattr__(name: str) -> Any:
        for module, names in _HOMES.items():
            if name in names:
                value = globals()[name] = getattr(importlib.import_module(module), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
