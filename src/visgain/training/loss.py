"""How the NLLs of active tokens become one loss: as weights, fixed before anything is computed.

`global` divides the summed loss by the summed weight of the active tokens of the whole optimiser step, all ranks
included, so that how a step is cut up changes nothing. `micro-batch` averages within each micro-batch of the recipe and
then over those, as LLaVA's original code does: a token in a micro-batch with few active tokens weighs more. What goes
through the model together has no part in either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from visgain.training.collate import TrainingRow


def weighed(rows: Sequence[TrainingRow], total: float) -> list[TrainingRow]:
    """`rows` with their weights divided by `total`; as they are, all 0, if that is 0."""
    return [replace(row, weight=(row.weight / (total or 1.0)).astype(np.float32)) for row in rows]


def summed_weight(rows: Sequence[TrainingRow]) -> float:
    return float(sum(row.weight.sum(dtype=np.float64) for row in rows))


def averaged_by_micro_batch(rows: Sequence[TrainingRow], size: int) -> list[TrainingRow]:
    """`rows` with weights that sum to 1 in each micro-batch of `size` rows, or to 0 where none is active."""
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [row for group in groups for row in weighed(group, summed_weight(group))]
