"""How rough a run in float8 is: some of its own rows are scored again in full precision and compared.

A draft is worth what it selects. So beside the errors there is the overlap: both sets of numbers select by the paper's
rule among the compared rows, and the share of tokens that both keep, of those that either keeps, is what is printed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32

from visgain.errors import StorageError
from visgain.rules import threshold
from visgain.scoring.engine import Engine, scored
from visgain.scoring.feed import Feed
from visgain.scoring.plan import Plan
from visgain.storage import part_path, read_json, write_json
from visgain.vlm.load import VLM

ROWS = 256
"""Rows that are compared, at least: those of whole units, from the first parts on."""

KEEP_PERCENT = 70.0
"""The paper's."""

FILE = "draft.json"

Gains = Sequence[Float32[np.ndarray, " _"]]
"""Token gains of each sample in nats."""


@dataclass(frozen=True, kw_only=True)
class DraftError:
    """A draft against full precision, on the same rows. Errors are of token gains, in nats."""

    rows: int
    tokens: int
    mean_error: float
    largest_error: float
    rank_correlation: float  # Spearman's, of the samples' gains
    overlap: float  # of the tokens kept at KEEP_PERCENT

    def __str__(self) -> str:
        return (
            f"float8 draft against full precision on {self.rows} rows: token gains off by {self.mean_error:.3f} nats "
            f"on average (at most {self.largest_error:.2f}), rank correlation of samples {self.rank_correlation:.4f}, "
            f"overlap of the tokens kept at {KEEP_PERCENT:g}%: {self.overlap:.1%}"
        )


def compare_draft(folder: Path, plan: Plan, source: Feed, vlm: VLM) -> None:
    """Score rows of the finished run in `folder` again with `vlm`, and write what comes out to draft.json.

    Writes nothing if fewer than two rows can be compared.
    """
    draft: list[np.ndarray] = []
    exact: list[np.ndarray] = []
    engine = Engine(vlm=vlm, way="single", pack_tokens=1)
    for part in range(plan.n_parts):
        known = _token_gains(part_path(folder, part, plan.n_parts))
        for row, gain in _rescored(engine, source, plan, part):
            if row in known and np.isfinite(gain).all():
                draft.append(known[row])
                exact.append(gain)
        if len(exact) >= ROWS:
            break
    if len(exact) > 1:
        write_json(folder / FILE, asdict(draft_error(draft, exact)))


def read_draft(folder: Path) -> DraftError | None:
    """What `compare_draft` found, or None if `folder` holds no draft. Raises StorageError if it is damaged."""
    if not (folder / FILE).exists():
        return None
    try:
        return DraftError(**read_json(folder / FILE, "comparison of a draft"))
    except TypeError:
        raise StorageError(f"{folder / FILE} is damaged; remove it and run score again") from None


def draft_error(draft: Gains, exact: Gains) -> DraftError:
    """Compare the token gains of the same samples, two or more."""
    off = np.abs(np.concatenate(draft) - np.concatenate(exact))
    one, other = _kept(draft), _kept(exact)
    return DraftError(
        rows=len(exact),
        tokens=len(off),
        mean_error=float(off.mean()),
        largest_error=float(off.max()),
        rank_correlation=_rank_correlation(_means(draft), _means(exact)),
        overlap=float((one & other).sum() / (one | other).sum()),
    )


def _token_gains(part: Path) -> dict[int, np.ndarray]:
    """Row -> token gains [A] of the scored rows of a part."""
    table = pq.read_table(part, columns=["row", "nll_seen", "nll_blind"])
    columns = (table.column(name).to_pylist() for name in table.column_names)
    return {
        row: np.asarray(blind, np.float32) - np.asarray(seen, np.float32)
        for row, seen, blind in zip(*columns, strict=True)
        if seen
    }


def _rescored(engine: Engine, source: Feed, plan: Plan, part: int) -> Iterator[tuple[int, np.ndarray]]:
    for rows in plan.units(part):
        fed = source[part, rows]
        for (_, pairs), records in zip(scored(engine, fed.units), fed.records, strict=True):
            for record, (seen, blind) in zip(records, pairs, strict=True):
                yield record.row, blind - seen


def _kept(gains: Gains) -> Bool[np.ndarray, " t"]:
    """Which tokens the paper's rule keeps, sample after sample."""
    means = _means(gains)
    tau = threshold([means], KEEP_PERCENT)
    return np.concatenate([(gain >= tau) & (mean >= tau) for gain, mean in zip(gains, means, strict=True)])


def _means(gains: Gains) -> np.ndarray:
    return np.asarray([gain.mean(dtype=np.float64) for gain in gains])


def _rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's: Pearson's correlation of the ranks. Ties do not occur in measured gains; they get ranks in order."""
    n = len(one)
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") - (n - 1) / 2 for values in (one, other)]
    return float(ranks[0] @ ranks[1] / (n * (n * n - 1) / 12))
