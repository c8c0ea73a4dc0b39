"""Export to nanoVLM and whoever reads FineVision's ratings: how much each answer needs the picture, from 1 up.

The gain of a turn is the mean over the gains of its answer's tokens, in nats. Its rating is one more than the number of
thresholds that it reaches; the thresholds cut the turns of all scored rows with pictures, kept or not, into `levels`
groups of equal size (quantiles, linear between the two nearest). So `visual_dependency_min_rating=k` of L levels leaves
the upper (L - k + 1) / L of the turns. Turns without a gain (rows without pictures, answers that were cut away) have
no rating, which nanoVLM takes for a pass.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float64

from visgain.errors import ConfigError, DataError
from visgain.export.conversations import write_table
from visgain.export.nanovlm import FEATURES, SCHEMA, TABLE, fine_vision_row
from visgain.export.rows import Selected
from visgain.quantile import quantiles
from visgain.spill import Spill, window
from visgain.storage import flat_values, list_lengths, read_json, scan_scores, write_json

RATINGS, LOWEST, GAINS = "visual_dependency_ratings", "visual_dependency_min", "visual_gain"

_TURNS = pa.schema({"row": pa.int64(), "turn": pa.int32(), "gain": pa.float64()})
"""One line for each scored turn."""

_WHOLE, _REAL = ({"dtype": kind, "_type": "Value"} for kind in ("int64", "float64"))
_FEATURES = {
    **FEATURES,
    RATINGS: {"feature": _WHOLE, "_type": "List"},
    LOWEST: _WHOLE,
    GAINS: {"feature": _REAL, "_type": "List"},
}
_SCHEMA = pa.schema(
    [
        *SCHEMA,
        pa.field(RATINGS, pa.list_(pa.int64())),
        pa.field(LOWEST, pa.int64()),
        pa.field(GAINS, pa.list_(pa.float64())),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)


@dataclass(frozen=True)
class FineVision:
    """`--to finevision`."""

    levels: int = 5  # of ratings, equally frequent

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise ConfigError(f"finevision: levels is {self.levels}; there must be at least 2")

    def export(self, selected: Selected, out: Path) -> Sequence[str]:
        scores = _scores(selected)
        with Spill(out, _TURNS) as turns:
            for table in scan_scores(scores, ["row", "turn", "nll_seen", "nll_blind"], description="rating"):
                gains = turn_gains(table)
                turns.add(gains, window(gains.column("row").to_numpy()))
            n_turns = sum(map(len, turns.column("gain")))
            if n_turns == 0:
                raise DataError(f"{scores}: no row was scored with a picture, so there is nothing to rate")
            thresholds = quantiles(turns.column("gain"), [k / self.levels for k in range(1, self.levels)])
            (out / TABLE).parent.mkdir(parents=True, exist_ok=True)
            write_table(out / TABLE, _rows(selected, out, turns, thresholds), _SCHEMA)
        write_json(
            out / "ratings.json", {"levels": self.levels, "thresholds": thresholds.tolist(), "turns_rated": n_turns}
        )
        shown = ", ".join(f"{value:.3f}" for value in thresholds[:9])
        return [f"ratings 1 to {self.levels} of {n_turns:,} turns, cut at {shown}{' ...' * (self.levels > 10)} nats"]


def turn_gains(table: pa.Table) -> pa.Table:
    """The mean gain of each turn of the rows that have gains. `table`: row, turn, nll_seen and nll_blind of scores."""
    table = table.filter(pa.array(list_lengths(table.column("nll_seen")) > 0))
    turn, seen, blind = (flat_values(table.column(name)) for name in ("turn", "nll_seen", "nll_blind"))
    row = np.repeat(table.column("row").to_numpy(), list_lengths(table.column("turn")))
    changes = (np.diff(row, prepend=-1) != 0) | (np.diff(turn, prepend=-1) != 0)
    first = np.flatnonzero(changes)
    if len(first) == 0:
        return _TURNS.empty_table()
    length = np.diff(first, append=len(row))
    gain = np.add.reduceat(blind - seen, first, dtype=np.float64) / length
    return pa.table([row[first], turn[first], gain], schema=_TURNS)


def rating(gain: float, thresholds: Float64[np.ndarray, " _"]) -> int:
    """One more than the number of thresholds that the gain reaches."""
    return 1 + int(np.searchsorted(thresholds, gain, side="right"))


def _rows(
    selected: Selected, out: Path, turns: Spill, thresholds: Float64[np.ndarray, " _"]
) -> Iterator[Mapping[str, Any]]:
    """The kept rows, which come in row order, with the turns of one window of rows in memory at a time."""
    here, known = -1, dict[tuple[int, int], float]()
    for kept in selected:
        if (key := int(window(np.array([kept.row]))[0])) != here:
            here, known = key, _gains(turns.read(key))
        gains = [known.get((kept.row, turn)) for turn in range(len(kept.sample.answers))]
        ratings = [None if gain is None else rating(gain, thresholds) for gain in gains]
        lowest = min((each for each in ratings if each is not None), default=None)
        yield {**fine_vision_row(kept, out), RATINGS: ratings, LOWEST: lowest, GAINS: gains}


def _gains(turns: pa.Table) -> dict[tuple[int, int], float]:
    row, turn, gain = (turns.column(name).to_pylist() for name in _TURNS.names)
    return dict(zip(zip(row, turn, strict=True), gain, strict=True))


def _scores(selected: Selected) -> Path:
    """The scores that the selection was made from. Raises ConfigError if they are not named, or are others."""
    scores = selected.config.scores
    if scores is None:
        raise ConfigError("--to finevision rates turns by their gains, so it needs --scores")
    if read_json(scores / "run.json", "scores").get("identity") != selected.identity:
        raise ConfigError(f"{selected.config.selection} was not made from {scores}; name its own scores with --scores")
    return scores
