"""What is measured of every arm: names, and how numbers are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Metric = Mapping[str, str]
"""key (of an arm's metrics), label, better ("higher", "lower" or ""), format ("percent" or one of Python's)."""

WORLD: Sequence[Metric] = [
    {"key": "accuracy", "label": "accuracy", "better": "higher", "format": "percent"},
    {"key": "existence_accuracy", "label": "existence", "better": "higher", "format": "percent"},
    {"key": "yes_rate", "label": "says yes", "better": "", "format": "percent"},
    {"key": "hallucinated_objects", "label": "invented", "better": "lower", "format": "percent"},
    {"key": "captions_with_hallucination", "label": "captions", "better": "lower", "format": "percent"},
]
"""What is shown of WorldMetrics. A yes-rate is good when it is near the true one, which is told beside it."""

HELD_OUT: Sequence[Metric] = [
    {"key": "nll_seen", "label": "NLL seen", "better": "lower", "format": ".4f"},
    {"key": "nll_needing", "label": "NLL needing", "better": "lower", "format": ".4f"},
    {"key": "nll_blind", "label": "NLL blind", "better": "", "format": ".4f"},
    {"key": "gain", "label": "gain", "better": "higher", "format": ".4f"},
]
"""Means over the answer tokens of tested rows with pictures, in nats; NLL needing: over those that need the picture."""


def numbers(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number in `metrics`, those of nested mappings under outer.inner."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[prefix + key] = float(value)
    return flat


def written(metric: Metric, value: float, *, signed: bool = False) -> str:
    """`value` as the metric is written, without a percent sign: 95.3."""
    sign = "+" if signed else ""
    text = f"{100 * value:{sign}.1f}" if metric["format"] == "percent" else f"{value:{sign}{metric['format']}}"
    return text.replace("-", "−") if text.strip("+-0.") else text.lstrip("+-")  # what rounds to zero has no sign
